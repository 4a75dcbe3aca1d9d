"""The scan without loops, for a fixed number of positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["recurrence"]


def recurrence(a: Tensor, b: Tensor, backward: bool) -> Tensor:
    """``h[t] = a[t] h[t - 1] + b[t]`` over the row-major positions of a map, from its first or its last position.

    The rows are scanned beside each other, column after column, from a state of zero. Then a scan over the rows' last
    states gives the state at the start of each row, which decays along the row. This takes about ``5 H W`` products
    per channel in ``3 W + 2 H`` operators of torch; doubling would take ``3 H W log2(H W)`` products.

    Args:
        a, b: ``(B, H, W, C)``.
        backward: ``h[t] = a[t] h[t + 1] + b[t]`` instead.

    Returns:
        h, ``(B, H, W, C)``.
    """
    height, width = a.size(1), a.size(2)
    columns = range(width - 1, -1, -1) if backward else range(width)
    decays: list[Tensor] = []  # (B, H, 1, C): the product of the row's factors up to each column
    states: list[Tensor] = []  # (B, H, 1, C): the row's states, from zero
    for column in columns:
        factor, added = _at(a, 2, column), _at(b, 2, column)
        if states:
            added = factor * states[-1] + added
            factor = factor * decays[-1]
        decays.append(factor)
        states.append(added)
    row_decay, row_state = decays[-1], states[-1]
    if backward:
        decays, states = decays[::-1], states[::-1]
    h = _joined(states, 2)
    if height == 1:
        return h
    rows = range(height - 1, 0, -1) if backward else range(height - 1)
    carries: list[Tensor] = []  # (B, 1, 1, C): the state at the end of each row but the last one
    for row in rows:
        carry = _at(row_state, 1, row)
        if carries:
            carry = _at(row_decay, 1, row) * carries[-1] + carry
        carries.append(carry)
    joined = _joined(carries[::-1] if backward else carries, 1)
    before = F.pad(joined, (0, 0, 0, 0, 0, 1) if backward else (0, 0, 0, 0, 1, 0))  # the first row starts with zero
    return _joined(decays, 2) * before + h


def _at(x: Tensor, dim: int, index: int) -> Tensor:
    """The slice of length 1. That of a whole tensor would be an alias in the graph, which XNNPACK does not take."""
    return x if x.size(dim) == 1 else x.narrow(dim, index, 1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
