"""Preprocessing: from an image file to the tensor that a model expects, with Pillow."""

import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Union, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "image_header", "open_image"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear")

ImageOrPath = Union["Image.Image", str, os.PathLike[str]]


def open_image(path: str | os.PathLike[str], content: bytes | None = None) -> "Image.Image":
    """Read a complete image file and turn the image upright, as its EXIF orientation says.

    The image keeps its colour mode. Its ``filename`` is the path.

    Args:
        content: the bytes of the image, if it is not a file of its own; ``path`` then is its name in messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, or it is damaged; the message names the file.
    """
    from PIL import Image, ImageOps

    with named_errors(path), Image.open(path if content is None else io.BytesIO(content)) as image:
        image.load()
        with suppress(SyntaxError):  # EXIF data that are none; of a JPEG file, Pillow ignores them itself
            ImageOps.exif_transpose(image, in_place=True)
        image.filename = os.fspath(path)
        return image


def image_header(path: str) -> tuple[tuple[int, int], str]:
    """Width and height of an image file when it is upright, and its colour mode, without decoding it.

    It takes about 0.1 ms if the file is in the page cache. Metadata that follow the pixels, which PNG allows, are not
    seen: where the size is not the expected one, :func:`open_image` has the last word.

    Raises: as :func:`open_image`.
    """
    from PIL import Image

    turned = False
    with named_errors(path), Image.open(path) as image:
        with suppress(SyntaxError):  # as in open_image; the method of PNG images would decode them
            turned = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)  # orientations that swap width and height
        return (image.height, image.width) if turned else image.size, image.mode


@contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make of every error in reading an image one that names its file (:func:`open_image`)."""
    from PIL import Image

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such image file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: expected an image, got a folder") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}: expected an image, got a file of no known image format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, DecompressionBombError, EOFError ...
        raise ValueError(f"{path}: not a readable image: {error}") from error


@dataclass(frozen=True)
class Preprocessing:
    """How a model expects its images: the short side resized, the centre cropped, the channels normalised.

    Args:
        resize: short side in pixels after resizing; the aspect ratio is kept.
        crop: side of the centre square in pixels, from 1 to ``resize``.
        mean, std: for each channel, of values from 0 to 1. Three values mean RGB, one means grey. Image files cannot be
            read into another number of channels; :meth:`normalize` works with any.
        interpolation: ``"bicubic"`` or ``"bilinear"``, antialiased.

    Raises:
        ValueError: a field is out of its range.
    """

    resize: int
    crop: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if type(self.crop) is not int or type(self.resize) is not int:
            raise ValueError(f"expected resize and crop in whole pixels, got {self.resize!r} and {self.crop!r}")
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"expected a crop of 1 to resize={self.resize} pixels, got {self.crop}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"expected mean and std with a value for each channel, got {self.mean} and {self.std}")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"expected a positive std, got {self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"expected a finite mean, got {self.mean}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected {' or '.join(INTERPOLATIONS)}, got '{self.interpolation}'")

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return len(self.mean)

    def check_channels(self, expected: int) -> None:
        """Refuse a model's ``expected`` channels that are not these.

        Raises:
            ValueError: the numbers differ.
        """
        if self.channels != expected:
            raise ValueError(
                f"preprocessing: expected mean and std with {expected} values, one for each channel of the model's "
                f"images, got {self.channels}"
            )

    def transforms(self) -> Callable[[ImageOrPath], Tensor]:
        """A function from a PIL image or its path to a normalised float32 tensor ``(channels, crop, crop)``.

        The results equal those of torchvision's ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` on PIL
        images: the published models are evaluated with these. A path is opened by :func:`open_image`, which turns the
        image upright; a PIL image is not turned. Every colour mode becomes RGB, or grey if the model has one channel.
        Transparency is dropped, and 16 bits are reduced to 8. If one side is longer than 16 times the other, only the
        centre is used: the memory for the resized image would have no bound.

        The function raises ValueError for an image that cannot be read or converted, FileNotFoundError for a path
        without a file, and TypeError for anything else.

        Raises:
            ValueError: the model has neither 1 nor 3 channels.
        """
        self._check_files()
        return self._normalized

    def pixels(self) -> Callable[[ImageOrPath], Tensor]:
        """Like :meth:`transforms` without normalisation: the function returns uint8 ``(channels, crop, crop)``."""
        self._check_files()
        return self._pixels

    def convert(self, image: "Image.Image") -> "Image.Image":
        """``image`` in mode RGB, or L for one channel, 8 bits per channel.

        Raises:
            ValueError: there is no such conversion.
        """
        return to_mode(image, "RGB" if self.channels == 3 else "L")

    def fit(self, image: "Image.Image") -> "Image.Image":
        """``image`` converted, resized and cropped, as :meth:`pixels` does it.

        Raises:
            ValueError: the image cannot be converted, or has no pixels.
        """
        from PIL import Image

        image = self.convert(image)
        image = centre(image, *(min(side, 16 * min(image.size)) for side in image.size))
        short = min(image.size)
        if short < 1:
            raise ValueError(f"image: expected at least one pixel, got {image.width} x {image.height}")
        size = (int(self.resize * image.width / short), int(self.resize * image.height / short))
        return centre(image.resize(size, Image.Resampling[self.interpolation.upper()]), self.crop, self.crop)

    def normalize(self, pixels: Tensor) -> Tensor:
        """``(pixels / 255 - mean) / std`` for each channel: uint8 ``(..., channels, H, W)`` -> float32."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.float().mul_(1 / (255 * std)).sub_(mean / std)  # one product instead of two divisions

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Any) -> "Preprocessing":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field is unknown, missing or out of its range.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"preprocessing: expected the fields of Preprocessing, got {fields!r:.200}") from error

    def _check_files(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"image files are read into 1 (grey) or 3 (RGB) channels; the model takes {self.channels}")

    def _normalized(self, image: ImageOrPath) -> Tensor:
        return self.normalize(self._pixels(image))

    def _pixels(self, image: ImageOrPath) -> Tensor:
        from PIL import Image

        if isinstance(image, (str, os.PathLike)):
            path, image = image, open_image(image)
            try:
                return self._pixels(image)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        if not isinstance(image, Image.Image):
            raise TypeError(f"image: expected a PIL image or a path, got {type(image).__name__}")
        return to_tensor(self.fit(image))


def to_tensor(image: "Image.Image") -> Tensor:
    """uint8 ``(C, H, W)`` of an image in mode RGB or L."""
    planes = bytearray().join(band.tobytes() for band in image.split())  # a third of the time of torch's permutation
    return torch.frombuffer(planes, dtype=torch.uint8).view(-1, image.height, image.width)


def centre(image: "Image.Image", width: int, height: int) -> "Image.Image":
    """The centre rectangle of an image, rounded as torchvision does; the image itself if it has this size."""
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def to_mode(image: "Image.Image", mode: str) -> "Image.Image":
    """``image`` in ``mode``: ``"RGB"`` or ``"L"``, 8 bits per channel."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # 16 bits: convert("L") would clip them to 255
        image = image.convert("I")
        low, high = cast("tuple[int, int]", image.getextrema())  # one channel
        if low < 0 or high > 65535:
            raise ValueError(f"image: expected 8 or 16 bits per channel, got values from {low} to {high}")
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "F":
        raise ValueError("image: expected 8 or 16 bits per channel, got floating point of unknown range")
    if "transparency" in image.info:  # it is dropped; Pillow would warn about some kinds
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ValueError(f"image: no conversion from mode {image.mode} to {mode}") from error
