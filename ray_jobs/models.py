"""The networks that a run description names: `mlp`, `convnet`, ..., `torchvision/<name>`, or a user's own."""

from __future__ import annotations

import difflib
import importlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ray_jobs.config import ModelConfig
from ray_jobs.errors import ConfigError
from ray_jobs.section import is_own
from ray_jobs.user_code import own_model, seeded

_OWN = ("mlp", "convnet", "transformer", "resnet18")
_TORCHVISION = "torchvision/"
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def make_model(config: ModelConfig, input_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """A new network on the CPU, in float32: images (B, *input_shape) -> logits (B, num_classes).

    Its parameters depend on (config, input_shape, num_classes, seed) alone, and the global generators stay as
    they are. ConfigError: an unknown name, or images that the network cannot take.
    """
    if is_own(config.name):
        return own_model(config, input_shape, num_classes, seed)
    with seeded(seed):
        model = _build(config, input_shape, num_classes)
    _check_takes(model, config.name, input_shape)
    return model


def _build(config: ModelConfig, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = input_shape
    match config.name:
        case "mlp":
            return mlp(channels * height * width, config.width, config.depth, num_classes)
        case "convnet":
            return convnet(channels, num_classes)
        case "transformer":
            return Transformer(input_shape, num_classes)
        case "resnet18":
            return resnet18(channels, num_classes)
        case name if name in _torchvision_names():
            return _torchvision_model(name, channels, num_classes)
        case name:
            raise _unknown(name)


def mlp(inputs: int, width: int, depth: int, num_classes: int) -> nn.Module:
    """The paper's ReLU network (Section 4: depth 6, width 128): `depth` hidden layers, then a linear one."""
    sizes = [inputs, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], num_classes))


def convnet(channels: int, num_classes: int) -> nn.Module:
    """Three 3x3 convolutions with BatchNorm, of 16, 32 and 64 channels, 24,000 parameters: a CPU trains it."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class Transformer(nn.Module):
    """A small vision transformer: a 4 x 4 grid of patches as tokens of width 32, two pre-norm blocks, their mean read.

    About 20,000 parameters; images are padded to whole patches. No dropout, no class token.
    """

    grid, width, depth = 4, 32, 2

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        patch = (-(-height // self.grid), -(-width // self.grid))
        self.pad = (0, self.grid * patch[1] - width, 0, self.grid * patch[0] - height)
        self.patches = nn.Conv2d(channels, self.width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid**2, self.width))
        self.blocks = nn.Sequential(*[TransformerBlock(self.width, heads=4) for _ in range(self.depth)])
        self.norm, self.head = nn.LayerNorm(self.width), nn.Linear(self.width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        tokens = self.patches(functional.pad(images, self.pad)).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class TransformerBlock(nn.Module):
    """Attention over all tokens, then a network on each; layer norm before both, sums around both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, width) -> the same shape."""
        B, T, width = tokens.shape
        q, k, v = self.qkv(self.norm_1(tokens)).view(B, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width)
        tokens = tokens + self.out(attended)
        return torch.add(tokens, self.network(self.norm_2(tokens)))


def resnet18(channels: int, num_classes: int) -> nn.Module:
    """ResNet-18 in its CIFAR form: a 3x3 stem of stride 1 and no max-pooling, for images of about 32x32."""
    model = _torchvision().resnet18(weights=None, num_classes=num_classes)
    stem = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does for its own stem
    model.conv1, model.maxpool = stem, nn.Identity()
    assert isinstance(model, nn.Module)
    return model


def _torchvision_model(name: str, channels: int, num_classes: int) -> nn.Module:
    if channels != 3:
        raise ConfigError(
            f"model.name = {name} takes images of 3 channels, but those of this data set have {channels}. "
            f"Use one of {', '.join(_OWN)}, which take any number."
        )
    short_name = name.removeprefix(_TORCHVISION)
    # An auxiliary head returns logits of its own beside the model's; the default initialisation warns of a change.
    options = {"aux_logits": False, "init_weights": True} if short_name in _WITH_AUXILIARY_HEADS else {}
    model = _torchvision().get_model(short_name, weights=None, num_classes=num_classes, **options)
    assert isinstance(model, nn.Module)
    return model


def _check_takes(model: nn.Module, name: str, input_shape: tuple[int, int, int]) -> None:
    """One black image through the network: many take images of one size only, or none below some size."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"model.name = {name} cannot take images of {input_shape[1]}x{input_shape[2]} pixels ({error}). "
            f"Use another model, or images of another size (most of torchvision's models are made for 224x224; "
            f"data.image_size sets it for data.name = imagefolder)."
        ) from error
    model.train()


def _torchvision() -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this model needs the package torchvision, but {error.name} is not installed. Install what the "
            f"service needs: pip install 'phisam[service]'"
        ) from error


def _torchvision_names() -> list[str]:
    models = _torchvision()
    names = models.list_models(module=models)  # the classification models: not quantised, not detection
    return [f"{_TORCHVISION}{name}" for name in names]


def _unknown(name: str) -> ConfigError:
    short_names = {known: known.removeprefix(_TORCHVISION) for known in [*_OWN, *_torchvision_names()]}
    near = difflib.get_close_matches(name.removeprefix(_TORCHVISION), short_names.values())
    guesses = [known for known, short_name in short_names.items() if short_name in near]
    guess = f" Did you mean {' or '.join(guesses)}?" if guesses else ""
    return ConfigError(
        f"model.name = {name} is not known.{guess} Allowed: "
        f"{', '.join(_OWN)}, and torchvision/NAME for torchvision's classification models, e.g. torchvision/resnet50."
    )
