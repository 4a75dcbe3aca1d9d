"""The effective receptive field: which pixels the centre of the last feature map depends on, and how much.

Source: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (arXiv
1701.04128).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SHARES", "Square", "effective_receptive_field", "square_that_holds"]

SHARES = (0.2, 0.5, 0.99)  # of the gradient, that are stated


@dataclass(frozen=True)
class Square:
    """A square around the centre of a field.

    Args:
        first: its first row and column.
        side: its height and width in pixels.
        area: its share of the field's area, from 0 to 1.
    """

    first: int
    side: int
    area: float


def effective_receptive_field(features: Callable[[Tensor], Tensor], images: Iterable[Tensor]) -> Tensor:
    """The mean absolute gradient of the feature map's centre with respect to the pixels.

    The centre of a map ``(B, C, h, w)`` is the position ``(h // 2, w // 2)``. Its channels, after a ReLU, are summed.
    The gradient is with respect to the normalised pixels, its absolute values are summed over the image's channels and
    averaged over the images.

    Args:
        features: from images to the map.
        images: batches ``(B, channels, H, W)`` of one size.

    Returns:
        float64 ``(H, W)`` on the CPU.

    Raises:
        ValueError: there are no images, the map is not of four dimensions, or no pixel has a gradient.
        FloatingPointError: the gradient is not finite.
    """
    total, count = torch.zeros(()), 0
    for batch in images:
        pixels = batch.detach().requires_grad_()
        with torch.enable_grad():
            maps = features(pixels)
            if maps.dim() != 4:
                raise ValueError(f"features: expected a map of shape (batch, C, H, W), got {list(maps.shape)}")
            centre = maps[:, :, maps.size(2) // 2, maps.size(3) // 2].relu().sum()
            (gradient,) = torch.autograd.grad(centre, pixels)
        total = total + gradient.abs().double().sum((0, 1)).cpu()
        count += len(batch)
    if not count:
        raise ValueError("images: expected at least one, got none")
    if not total.isfinite().all():
        raise FloatingPointError("expected a finite gradient of the feature map's centre, got another one")
    if not total.any():
        raise ValueError("expected a gradient of the feature map's centre, got zero for each pixel of each image")
    return total / count


def square_that_holds(field: Tensor, share: float) -> Square:
    """The smallest centred square that holds ``share`` of the sum of a field ``(H, H)``.

    The centre is the pixel ``(H // 2, H // 2)``. A square with an even side has one more row above than below it.

    Raises:
        ValueError: the field is not a square, or ``share`` is not above 0 and at most 1.
    """
    if field.dim() != 2 or field.size(0) != field.size(1):
        raise ValueError(f"field: expected a square of shape (H, H), got {list(field.shape)}")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0 and at most 1, got {share}")
    whole = len(field)
    sums = torch.zeros(whole + 1, whole + 1, dtype=torch.float64)
    sums[1:, 1:] = field.double().cumsum(0).cumsum(1)  # sums[i, j]: of the first i rows and j columns
    for side in range(1, whole + 1):
        first = whole // 2 - side // 2
        end = first + side
        held = sums[end, end] - sums[first, end] - sums[end, first] + sums[first, first]
        if held >= share * sums[-1, -1] * (1 - 1e-12):  # up to the rounding of the sums
            break
    return Square(first, side, side**2 / whole**2)
