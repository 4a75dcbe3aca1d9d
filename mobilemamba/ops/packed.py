"""Convolutions on packed weights: the product that all fused layers share."""

import torch
from torch import Tensor

from .. import _native  # noqa: F401  (registers the operators)

__all__ = ["pack_conv2d_weight", "packed_conv2d", "quantize_conv2d_weight"]


def pack_conv2d_weight(weight: Tensor) -> Tensor:
    """Packs the weight ``(out_channels, in_channels, k, k)`` of a convolution for :func:`packed_conv2d`.

    Returns:
        ``(ceil(out_channels / 32), ceil(in_channels * k * k / 2), 32, 2)``, filled up with zeros.
    """
    return torch.ops.mobilemamba.pack_conv2d_weight(weight)


def quantize_conv2d_weight(weight: Tensor, scale: float, zero_point: int) -> Tensor:
    """The weight ``(out_channels, in_channels, k, k)`` of a convolution in 8 bits, for inference on the CPU.

    It may stand wherever the operators take a packed weight. They then round their input, in float32 or 16 bits, to
    ``clamp(round(x / scale) + zero_point, 0, 255)``, multiply in 8 bits with exact int32 sums, and scale the sums back;
    bias, activation and residual stay in float32. The result has the same bits on every processor. NaN in the input
    counts as the smallest value. Gradients do not pass a product with such a weight.

    Args:
        weight: of a floating-point type, with at most 65536 inputs for each output. Each output has a scale of its own:
            the largest magnitude among its weights, over 127.
        scale, zero_point: of the input: it can have values from ``-zero_point * scale`` to ``(255 - zero_point) *
            scale``; those beyond count as the nearest of these. ``zero_point`` is 0 to 255.

    Returns:
        int8 ``(ceil(out_channels / 32), ceil(in_channels * k * k / 4) + 3, 32, 4)``.

    Raises:
        RuntimeError: an argument is out of its range, or an element of the weight is not finite.
    """
    return torch.ops.mobilemamba.quantize_conv2d_weight(weight, scale, zero_point)


def packed_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    kernel_size: int = 1,
    stride: int = 1,
    activation: str = "none",
) -> Tensor:
    """Convolution with bias, activation and residual: ``activation(conv(input) + bias) + residual``.

    It has zero padding of ``kernel_size // 2`` on every side. The weight has the memory order of the CPU kernel.

    Args:
        input: ``(batch, in_channels, height, width)`` with at least one channel; float16, bfloat16, float32 or
            float64, any strides. Channels-last, or a slice of its channels, is the fast layout; other layouts are
            copied to it first.
        weight: packed by :func:`pack_conv2d_weight`, in the dtype of ``input``; or quantized by
            :func:`quantize_conv2d_weight`.
        bias: ``(out_channels,)``, at least one, in the dtype of ``input``, or float32 beside a float16 or bfloat16
            ``input``.
        residual: added last; of the output's shape, in the dtype of ``input``.
        kernel_size: of the weight before packing, odd.
        stride: of the convolution, at least 1.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        ``(batch, out_channels, ceil(height / stride), ceil(width / stride))`` in the dtype of ``input``, channels-last
        in memory. Sums are kept in float32 (float64 for float64). Differentiable in every tensor argument;
        deterministic.

    Raises:
        RuntimeError: a shape, dtype, device, size or activation is not an expected one; the message names the argument
            and both values.
    """
    return torch.ops.mobilemamba.packed_conv2d(input, weight, bias, residual, kernel_size, stride, activation)
