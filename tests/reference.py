"""PyTorch versions of the operators: slow and obvious ones, the tests' reference; and the scan without a loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def bidirectional_scan(
    u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor
) -> Tensor:
    """Position by position; ``mobilemamba.ops.bidirectional_scan`` has the formula."""
    dt = F.softplus(torch.einsum("kdr,bkrl->bkdl", dt_weight, delta) + dt_bias[None, :, :, None])
    A = -A_log.exp()
    batch, channels, length = u.shape
    rows = []
    for k in range(2):
        h = u.new_zeros(batch, channels, A_log.shape[2])
        ys: list[Tensor] = [u.new_zeros(0)] * length
        for t in range(length) if k == 0 else reversed(range(length)):
            step = dt[:, k, :, t, None]
            h = (step * A[k]).exp() * h + step * B[:, k, None, :, t] * u[:, :, t, None]
            ys[t] = (h * C[:, k, None, :, t]).sum(2) + D[k] * u[:, :, t]
        rows.append(torch.stack(ys, 2) if length else u.clone())
    return rows[0] + rows[1]


def doubling(a: Tensor, b: Tensor, backward: bool) -> Tensor:
    """``h[t] = a[t] h[t - 1] + b[t]``, or ``h[t + 1]``, over dim 1 of ``(B, L, C)``, in log2(L) vectorised steps.

    Each step joins every state with the one 1, 2, 4 ... positions before it. Differentiable.
    """
    length, distance = a.size(1), 1
    while distance < length:
        near, far, rest = slice(distance, None), slice(None, -distance), slice(None, distance)
        if backward:  # the later positions come before
            near, far, rest = far, near, slice(-distance, None)
        joined = torch.addcmul(b[:, near], a[:, near], b[:, far])
        b = torch.cat([joined, b[:, rest]] if backward else [b[:, rest], joined], 1)
        if 2 * distance < length:
            joined = a[:, near] * a[:, far]
            a = torch.cat([joined, a[:, rest]] if backward else [a[:, rest], joined], 1)
        distance *= 2
    return b


def doubling_scan(
    u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor
) -> Tensor:
    """``bidirectional_scan`` vectorised over positions by ``doubling``: what the benchmarks compare with."""
    x, A = u.transpose(1, 2), -A_log.exp()  # (B, L, D) inside
    total = (D[0] + D[1]) * x
    for k in range(2):
        dt = F.softplus(F.linear(delta[:, k].transpose(1, 2), dt_weight[k], dt_bias[k]))
        for n in range(A_log.shape[2]):
            b, c = B[:, k, n, :, None], C[:, k, n, :, None]
            total = total + doubling((dt * A[k, :, n]).exp(), dt * x * b, k == 1) * c
    return total.transpose(1, 2)


@cache
def haar_filters(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The four 2x2 analysis filters of each channel, ``(4 * channels, 1, 2, 2)``; cached, like a module's buffer."""
    bands = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
    with torch.inference_mode(False):
        return (torch.tensor(bands, dtype=dtype, device=device) / 2)[:, None].repeat(channels, 1, 1, 1)


def haar_conv2d(input: Tensor, weight: Tensor) -> Tensor:
    """Strided convolution, depthwise convolution, transposed convolution, each by torch."""
    _batch, channels, height, width = input.shape
    if input.numel() == 0:
        return input + weight.sum() * 0
    filters = haar_filters(channels, input.dtype, input.device)
    padded = F.pad(input, (0, width % 2, 0, height % 2))
    bands = F.conv2d(padded, filters, stride=2, groups=channels)
    bands = F.conv2d(bands, weight, padding=weight.shape[-1] // 2, groups=4 * channels)
    return F.conv_transpose2d(bands, filters, stride=2, groups=channels)[:, :, :height, :width]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    activation: str = "none",
) -> Tensor:
    """Convolution, activation and sum, each by torch."""
    batch, channels, height, width = input.shape
    if input.numel() == 0:
        arguments = [x for x in (input, weight, bias, residual) if x is not None]
        return input.new_zeros(batch, channels, -(-height // stride), -(-width // stride)) + sum(
            x.sum() * 0 for x in arguments
        )
    y = F.conv2d(input, weight, bias, stride, padding=weight.shape[-1] // 2, groups=channels)
    y = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}[activation](y)
    return y if residual is None else y + residual


@contextmanager
def plain_pytorch(scan: Callable[..., Tensor] = bidirectional_scan) -> Iterator[None]:
    """Inside this context ``mobilemamba``'s modules call these functions: the network in plain PyTorch."""
    from mobilemamba.models import global_part, layers

    ours = {"bidirectional_scan": scan, "haar_conv2d": haar_conv2d, "depthwise_conv2d": depthwise_conv2d}
    native = [
        (module, name, getattr(module, name))
        for module in (layers, global_part)
        for name in ours
        if hasattr(module, name)
    ]
    for module, name, _ in native:
        setattr(module, name, ours[name])
    one_operator = layers.ConvNorm._trains_as_one
    layers.ConvNorm._trains_as_one = lambda self, x: False  # convolution and norm each by torch
    try:
        yield
    finally:
        layers.ConvNorm._trains_as_one = one_operator
        for module, name, function in native:
            setattr(module, name, function)
