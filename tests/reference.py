"""Slow and obvious PyTorch versions of the operators: the tests' reference and the benchmarks' baseline."""

from collections.abc import Iterator
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
def plain_pytorch() -> Iterator[None]:
    """Inside this context ``mobilemamba``'s modules call these functions: the network in plain PyTorch."""
    from mobilemamba.models import layers, mrffi

    ours = (bidirectional_scan, haar_conv2d, depthwise_conv2d)
    native = [
        (module, f.__name__, getattr(module, f.__name__))
        for module in (layers, mrffi)
        for f in ours
        if hasattr(module, f.__name__)
    ]
    for module, name, _ in native:
        setattr(module, name, globals()[name])
    one_operator = layers.ConvNorm._trains_as_one
    layers.ConvNorm._trains_as_one = lambda self, x: False  # convolution and norm each by torch
    try:
        yield
    finally:
        layers.ConvNorm._trains_as_one = one_operator
        for module, name, function in native:
            setattr(module, name, function)
