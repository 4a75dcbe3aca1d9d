"""Opens data sets by name, without torchvision: Fashion-MNIST, folders of images, scikit-learn's digits."""

import gzip
import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .folder import load_folder
from .preprocessing import Preprocessing
from .splits import DataSet, InMemory

__all__ = ["fashion_mnist_dir", "load", "read_idx"]

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts the files
FASHION_MNIST_LABELS = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FASHION_MNIST_PREPROCESSING = Preprocessing(resize=28, crop=28, mean=(0.286,), std=(0.353,))
ON_BAD_IMAGE = ("fail", "skip")


def load(spec: str, image_size: int | None = None, on_bad_image: str = "fail") -> DataSet:
    """Open a data set by its name on the command line.

    Args:
        spec: ``fashion-mnist`` or ``fashion-mnist:DIR`` (the four idx files), ``folder:DIR`` (images in
            ``train/CLASS`` and ``val/CLASS``, at any depth), or ``digits`` (scikit-learn's 8x8 digits). A ``~`` at the
            start of DIR means the home folder.
        image_size: height and width in pixels for ``folder`` (default: 224); the other data sets have a fixed size.
        on_bad_image: what to do with a file in ``folder`` that is not a complete image. ``"fail"``: raise; the ends of
            all files are checked here, damage inside is found when the image is used. ``"skip"``: name the file once on
            stderr and go on without it.

    Raises:
        ValueError: an unknown name, a damaged file, a class without images, or an image size for a data set that has
            its own.
        FileNotFoundError: a file or folder is missing.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"on_bad_image: expected {' or '.join(ON_BAD_IMAGE)}, got '{on_bad_image}'")
    if "://" in spec:
        raise ValueError(f"data: expected a name or folder:DIR, got an address: download it first ({spec})")
    name, _, where = spec.partition(":")
    folder = Path(os.path.expanduser(where))
    if name == "folder" and where:
        return load_folder(folder, image_size or 224, skip=on_bad_image == "skip")
    if name != "fashion-mnist" and spec != "digits":
        hint = f"did you mean folder:{spec}? " if spec and Path(os.path.expanduser(spec)).is_dir() else ""
        raise ValueError(f"unknown data '{spec}'; {hint}expected fashion-mnist[:DIR], folder:DIR or digits")
    if image_size is not None:
        raise ValueError(f"an image size is for folder:DIR only, got {image_size} with data '{spec}'")
    return load_digits() if spec == "digits" else load_fashion_mnist(folder if where else fashion_mnist_dir())


def fashion_mnist_dir() -> Path:
    """The folder of Fashion-MNIST: ``$MOBILEMAMBA_FASHION_MNIST``, or the folder of Debian's package."""
    return Path(os.path.expanduser(os.environ.get("MOBILEMAMBA_FASHION_MNIST") or FASHION_MNIST_DIR))


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
