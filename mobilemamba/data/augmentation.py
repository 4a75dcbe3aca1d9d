"""Augmentation of a training batch: random changes of whole batches of uint8 images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training batch, each image on its own; reproducible from the generator.

    Args:
        flip: mirror half of the images.
        crop: shift by up to this many pixels in each direction, black coming in.
        erase: probability of a rectangle of noise, of 2 % to 33 % of the area (random erasing, arXiv 1708.04896).
    """

    flip: bool = True
    crop: int = 2
    erase: float = 0.25

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 ``(B, C, H, W)`` -> the same."""
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
    """Which of ``size`` positions a run of ``length`` covers, at the share ``place`` of the room; ``(B, size)``."""
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor()
    positions = torch.arange(size)
    return (positions >= start) & (positions < start + length)
