"""A data set and its two parts, as training and evaluation see them: with a class or a target for each image."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from .image_files import describe_skipped
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["AnnotatedData", "AnnotatedSplit", "DataSet", "ImageSource", "InMemory", "Split"]


class ImageSource(Protocol):
    """Images for training or for testing."""

    def __len__(self) -> int: ...

    @property
    def skip(self) -> bool:
        """Whether bad images are named and skipped. Otherwise they are errors."""
        ...

    @property
    def bad(self) -> dict[int, str]:
        """What is wrong with each image that could not be read so far, by its index. These images were skipped."""
        ...

    def image(self, i: int) -> "Image.Image":
        """Image ``i``, decoded and upright, not resized.

        Raises:
            ValueError, OSError: it cannot be read; the message names the file.
        """
        ...

    def fingerprint(self) -> dict[str, list[Any]]:
        """For each group of images: their number, and a hash that changes with their names, order or labels."""
        ...


class Split(ImageSource, Protocol):
    """One part of a data set in which every image has a class."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 ``(N,)``."""
        ...


class AnnotatedSplit(ImageSource, Protocol):
    """One part of a data set in which every image has a target: boxes of objects, or a class for each pixel."""

    def target(self, i: int) -> dict[str, Tensor]:
        """The target of image ``i``: :class:`CocoImages` and :class:`MaskFolder` say what it has.

        Raises:
            ValueError, OSError: it is bad; the message names the file.
        """
        ...


class TwoParts:
    """What data sets of any kind have in common: the parts ``train`` and ``test``."""

    train: ImageSource
    test: ImageSource

    def fingerprint(self) -> dict[str, list[Any]]:
        """The fingerprints of both parts."""
        parts = {"train": self.train, "test": self.test}
        return {f"{part}/{key}": value for part in parts for key, value in parts[part].fingerprint().items()}

    def bad_images(self) -> set[str]:
        """What is wrong with each image that could not be read so far, and was skipped."""
        return {*self.train.bad.values(), *self.test.bad.values()}


@dataclass(frozen=True)
class DataSet(TwoParts):
    """A data set for training classifiers.

    Args:
        train, test: the two parts.
        labels: names of the classes.
        preprocessing: how a trained model prepares an image; its mean and std normalise the training images too.
        skipped: how many files are not part of the data set, by suffix.
    """

    train: Split
    test: Split
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    skipped: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """One line: the number of images and classes, the smallest class, the skipped files."""
        counts = torch.bincount(self.train.labels, minlength=len(self.labels))
        smallest = int(counts.argmin())
        parts = (
            f"{len(self.train.labels)} training images, {len(self.test.labels)} test images, {len(self.labels)} classes"
            f" (smallest: {self.labels[smallest]}, {counts[smallest]} training images)",
            describe_skipped(self.skipped),
        )
        return "; ".join(filter(None, parts))


@dataclass(frozen=True)
class AnnotatedData(TwoParts):
    """A data set for training detectors or segmenters.

    Args:
        train, test: the two parts.
        labels: names of the classes; those of objects are without the background.
        notes: a text for each thing that is left out, such as images without objects.
        category_ids: the data's own numbers of the classes, in the order of ``labels``.
    """

    train: AnnotatedSplit
    test: AnnotatedSplit
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    def describe(self) -> str:
        """One line: the number of images and classes, and what is left out."""
        counts = f"{len(self.train)} training images, {len(self.test)} test images, {len(self.labels)} classes"
        return "; ".join((counts, *self.notes))


@dataclass(frozen=True)
class InMemory:
    """Images in memory: ``pixels`` uint8 ``(N, C, H, W)`` with C = 1 or 3, ``labels`` int64 ``(N,)``."""

    pixels: Tensor
    labels: Tensor
    skip: ClassVar[bool] = False
    bad: ClassVar[dict[int, str]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> "Image.Image":
        from PIL import Image

        pixels = self.pixels[i]
        if len(pixels) not in (1, 3):
            raise ValueError(f"image {i}: expected 1 (grey) or 3 (RGB) channels, got {len(pixels)}")
        return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())

    def fingerprint(self) -> dict[str, list[Any]]:
        digest = hashlib.sha256(repr((list(self.pixels.shape), self.labels.tolist())).encode()).hexdigest()
        return {"all": [len(self.labels), digest]}
