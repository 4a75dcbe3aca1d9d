"""Images as sequences in two directions, for mixers that run along one."""

import torch
from torch import Tensor

__all__ = ["in_heads", "summed", "two_directions", "working"]


def working(x: Tensor) -> Tensor:
    """``x`` in the precision of the recurrences: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def in_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, C, H, W) -> (B, heads, H * W, C / heads)``, row by row."""
    return x.flatten(2).unflatten(1, [heads, -1]).transpose(2, 3)


def two_directions(x: Tensor) -> Tensor:
    """``(B, heads, L, d) -> (B, 2, heads, L, d)``: the sequence, and the sequence from its end."""
    return torch.stack([x, x.flip(2)], 1)


def summed(y: Tensor) -> Tensor:
    """``(B, 2, heads, L, d) -> (B, heads * d, L)``: the sum of both directions in the order of the first."""
    y = y[:, 0] + y[:, 1].flip(2)
    return y.transpose(2, 3).flatten(1, 2)
