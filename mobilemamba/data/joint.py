"""Random changes of an image together with its boxes and masks, by torchvision, and the size of a segmenter's image."""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .mask_folder import IGNORED
from .preprocessing import to_tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DetectionTransform", "SegmentationTransform", "as_tensors", "fitted_size"]

Target = dict[str, Tensor]

MOST_OF_ONE_CLASS = 0.75  # of a random crop for segmentation; otherwise another place is tried (published)
PLACES = 10  # that are tried
LONGEST = 4  # longest side of a segmenter's image, as a multiple of its short side (published: 2048 for 512)


def libraries() -> tuple[Any, Any]:
    """The modules ``torchvision.tv_tensors`` and ``torchvision.transforms.v2``.

    Raises:
        ImportError: torchvision is missing.
    """
    try:
        from torchvision import tv_tensors
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit the torch
        raise ImportError(
            f"detection and segmentation need torchvision: pip install 'mobilemamba[downstream]' ({error})"
        ) from error
    return tv_tensors, v2


def as_tensors(image: "Image.Image", target: Target) -> tuple[Tensor, Target]:
    """The transform of an evaluation: the image as uint8 ``(3, H, W)``, the target as it is."""
    return to_tensor(image), target


@dataclass(frozen=True)
class DetectionTransform:
    """Random changes of an image and its objects. The defaults change nothing.

    The steps are torchvision's, in this order: change of colours; ``zoom_out``; crop that keeps some object; scale and
    crop; flip. If there is a step, objects whose box then has a side below one pixel are removed: those that a crop cut
    or a scale shrank, and those that were so small before.

    Args:
        flip: mirror with probability 1/2.
        photometric: brightness, contrast, saturation and hue, each with probability 1/2 (SSD's).
        iou_crop: with probability 1/2 put the image on a canvas of up to four times its sides, then take a random
            part in which an object is seen well enough (SSD, arXiv 1512.02325).
        scale: smallest and largest factor of a random resize, relative to the image fitted into a square of ``size``; a
            random crop of that square follows (large-scale jitter, arXiv 2012.07177). None: the size stays.
        size: side of that square in pixels.
    """

    flip: bool = False
    photometric: bool = False
    iou_crop: bool = False
    scale: tuple[float, float] | None = None
    size: int | None = None

    def __call__(self, image: "Image.Image", target: Target) -> tuple[Tensor, Target]:
        """From a PIL image in mode RGB and a target of :class:`CocoImages` to uint8 ``(3, H, W)`` and a target."""
        tv_tensors, v2 = libraries()
        pixels = to_tensor(image)
        steps: list[Any] = []
        if self.photometric:
            steps.append(v2.RandomPhotometricDistort(p=0.5))
        if self.iou_crop:
            fill = {tv_tensors.Image: [124, 116, 104], "others": 0}  # the mean of ImageNet
            steps += [v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop()]
        if self.scale:
            side = (self.size, self.size)
            steps += [v2.ScaleJitter(side, self.scale, antialias=True), v2.RandomCrop(side, pad_if_needed=True)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(0.5))
        if not steps:
            return pixels, target
        wrapped = {**target, "boxes": boxes_of(tv_tensors, target["boxes"], pixels)}
        if "masks" in target:
            wrapped["masks"] = tv_tensors.Mask(target["masks"])
        changed, found = v2.Compose([*steps, v2.SanitizeBoundingBoxes()])(tv_tensors.Image(pixels), wrapped)
        return plain(changed), {name: plain(value) for name, value in found.items()}


def boxes_of(tv_tensors: Any, boxes: Tensor, pixels: Tensor) -> Any:
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(pixels.shape[-2:]))


def plain(value: Tensor) -> Tensor:
    """An ordinary tensor, which other processes can read without torchvision."""
    return value.as_subclass(Tensor)


def fitted_size(height: int, width: int, short: int, scale: float = 1.0) -> tuple[int, int]:
    """The size of a segmenter's image: ``short`` pixels at its short side, at most four times as many at the long one.

    Args:
        scale: a factor of both limits.
    """
    factor = min(short / min(height, width), LONGEST * short / max(height, width)) * scale
    return max(1, round(height * factor)), max(1, round(width * factor))


@dataclass(frozen=True)
class SegmentationTransform:
    """Random changes of an image and its mask, or only the size of an evaluation.

    In training: resize by a random factor, random crop (up to ten places are tried, until no class has more than 75 %
    of the pixels that count), flip, change of colours. Pixels beyond the image are black, and their class is
    :data:`IGNORED`.

    Args:
        size: short side of the image in pixels, and side of the square crop.
        scale: smallest and largest factor of the random resize.
        flip, photometric: as of :class:`DetectionTransform`.
        training: False: resize the image only, and leave the mask as it is.
    """

    size: int
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    photometric: bool = False
    training: bool = True

    def __call__(self, image: "Image.Image", target: Target) -> tuple[Tensor, Target]:
        """From a PIL image in mode RGB and a target of :class:`MaskFolder` to uint8 ``(3, H, W)`` and a target."""
        _, v2 = libraries()
        functional = v2.functional
        pixels, mask = to_tensor(image), target["mask"]
        factor = random.uniform(*self.scale) if self.training else 1.0
        size = list(fitted_size(pixels.shape[1], pixels.shape[2], self.size, factor))
        if tuple(size) != tuple(pixels.shape[-2:]):
            pixels = functional.resize(pixels, size, antialias=True)
        if not self.training:
            return pixels, target
        if tuple(size) != tuple(mask.shape):
            mask = functional.resize(mask[None], size, interpolation=v2.InterpolationMode.NEAREST)[0]
        beyond = [max(0, self.size - side) for side in size]
        if any(beyond):
            pixels = functional.pad(pixels, [0, 0, beyond[1], beyond[0]])
            mask = functional.pad(mask[None], [0, 0, beyond[1], beyond[0]], fill=IGNORED)[0]
        for _ in range(PLACES):
            top, left = (random.randint(0, side - self.size) for side in mask.shape)
            part = mask[top : top + self.size, left : left + self.size]
            counts = part.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if int((counts > 0).sum()) > 1 and int(counts.max()) < MOST_OF_ONE_CLASS * int(counts.sum()):
                break
        pixels, mask = pixels[:, top : top + self.size, left : left + self.size], part
        if self.flip and random.random() < 0.5:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        if self.photometric:
            pixels = v2.RandomPhotometricDistort(p=0.5)(pixels)
        return pixels.contiguous(), {"mask": mask.contiguous()}
