"""Splits and batches are functions of (files, config, seed, epoch, example), never of the number of processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_jobs import data, sources
from ray_jobs.config import DataConfig
from ray_jobs.data import Batches, Split, check_batch_size, evaluation_batches, load_dataset
from ray_jobs.errors import ConfigError
from ray_jobs.sources import Source

DIGITS = DataConfig(name="digits")
DIGITS_FINGERPRINT = "a79d649d194e"


def numbered(n: int, *shape: int) -> Split:
    """n random images with the labels 0..n-1, so that an example can be recognised wherever it comes out."""
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, *(shape or (3, 8, 6))), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n))


@pytest.fixture
def numbered_source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """digits replaced by 100 training examples, each of a class of its own, and 20 test examples."""
    source = Source(numbered(100), numbered(20), num_classes=100)
    monkeypatch.setattr(sources, "read", lambda config: source)
    return source


def identity(images: Tensor) -> Tensor:
    return images


# load_dataset


def test_splits_are_disjoint_and_complete(numbered_source: Source) -> None:
    loaded = load_dataset(DIGITS, seed=0)
    assert len(loaded.validation) == 10
    assert sorted(torch.cat([loaded.train.labels, loaded.validation.labels]).tolist()) == list(range(100))
    for split in (loaded.train, loaded.validation):
        assert torch.equal(split.images, numbered_source.train.images[split.labels])
    assert torch.equal(loaded.test.images, numbered_source.test.images)
    assert loaded.input_shape == (3, 8, 6)


def test_fraction_takes_the_first_training_examples(numbered_source: Source) -> None:
    loaded = load_dataset(DataConfig(name="digits", fraction=0.3, validation_fraction=0.2), seed=0)
    assert sorted(torch.cat([loaded.train.labels, loaded.validation.labels]).tolist()) == list(range(30))
    assert len(loaded.validation) == 6
    assert len(loaded.test) == 20


def test_label_noise_flips_exactly_its_part_of_the_training_labels_alone() -> None:
    clean = load_dataset(DIGITS, seed=3)
    noisy = load_dataset(DataConfig(name="digits", label_noise=0.25), seed=3)
    flipped = clean.train.labels != noisy.train.labels
    assert int(flipped.sum()) == round(0.25 * len(clean.train))
    assert torch.equal(clean.train.images, noisy.train.images)
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    shift = (noisy.train.labels - clean.train.labels)[flipped] % 10
    counts = shift.bincount(minlength=10)
    assert counts[0] == 0
    # Each of the other 9 classes is equally likely: 36 expected, standard deviation 5.6.
    assert (counts[1:] - int(flipped.sum()) / 9).abs().max() < 5 * 5.6


def test_the_seed_decides_the_validation_split_and_the_noise_but_not_the_test_set() -> None:
    config = DataConfig(name="digits", label_noise=0.2)
    a, again, b = load_dataset(config, seed=0), load_dataset(config, seed=0), load_dataset(config, seed=1)
    assert torch.equal(a.train.labels, again.train.labels)
    assert a.fingerprint == again.fingerprint
    assert not torch.equal(a.validation.images, b.validation.images)
    assert not torch.equal(a.train.labels, b.train.labels)
    assert torch.equal(a.test.images, b.test.images)


def test_statistics_are_those_of_the_training_split_and_exact() -> None:
    loaded = load_dataset(DIGITS, seed=0)
    pixels = loaded.train.images.long()
    n, total, squares = pixels.numel(), int(pixels.sum()), int((pixels**2).sum())  # integers: nothing is rounded
    assert loaded.mean.tolist() == pytest.approx([total / n], rel=1e-15)
    assert loaded.std.tolist() == pytest.approx([math.sqrt((n * squares - total**2) / n**2)], rel=1e-15)
    normal = loaded.normalizer(torch.float64)(loaded.train.images)
    assert normal.dtype == torch.float64
    torch.testing.assert_close(normal.mean(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(normal.std(correction=0), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-12)
    assert loaded.normalizer()(loaded.train.images).dtype == torch.float32


def test_each_channel_has_its_own_statistics_and_a_constant_one_becomes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    train = numbered(50)
    train.images[:, 0] //= 4
    train.images[:, 2] = 7
    monkeypatch.setattr(sources, "read", lambda config: Source(train, numbered(5), 50))
    loaded = load_dataset(DIGITS, seed=0)
    normal = loaded.normalizer(torch.float64)(loaded.train.images)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert normal.std((0, 2, 3), correction=0).tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_the_fingerprint_is_the_same_in_another_process_and_next_year() -> None:
    program = (
        "from ray_jobs.config import DataConfig; from ray_jobs.data import load_dataset;"
        "print(load_dataset(DataConfig(name='digits'), seed=0).fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == load_dataset(DIGITS, seed=0).fingerprint
    assert process.stdout.startswith(DIGITS_FINGERPRINT)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("what", ["images", "labels"])
def test_the_fingerprint_sees_one_changed_number(split: str, what: str) -> None:
    loaded = load_dataset(DIGITS, seed=0)
    getattr(getattr(loaded, split), what).view(-1)[-1] += 1
    assert data._fingerprint(loaded.train, loaded.validation, loaded.test) != loaded.fingerprint


def test_a_fraction_that_leaves_nothing_to_train_on() -> None:
    with pytest.raises(ConfigError, match=r"data\.fraction = 0\.0005 leaves 1 examples .* takes 1: none is left"):
        load_dataset(DataConfig(name="digits", fraction=0.0005), seed=0)


# Batches


def make_batches(n: int = 37, batch_size: int = 8, seed: int = 0, augment: Any = "crop_flip") -> Batches:
    return Batches(numbered(n), batch_size, seed, identity, augment)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("data_size", [2, 4])
def test_a_global_batch_is_the_same_for_every_number_of_data_ranks(data_size: int, augment: str) -> None:
    batches = make_batches(augment=augment)
    whole = list(batches.epoch(2))
    ranks = [list(batches.epoch(2, rank, data_size)) for rank in range(data_size)]
    assert len(whole) == 4
    for step, (images, labels) in enumerate(whole):
        for first, rank in enumerate(ranks):
            assert torch.equal(rank[step][0], images[first::data_size])
            assert torch.equal(rank[step][1], labels[first::data_size])


@pytest.mark.parametrize(("data_size", "count"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (1, 8)])
def test_the_first_part_of_every_share_is_the_first_part_of_the_global_batch(data_size: int, count: int) -> None:
    """What perturb_fraction and SSAM's Fisher information see must not depend on the number of ranks."""
    batches = make_batches(n=64, batch_size=32)
    images, labels = next(batches.epoch(0))
    for fraction in (0.25, 0.5, 0.75):
        first = [
            (share[: round(fraction * len(share))], its_labels[: round(fraction * len(share))])
            for rank in range(data_size)
            for share, its_labels in data.micro_batches(*next(batches.epoch(0, rank, data_size)), count)
        ]
        seen = dict(zip(torch.cat([y for _, y in first]).tolist(), torch.cat([x for x, _ in first]), strict=True))
        expected = labels[: round(fraction * 32)].tolist()
        assert sorted(seen) == sorted(expected)
        assert all(torch.equal(seen[label], images[i]) for i, label in enumerate(expected))


def test_an_epoch_sees_an_example_once_and_leaves_out_the_incomplete_batch() -> None:
    batches = make_batches(augment="none")
    labels = torch.cat([labels for _, labels in batches.epoch(0)])
    assert batches.steps_per_epoch == 4
    assert len(set(labels.tolist())) == len(labels) == 32
    for images, its_labels in batches.epoch(0):
        assert torch.equal(images, batches.split.images[its_labels])


def test_order_and_augmentation_follow_seed_and_epoch() -> None:
    def first(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return next(make_batches(seed=seed).epoch(epoch))

    images, labels = first(0, 0)
    assert torch.equal(images, first(0, 0)[0])
    for other in (first(1, 0), first(0, 1)):
        assert not torch.equal(labels, other[1])
    # One image alone, so that only its augmentation can change between epochs.
    lone = Batches(numbered(1), 1, 0, identity, "crop_flip")
    assert len({tuple(next(lone.epoch(epoch))[0].flatten().tolist()) for epoch in range(8)}) > 4


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_an_epoch_may_start_in_its_middle(start_step: int) -> None:
    batches = make_batches()
    rest = list(batches.epoch(5, 1, 2, start_step))
    expected = list(batches.epoch(5, 1, 2))[start_step:]
    assert len(rest) == len(expected) == 4 - start_step
    for (images, labels), (expected_images, expected_labels) in zip(rest, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_the_augmentation_of_an_example_does_not_depend_on_its_batch() -> None:
    def by_label(batch_size: int) -> dict[int, Tensor]:
        batches = make_batches(n=36, batch_size=batch_size)
        return {int(label): image for x, y in batches.epoch(1) for image, label in zip(x, y, strict=True)}

    small, large = by_label(3), by_label(18)
    assert small.keys() == large.keys() == set(range(36))
    assert all(torch.equal(small[label], large[label]) for label in small)


def test_crop_and_flip_equal_one_image_at_a_time() -> None:
    images = numbered(81 * 2, 3, 8, 6).images
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    flips = torch.arange(162) >= 81
    result = data._crop_flip(images, offsets, flips)
    for i, (row, column) in enumerate(offsets.tolist()):
        canvas = torch.zeros(3, 16, 14, dtype=torch.uint8)
        canvas[:, 4:12, 4:10] = images[i]
        crop = canvas[:, row : row + 8, column : column + 6]
        assert torch.equal(result[i], crop.flip(2) if flips[i] else crop)


def test_offsets_and_flips_cover_their_range_evenly() -> None:
    n = 8100
    images = torch.zeros(n, 2, 9, 19, dtype=torch.uint8)
    images[:, 0, 4, 9] = 255  # one bright pixel tells the offset: it is inside every crop
    images[:, 1, :, 10:] = 255  # a bright right half tells whether the image was mirrored
    batches = Batches(Split(images, torch.arange(n)), n, 0, identity, "crop_flip")
    pixel, half = next(batches.epoch(0))[0].unbind(1)
    places = pixel.flatten(1).argmax(1).bincount(minlength=9 * 19).view(9, 19)[:, 5:14]
    assert (places - 100).abs().max() < 5 * 10  # 100 expected at each of 81 places, standard deviation 10
    mirrored = (half.amax(1).argmax(1) < pixel.amax(1).argmax(1)).sum()
    assert abs(int(mirrored) - n / 2) < 5 * 45  # standard deviation 45


def test_batches_are_normalised_after_their_augmentation() -> None:
    """The padding is black, as in the files, and not the mean."""
    loaded = load_dataset(DIGITS, seed=0)
    batches = Batches(loaded.train, 64, 0, loaded.normalizer(torch.float64), "crop_flip")
    images, _ = next(batches.epoch(0))
    assert images.dtype == torch.float64
    assert images.shape == (64, 1, 8, 8)
    torch.testing.assert_close(images.min(), (-loaded.mean / loaded.std)[0], rtol=0, atol=1e-12)


def test_a_batch_that_the_data_ranks_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size = 50 .* 4 data ranks\. .* e\.g\. 48 or 52;"):
        make_batches(n=100, batch_size=50).epoch(0, 0, 4)
    with pytest.raises(ConfigError, match=r"multiple of 4, e\.g\. 4;"):
        check_batch_size(3, 100, data_size=4)
    check_batch_size(100, 100, data_size=4)


def test_a_share_that_its_micro_batches_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"by 2 data ranks x 3 micro-batches\. .* multiple of 6, e\.g\. 30 or 36; or"):
        check_batch_size(32, 100, data_size=2, micro_batches=3)  # 16 examples a rank
    with pytest.raises(ConfigError, match=r"or change training\.micro_batches, scaling\.num_workers"):
        check_batch_size(32, 100, micro_batches=3)
    check_batch_size(36, 100, data_size=2, micro_batches=3)


def test_a_batch_that_is_larger_than_the_training_split() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size = 38, but the training split has 37 examples"):
        make_batches(n=37, batch_size=38)
    assert make_batches(n=37, batch_size=37).steps_per_epoch == 1


# evaluation_batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
def test_evaluation_sees_every_example_once_over_all_ranks(world_size: int) -> None:
    split = numbered(13)
    parts = [list(evaluation_batches(split, 4, rank, world_size, identity)) for rank in range(world_size)]
    labels = torch.cat([labels for part in parts for _, labels in part])
    images = torch.cat([images for part in parts for images, _ in part])
    assert torch.equal(labels, split.labels)
    assert torch.equal(images, split.images)
    assert max(len(labels) for part in parts for _, labels in part) <= 4
    sizes = [sum(len(labels) for _, labels in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_normalises() -> None:
    loaded = load_dataset(DIGITS, seed=0)
    normalize = loaded.normalizer()
    images, _ = next(evaluation_batches(loaded.test, 32, 0, 1, normalize))
    assert torch.equal(images, normalize(loaded.test.images[:32]))
