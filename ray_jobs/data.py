"""What a run learns from: a name in the run description becomes three fixed splits, and those become batches.

`load_dataset` takes these steps, in this order. The result depends on the files, `config.data` and the seed
alone:

1. read: the data set's own training and test examples, as `sources.py` says.
2. `fraction`: the first part of the training examples, e.g. 0.1 for the paper's 10 %.
3. `validation_fraction`: that part of them, chosen by the seed, becomes the validation split; not where a user's own
   data have one.
4. `label_noise`: that part of the remaining training labels, chosen by the seed, turns into another class, each
   of the others equally likely. Validation and test labels stay clean: they choose and judge models.

`Batches` then deals out the training split: which examples a step sees, and how each is augmented, depends on
(seed, epoch, example) and not on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from phisam.noise import key
from ray_jobs import sources
from ray_jobs.config import DataConfig
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.section import is_own
from ray_jobs.sources import Split

__all__ = [
    "Batches",
    "Dataset",
    "Normalize",
    "Split",
    "check_batch_size",
    "evaluation_batches",
    "load_dataset",
    "micro_batches",
]

Normalize = Callable[[Tensor], Tensor]

_PADDING = 4  # pixels on each side of an image before its random crop


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits, and what was measured on them.

    mean, std: (C,) float64, of the training split's pixels; fingerprint: sha256 over all three splits, in hex.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: Tensor
    std: Tensor
    fingerprint: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    def normalizer(self, dtype: torch.dtype = torch.float32) -> Normalize:
        """images (B, C, H, W) uint8 -> (images - mean) / std in `dtype`, on this data set's device."""
        mean, std = self.mean.to(dtype).view(-1, 1, 1), self.std.to(dtype).view(-1, 1, 1)
        return lambda images: images.to(dtype).sub_(mean).div_(std)


def load_dataset(config: DataConfig, seed: int, expected: str | None = None) -> Dataset:
    """The data set on the CPU, after the steps in the module's docstring.

    expected: the fingerprint that another process found, which shall be found here too.

    Processes are not coordinated here: with `download` true the driver calls this once before the workers
    start, and they find the files (on a cluster of several nodes in a `root` that all of them see).

    ConfigError: files that are not where they were sought, are damaged or too large; a missing package; an
    empty split. RunError: a download that failed; data other than expected.
    """
    source = sources.read_own(config, seed) if is_own(config.name) else sources.read(config)
    train, test, num_classes, validation = source
    train = train[: round(config.fraction * len(train))]
    if validation is None:
        train, validation = _cut_validation(train, config, seed)
    train = _with_label_noise(train, config.label_noise, num_classes, seed)
    mean, std = _pixel_statistics(train.images)
    fingerprint = _fingerprint(train, validation, test)
    if expected not in (None, fingerprint):
        raise RunError(
            f"data.name = {config.name}: this worker's data have the fingerprint {fingerprint}, the driver's "
            f"{expected}. All workers need the same examples: look for files that differ between nodes"
            + (", or for what in your function depends on more than the seed and its options" * is_own(config.name))
        )
    return Dataset(config.name, train, validation, test, num_classes, mean, std, fingerprint)


def _cut_validation(train: Split, config: DataConfig, seed: int) -> tuple[Split, Split]:
    n = len(train)
    n_validation = max(1, round(config.validation_fraction * n))
    if n_validation >= n:
        raise ConfigError(
            f"data.fraction = {config.fraction} leaves {n} examples of {config.name}, of which "
            f"data.validation_fraction = {config.validation_fraction} takes {n_validation}: none is left to train "
            f"on. Raise data.fraction or lower data.validation_fraction."
        )
    order = torch.randperm(n, generator=_generator(seed, "validation"))
    return train[order[n_validation:].sort().values], train[order[:n_validation].sort().values]


def _with_label_noise(train: Split, fraction: float, num_classes: int, seed: int) -> Split:
    """Exactly round(fraction * N) labels y become (y + shift) mod C, shift uniform in 1..C - 1, C classes."""
    generator = _generator(seed, "label noise")
    chosen = torch.randperm(len(train), generator=generator)[: round(fraction * len(train))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    labels = train.labels.clone()
    labels[chosen] = (labels[chosen] + shift) % num_classes
    return Split(train.images, labels)


def _pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C,) float64, from the counts of the 256 values: no rounding adds up."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    std[std == 0] = 1.0  # a channel of one value carries nothing: it shall become 0, not NaN
    return mean, std


def _fingerprint(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.images.contiguous().numpy().data)
        digest.update(split.labels.numpy().astype("<i8").data)
    return digest.hexdigest()


def _generator(seed: int, purpose: str, epoch: int = 0) -> Generator:
    """A CPU generator whose draws depend on (seed, purpose, epoch) and on nothing else, the device included."""
    return torch.Generator().manual_seed(key(seed, int.from_bytes(purpose.encode()), epoch))


class Batches:
    """The training split, dealt out over data ranks in shuffled global batches, on the split's device.

    Global batch b of an epoch is order[b * B : (b + 1) * B] with B = batch_size and an order that depends on
    (seed, epoch) alone. Of it data rank r of D takes the examples r, r + D, r + 2 D, ...: so the first part of every
    rank's share is the first part of the global batch, whatever D is. The examples after the last whole batch are
    left out in that epoch. `augment = "crop_flip"` pads by 4 black pixels, crops at a random
    offset and mirrors every second image on average: drawn for all examples at once, by (seed, epoch), so that
    an example's augmentation does not depend on the batch, rank or step that it lands in.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        normalize: Normalize,
        augment: Literal["none", "crop_flip"] = "none",
    ) -> None:
        """batch_size is the global one. ConfigError where the split has fewer examples."""
        check_batch_size(batch_size, len(split))
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.steps_per_epoch = len(split) // batch_size
        self._normalize, self._crops = normalize, augment == "crop_flip"

    def epoch(
        self, epoch: int, data_rank: int = 0, data_size: int = 1, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's (images (B / data_size, C, H, W), labels (B / data_size,)) of each step from start_step on.

        ConfigError where data_size does not divide the batch size.
        """
        check_batch_size(self.batch_size, len(self.split), data_size)
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        firsts = [step * self.batch_size for step in range(start_step, self.steps_per_epoch)]
        shares = [slice(first + data_rank, first + self.batch_size, data_size) for first in firsts]
        return self._deal(epoch, shares)

    def _deal(self, epoch: int, shares: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.split), self.split.labels.device
        order = torch.randperm(n, generator=_generator(self.seed, "order", epoch)).to(device)
        if self._crops:
            generator = _generator(self.seed, "augmentation", epoch)
            offsets = torch.randint(2 * _PADDING + 1, (n, 2), generator=generator).to(device)
            flips = torch.randint(2, (n,), generator=generator, dtype=torch.bool).to(device)
        for share in shares:
            examples = order[share]
            images = self.split.images.index_select(0, examples)
            if self._crops:
                images = _crop_flip(images, offsets[examples], flips[examples])
            yield self._normalize(images), self.split.labels[examples]


def _crop_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """images (B, C, H, W), padded by zeros, cropped to (H, W) at offsets (B, 2), mirrored where flips (B,).

    A crop is copied as a window on the padded images: eight times as fast as picking its pixels by index.
    """
    batch, channels, height, width = images.shape
    padded = pad(images, [_PADDING] * 4).contiguous()
    row = width + 2 * _PADDING
    plane = (height + 2 * _PADDING) * row
    starts = padded.numel() - (channels - 1) * plane - (height - 1) * row - width + 1
    windows = padded.as_strided((starts, channels, height, width), (1, plane, row, 1))  # the window from each pixel on
    example = torch.arange(batch, device=images.device)
    cropped = windows.index_select(0, example * (channels * plane) + offsets[:, 0] * row + offsets[:, 1])
    return torch.cat([cropped, cropped.flip(3)]).index_select(0, example + batch * flips)


def micro_batches(images: Tensor, labels: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """A data rank's share, dealt out to `count` micro-batches as a global batch is to data ranks: by turns."""
    return [(images[first::count], labels[first::count]) for first in range(count)]


def check_batch_size(batch_size: int, n_examples: int, data_size: int = 1, micro_batches: int = 1) -> None:
    """ConfigError unless n_examples make a global batch that data_size ranks x micro_batches share equally."""
    if batch_size > n_examples:
        raise ConfigError(
            f"training.batch_size = {batch_size}, but the training split has {n_examples} examples: not one "
            f"whole batch. Lower training.batch_size to {n_examples} at most, or raise data.fraction."
        )
    shares = data_size * micro_batches
    if batch_size % shares:
        below = batch_size - batch_size % shares
        near = " or ".join(str(size) for size in (below, below + shares) if 0 < size <= n_examples)
        by, change = f"{data_size} data ranks", "scaling.num_workers or optimizer.sample_parallel"
        if micro_batches > 1:
            by += f" x {micro_batches} micro-batches"
            change = f"training.micro_batches, {change}"
        raise ConfigError(
            f"training.batch_size = {batch_size} (the global batch) cannot be shared equally by {by}. "
            f"Set it to a multiple of {shares}{near and f', e.g. {near}'}; or change {change} "
            "(data ranks = workers / sample ranks)."
        )


def evaluation_batches(
    split: Split, batch_size: int, rank: int, world_size: int, normalize: Normalize
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's contiguous part of the split, in stored order, batch_size examples or fewer at a time.

    Over all ranks every example comes exactly once. Parts differ by one example at most and may be empty, so sum
    over examples, and divide by their number after the reduction.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    first, end = (len(split) * r // world_size for r in (rank, rank + 1))
    for start in range(first, end, batch_size):
        part = split[start : min(start + batch_size, end)]
        yield normalize(part.images), part.labels
