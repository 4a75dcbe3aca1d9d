"""Augmentation: random changes of a training batch of uint8 images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training batch, drawn for each image. The same generator state gives the same changes.

    Args:
        flip: mirror each image with probability 1/2.
        crop: largest shift in pixels, in each direction; the border is filled with black.
        erase: probability that a rectangle of 2 % to 33 % of the image becomes noise (random erasing, arXiv
            1708.04896).
    """

    flip: bool = True
    crop: int = 2
    erase: float = 0.25

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changed copies of ``images``: uint8 ``(B, C, H, W)`` on the CPU -> uint8 ``(B, C, H, W)``."""
        batch, _, height, width = images.shape

        def uniform() -> Tensor:
            return torch.rand(batch, 1, generator=generator)

        rows, columns = torch.arange(height).expand(batch, -1), torch.arange(width).expand(batch, -1)
        if self.flip:
            columns = torch.where(uniform() < 0.5, columns.flip(1), columns)
        if self.crop:
            images = F.pad(images, (self.crop,) * 4)
            shifts = 2 * self.crop + 1
            rows = rows + (uniform() * shifts).long()
            columns = columns + (uniform() * shifts).long()
        if self.flip or self.crop:
            each = torch.arange(batch)[:, None, None]
            images = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.erase:
            area = (0.02 + 0.31 * uniform()) * height * width
            ratio = torch.exp((2 * uniform() - 1) * math.log(3))
            inside = span(height, (area * ratio).sqrt(), uniform())[:, :, None]
            inside = inside & span(width, (area / ratio).sqrt(), uniform())[:, None, :]
            inside &= uniform()[:, :, None] < self.erase
            noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator)
            images = torch.where(inside[:, None], noise, images)
        return images


def span(size: int, length: Tensor, place: Tensor) -> Tensor:
    """Masks ``(B, size)`` of runs along one dimension.

    Args:
        size: number of positions.
        length: positions of each run, ``(B, 1)``; rounded, at least 1 and at most ``size``.
        place: where each run starts, ``(B, 1)``: from 0 (first possible position) up to 1 (last one).
    """
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor()
    positions = torch.arange(size)
    return (positions >= start) & (positions < start + length)
