"""What the steps are taken on: a network, a batch of random examples, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_jobs.config import ModelConfig
from ray_jobs.models import make_model

CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """A network by its name in `models.py`, and the batch that all workers share."""

    model: str
    image: tuple[int, ...]
    batch: int

    def make_model(self, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network of seed 0, in training mode."""
        channels, height, width = self.image
        return make_model(ModelConfig(name=self.model), (channels, height, width), CLASSES, seed=0).to(device, dtype)

    def examples(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Images (batch, *image) and labels: random, since no time depends on what they show. On the device."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, *self.image, generator=generator, dtype=dtype)
        return images.to(device), torch.randint(CLASSES, (self.batch,), generator=generator).to(device)


def workload(model: str, workers: int, batch: int | None = None, image: Sequence[int] | None = None) -> Workload:
    """The usual one of a network: its batch is larger where a step is so short that messages would drown it."""
    usual = {
        "mlp": Workload("mlp", (1, 28, 28), 128 if workers == 1 else 512),
        "convnet": Workload("convnet", (3, 32, 32), 128),
        "resnet18": Workload("resnet18", (3, 32, 32), 32),
    }.get(model, Workload(model, (3, 224, 224), 32))
    image = usual.image if image is None else tuple(image)
    return replace(usual, batch=usual.batch if batch is None else batch, image=image)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Forward pass and loss. Every step calls it by this name, so that `breakdown.py` can time it."""
    return cross_entropy(model(images), labels)
