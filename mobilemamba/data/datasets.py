"""Data sets for training, read without torchvision.

Images are uint8 tensors ``(N, C, H, W)``, which :meth:`Preprocessing.normalize` turns into floating point. Labels are
int64 tensors ``(N,)``.
"""

import gzip
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .preprocessing import Preprocessing

__all__ = ["DataSet", "Split", "fashion_mnist_dir", "load", "read_idx"]

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts the files
FASHION_MNIST_LABELS = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FASHION_MNIST_PREPROCESSING = Preprocessing(resize=28, crop=28, mean=(0.286,), std=(0.353,))
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Split(Protocol):
    """One part of a data set, for training or for testing."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 ``(N,)``."""
        ...

    def images(self, index: Tensor) -> Tensor:
        """The images at ``index`` ``(B,)`` as uint8 ``(B, C, H, W)``."""
        ...


@dataclass(frozen=True)
class DataSet:
    """A data set for training.

    Args:
        train, test: the two parts.
        labels: names of the classes.
        preprocessing: how a trained model prepares an image; its mean and std normalise the training images too.
    """

    train: Split
    test: Split
    labels: tuple[str, ...]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class InMemory:
    """Images in memory: ``pixels`` uint8 ``(N, C, H, W)``, ``labels`` int64 ``(N,)``."""

    pixels: Tensor
    labels: Tensor

    def images(self, index: Tensor) -> Tensor:
        return self.pixels[index]


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded on demand, then resized and cropped as ``preprocessing`` says."""

    paths: list[Path]
    labels: Tensor
    preprocessing: Preprocessing

    def images(self, index: Tensor) -> Tensor:
        pixels = self.preprocessing.pixels()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow decodes without the GIL
            return torch.stack(list(pool.map(lambda i: pixels(self.paths[i]), index.tolist())))


def load(spec: str, image_size: int | None = None) -> DataSet:
    """Open a data set by its name on the command line.

    Args:
        spec: ``fashion-mnist`` or ``fashion-mnist:DIR`` (the four idx files), ``folder:DIR`` (class folders of images
            under ``train`` and ``val``), or ``digits`` (scikit-learn's 8x8 digits).
        image_size: height and width in pixels for ``folder`` (default: 224); the other data sets have a fixed size.

    Raises:
        ValueError: an unknown name, a damaged file, or an image size for a data set that has its own.
        FileNotFoundError: a file or folder is missing.
    """
    name, _, where = spec.partition(":")
    if name == "folder" and where:
        return load_folder(Path(where), image_size or 224)
    if image_size is not None:
        raise ValueError(f"an image size is for folder:DIR only, got {image_size} with data '{spec}'")
    if name == "fashion-mnist":
        return load_fashion_mnist(Path(where) if where else fashion_mnist_dir())
    if spec == "digits":
        return load_digits()
    raise ValueError(f"unknown data '{spec}'; expected fashion-mnist[:DIR], folder:DIR or digits")


def fashion_mnist_dir() -> Path:
    """The folder of Fashion-MNIST: ``$MOBILEMAMBA_FASHION_MNIST``, or the folder of Debian's package."""
    return Path(os.environ.get("MOBILEMAMBA_FASHION_MNIST") or FASHION_MNIST_DIR)


def load_fashion_mnist(root: Path) -> DataSet:
    """Fashion-MNIST in ``root``: 60,000 grey training images and 10,000 test images of 28x28 pixels, ten classes."""

    def read(part: str) -> InMemory:
        images = read_idx(find_idx(root, f"{part}-images-idx3-ubyte"))
        labels = read_idx(find_idx(root, f"{part}-labels-idx1-ubyte")).long()
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{root}: expected '{part}' images (N, H, W) with labels (N,), "
                f"got {tuple(images.shape)} with {tuple(labels.shape)}"
            )
        if len(labels) and int(labels.max()) >= len(FASHION_MNIST_LABELS):
            raise ValueError(f"{root}: expected '{part}' labels from 0 to 9, got {int(labels.max())}")
        return InMemory(images.unsqueeze(1), labels)

    return DataSet(read("train"), read("t10k"), FASHION_MNIST_LABELS, FASHION_MNIST_PREPROCESSING)


def find_idx(root: Path, stem: str) -> Path:
    """The file ``stem`` or ``stem.gz`` in ``root``."""
    for path in (root / f"{stem}.gz", root / stem):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{root}: no {stem}.gz or {stem}; expected the four files of Fashion-MNIST: install Debian's package "
        "dataset-fashion-mnist, or name their folder with fashion-mnist:DIR or MOBILEMAMBA_FASHION_MNIST"
    )


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes as a uint8 tensor. A name that ends with ``.gz`` means a gzipped file.

    Format: two zero bytes, type (8: unsigned byte), number of dimensions, big-endian uint32 sizes, data.

    Raises:
        ValueError: the file is damaged or holds another type.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a complete gzip file, got a damaged one: {error}") from error
    dims = raw[3] if len(raw) >= 4 else 0
    start = 4 + 4 * dims
    if raw[:3] != b"\0\0\x08" or dims == 0 or len(raw) < start:
        raise ValueError(f"{path}: expected an idx file of unsigned bytes, got one that begins with {raw[:4]!r}")
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes for the shape {shape}, got {len(raw) - start}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[start:].reshape(shape)


def load_folder(root: Path, size: int) -> DataSet:
    """RGB images of ``size`` pixels from ``root/train/CLASS/`` and ``root/val/CLASS/``; labels are the folder names."""
    names = tuple(sorted(path.name for path in subfolders(root / "train")))
    if not names:
        raise ValueError(f"{root / 'train'}: expected one folder of images for each class, got no folder")
    extra = sorted({path.name for path in subfolders(root / "val")} - set(names))
    if extra:
        raise ValueError(f"{root / 'val'}: expected only classes of {root / 'train'}, got {', '.join(extra)}")
    preprocessing = Preprocessing(resize=int(size / 0.875), crop=size)

    def find(part: str) -> ImageFiles:
        files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((root / part / name).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files:
            raise ValueError(f"{root / part}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none")
        labels = torch.tensor([label for _, label in files])
        return ImageFiles([path for path, _ in files], labels, preprocessing)

    return DataSet(find("train"), find("val"), names, preprocessing)


def subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with one folder of images for each class, got nothing")
    return [path for path in folder.iterdir() if path.is_dir()]


def load_digits() -> DataSet:
    """scikit-learn's digits: 1,797 grey images of 8x8 pixels. A fixed fifth of them is the test part."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("data 'digits' needs scikit-learn: pip install scikit-learn") from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images * 15).to(torch.uint8).unsqueeze(1)  # 0 .. 16 -> 0 .. 240
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = (InMemory(images[index], labels[index]) for index in order.tensor_split([len(labels) * 4 // 5]))
    preprocessing = Preprocessing(resize=8, crop=8, mean=(0.3,), std=(0.35,))
    return DataSet(train, test, tuple(str(digit) for digit in range(10)), preprocessing)
