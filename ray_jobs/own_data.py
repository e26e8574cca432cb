"""The examples that a user's `data: my_pkg.data:load` returns, checked and as `sources.py` has them.

    load(seed, **options) -> (train, test) or (train, validation, test), each a pair (images, labels)

images: (N, C, H, W) uint8, as stored and not normalised; labels: (N,) integers 0 ... C - 1, each of them in train.
Both are numpy arrays or torch tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ray_jobs.config import DataConfig
from ray_jobs.user_code import OwnFunction, data_function

PARTS = {2: ("train", "test"), 3: ("train", "validation", "test")}
PAIRS = (
    "it must return (train, test) or (train, validation, test), each a pair (images, labels): images uint8 "
    "(N, C, H, W), labels integers (N,)"
)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class OwnExamples(NamedTuple):
    """parts: "train", "test" and, if there is one, "validation" -> images (N, C, H, W) uint8, labels (N,) int64."""

    parts: dict[str, tuple[Tensor, Tensor]]
    num_classes: int


class Sizes(NamedTuple):
    """What is known of a data set without holding it. validation: its examples, None where it is cut from train."""

    train: int
    validation: int | None
    input_shape: tuple[int, int, int]
    num_classes: int


def load(config: DataConfig, seed: int) -> OwnExamples:
    """What the user's function returns.

    Raises:
        ConfigError: it returns something else.
    """
    function = data_function(config)
    returned = function.call(seed, seed)
    names = PARTS.get(len(returned)) if isinstance(returned, tuple | list) else None
    if names is None or not all(isinstance(part, tuple | list) and len(part) == 2 for part in returned):
        raise function.refused(f"{PAIRS}; it returned {_kind(returned)}")
    parts = {name: _examples(function, name, *part) for name, part in zip(names, returned, strict=True)}
    shapes = {name: tuple(images.shape[1:]) for name, (images, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise function.refused(f"all images must have one shape (C, H, W), not {told}")
    return OwnExamples(parts, _classes(function, parts))


@lru_cache(maxsize=64)
def sizes(description: str, seed: int) -> Sizes:
    """Of the data of a DataConfig, given as JSON. It is loaded once in a process.

    Raises:
        ConfigError: as `load`.
    """
    parts, num_classes = load(DataConfig.model_validate_json(description), seed)
    images = parts["train"][0]
    validation = len(parts["validation"][0]) if "validation" in parts else None
    channels, height, width = images.shape[1:]
    return Sizes(len(images), validation, (channels, height, width), num_classes)


def _examples(function: OwnFunction, part: str, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    images, labels = (
        _tensor(function, f"the images of {part}", images),
        _tensor(function, f"the labels of {part}", labels),
    )
    if images.dtype != torch.uint8:
        hint = " Scale them to 0 ... 255 and round" if images.is_floating_point() else ""
        raise function.refused(
            f"the images of {part} are {_dtype(images)}, and must be uint8: pixels of 0 to 255, as stored. The service "
            f"normalises them by the training set's mean and standard deviation.{hint}"
        )
    if images.dim() != 4 or not images.numel():
        hint = "; for grey images: images[:, None]" if images.dim() == 3 else ""
        raise function.refused(f"the images of {part} are {tuple(images.shape)}, and must be (N, C, H, W){hint}")
    if labels.dtype not in INTEGERS or labels.dim() != 1:
        raise function.refused(
            f"the labels of {part} are {_dtype(labels)} {tuple(labels.shape)}, and must be integers (N,): the number "
            "of the class"
        )
    if len(images) != len(labels):
        raise function.refused(f"{part} has {len(images)} images and {len(labels)} labels: needed is one an image")
    return images.contiguous(), labels.long().contiguous()


def _classes(function: OwnFunction, parts: dict[str, tuple[Tensor, Tensor]]) -> int:
    trained = torch.unique(parts["train"][1]).tolist()
    num_classes = len(trained)
    if trained != list(range(num_classes)) or num_classes < 2:
        absent = sorted(set(range(max(trained) + 1)) - set(trained))
        told = f"; {absent[0]} is not there" if absent else ""
        raise function.refused(
            f"the labels of train go from {min(trained)} to {max(trained)} and are {num_classes} different ones{told}. "
            "They must be 0, 1, ... without a gap, two at least; numpy.unique(labels, return_inverse=True)[1] does that"
        )
    for part, (_, labels) in parts.items():
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise function.refused(
                f"the labels of {part} go from {int(labels.min())} to {int(labels.max())}, but train has the classes "
                f"0 to {num_classes - 1} alone"
            )
    return num_classes


def _tensor(function: OwnFunction, what: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if not isinstance(values, np.ndarray | Sequence) or isinstance(values, str):
        raise function.refused(f"{what} are {_kind(values)}; {PAIRS}, as numpy arrays or torch tensors")
    try:
        return torch.from_numpy(np.ascontiguousarray(values))
    except (TypeError, ValueError):
        raise function.refused(f"{what} are of a kind that torch has no tensors of: {_kind(values)}") from None


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(part).__name__ for part in value[:4])}"
    return type(value).__name__


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
