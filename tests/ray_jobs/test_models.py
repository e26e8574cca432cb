"""The networks by name: their shapes, their determinism, and what is said of a name or an image that does not fit."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from ray_jobs.config import DataConfig, ModelConfig
from ray_jobs.data import Batches, evaluation_batches, load_dataset
from ray_jobs.errors import ConfigError
from ray_jobs.models import make_model

CASES = {
    "mlp": (1, 28, 28),
    "convnet": (1, 8, 8),
    "transformer": (1, 28, 28),
    "resnet18": (1, 28, 28),
    "torchvision/mobilenet_v3_small": (3, 32, 32),
    "torchvision/googlenet": (3, 64, 64),
}


def make(name: str, shape: tuple[int, int, int] | None = None, num_classes: int = 7, seed: int = 0) -> nn.Module:
    return make_model(ModelConfig(name=name), shape or CASES[name], num_classes, seed)


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_float32_parameters(name: str) -> None:
    model = make(name)
    assert model.training
    assert model(torch.zeros(2, *CASES[name])).shape == (2, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", CASES)
def test_parameters_depend_on_the_seed_alone_and_leave_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = make(name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = make(name), make(name, seed=1)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    weights = [(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True) if p.dim() > 1]
    assert all(not torch.equal(p, q) for p, q in weights)


def test_mlp_is_the_papers_network() -> None:
    model = make("mlp", num_classes=10)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == [128] * 6 + [10]
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 6


def test_mlp_takes_width_and_depth() -> None:
    model = make_model(ModelConfig(name="mlp", width=20, depth=2), (3, 4, 4), 5, seed=0)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(48, 20), (20, 20), (20, 5)]


@pytest.mark.parametrize("channels", [1, 3])
def test_resnet18_has_its_cifar_form(channels: int) -> None:
    model = make("resnet18", (channels, 32, 32), num_classes=10)
    # The count that is known of the CIFAR form, 11,173,962, is for 3 channels; the stem has 9 * 64 a channel.
    assert n_parameters(model) == 11_173_962 - 9 * 64 * (3 - channels)
    sizes = []
    layer1 = model.get_submodule("layer1")
    layer1.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))
    model(torch.zeros(2, channels, 32, 32))
    assert sizes == [(2, 64, 32, 32)], "neither the stem nor a max-pooling makes the image smaller"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 30), (1, 5, 7)])
def test_the_transformer_sees_every_pixel_of_images_of_any_size(shape: tuple[int, int, int]) -> None:
    """Patches cover the image, padded where its sides are no multiple of four; 16 tokens whatever its size is."""
    model = make("transformer", shape)
    image = torch.zeros(1, *shape, requires_grad=True)
    model(image)[0, 0].backward()
    assert image.grad is not None
    assert bool((image.grad != 0).all())
    assert tuple(model.get_parameter("position").shape) == (16, 32)


def test_the_transformer_knows_where_a_patch_is() -> None:
    model, images = make("transformer", (1, 8, 8)), torch.zeros(2, 1, 8, 8)
    images[0, :, :2, :2] = images[1, :, 4:6, 6:] = 1
    with torch.no_grad():
        model.get_parameter("position").mul_(50)
        here, there = model(images)
        assert not torch.allclose(here, there, atol=1e-4)
        model.get_parameter("position").zero_()
        here, there = model(images)
        torch.testing.assert_close(here, there)


def test_convnet_learns_digits_on_a_cpu() -> None:
    loaded = load_dataset(DataConfig(name="digits"), seed=0)
    normalize = loaded.normalizer()
    model = make("convnet", loaded.input_shape, loaded.num_classes)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = Batches(loaded.train, 64, 0, normalize)
    for epoch in range(3):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
    model.eval()
    images, labels = next(evaluation_batches(loaded.test, len(loaded.test), 0, 1, normalize))
    assert (model(images).argmax(1) == labels).double().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("torchvision/resnet51", "torchvision/resnet50"),
        ("torchvision/resnet", "torchvision/resnet18"),
        ("torchvision/convnet", "convnet or"),
        ("torchvision/fasterrcnn_resnet50_fpn", None),
    ],
)
def test_an_unknown_name(name: str, guess: str | None) -> None:
    expected = (
        f"Did you mean .*{guess}" if guess else "Allowed: mlp, convnet, transformer, resnet18, and torchvision/NAME"
    )
    with pytest.raises(ConfigError, match=rf"model\.name = {name} is not known\..*{expected}"):
        make(name, (3, 32, 32))


def test_a_torchvision_model_wants_three_channels() -> None:
    with pytest.raises(ConfigError, match=r"torchvision/resnet18 takes images of 3 channels, but .* have 1\. Use one"):
        make("torchvision/resnet18", (1, 28, 28))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("torchvision/vit_b_32", (3, 32, 32)), ("torchvision/alexnet", (3, 32, 32)), ("convnet", (1, 2, 3))],
)
def test_images_of_a_size_that_the_network_cannot_take(name: str, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"{name} cannot take images of {shape[1]}x{shape[2]} pixels"):
        make(name, shape)


def test_torchvision_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match=r"package torchvision.*pip install 'phisam\[service\]'"):
        make("torchvision/resnet18", (3, 32, 32))
    assert isinstance(make("mlp"), nn.Module)
