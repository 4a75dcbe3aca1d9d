"""The native operators in standard ONNX operators: a ``custom_translation_table`` for ``torch.onnx.export``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import FLOAT, script
from onnxscript import opset18 as op

__all__ = ["TRANSLATIONS"]


@script()
def linear_recurrence(a: FLOAT[...], b: FLOAT[...]) -> FLOAT[...]:
    """h[t] = a[t] h[t - 1] + b[t] along the last dimension, by doubling: log2(length) steps without division."""
    axis = op.Constant(value_ints=[-1])
    zero = op.Constant(value_ints=[0])
    length = op.Shape(a, start=-1)
    shift = op.Constant(value_ints=[1])  # (a, b)[t] is the recurrence over this many positions up to t
    going = op.Squeeze(op.Less(shift, length))
    while going:
        before = op.Concat(shift, zero, axis=0)
        earlier_a = op.Pad(op.Slice(a, zero, length - shift, axis), before, None, axis)
        earlier_b = op.Pad(op.Slice(b, zero, length - shift, axis), before, None, axis)
        b = a * earlier_b + b
        a = a * earlier_a
        shift = shift + shift
        going = op.Squeeze(op.Less(shift, length))
    return b


def bidirectional_scan(u: Any, delta: Any, A_log: Any, B: Any, C: Any, D: Any, dt_weight: Any, dt_bias: Any) -> Any:
    """``ops.bidirectional_scan``; tensors inside are (batch, direction, channels, state, length)."""
    dt = op.Unsqueeze(op.Softplus(op.MatMul(dt_weight, delta) + op.Unsqueeze(dt_bias, ints(-1))), ints(3))
    decay = op.Exp(dt * op.Unsqueeze(op.Neg(op.Exp(A_log)), ints(-1)))
    added = dt * op.Unsqueeze(B, ints(2)) * op.Unsqueeze(u, ints(1, 3))
    h = turn_second(linear_recurrence(turn_second(decay), turn_second(added)))
    y = op.ReduceSum(h * op.Unsqueeze(C, ints(2)), ints(3), keepdims=0)
    return op.ReduceSum(y + op.Unsqueeze(D, ints(-1)) * op.Unsqueeze(u, ints(1)), ints(1), keepdims=0)


def turn_second(x: Any) -> Any:
    """``x`` with the sequence of the second direction reversed."""
    first, second = op.Split(x, axis=1, num_outputs=2)
    turned = op.Slice(second, ints(-1), ints(np.iinfo(np.int64).min), ints(-1), ints(-1))
    return op.Concat(first, turned, axis=1)


def depthwise_conv2d(
    input: Any, weight: Any, bias: Any = None, residual: Any = None, stride: int = 1, activation: str = "none"
) -> Any:
    y = convolution(input, weight, bias, stride)
    y = {"none": lambda: y, "relu": lambda: op.Relu(y), "silu": lambda: y * op.Sigmoid(y)}[activation]()
    return y if residual is None else y + residual


def haar_conv2d(input: Any, weight: Any) -> Any:
    bands = np.array([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]], np.float32) / 2
    channels = weight.shape[0] // 4
    filters = op.Constant(value=onnx.numpy_helper.from_array(np.tile(bands[:, None], (channels, 1, 1, 1))))
    size, axes = op.Shape(input, start=2), ints(2, 3)
    padded = op.Pad(input, op.Concat(ints(0, 0), op.Mod(size, ints(2)), axis=0), None, axes)
    subbands = convolution(op.Conv(padded, filters, group=channels, strides=[2, 2]), weight)
    return op.Slice(op.ConvTranspose(subbands, filters, group=channels, strides=[2, 2]), ints(0, 0), size, axes)


def convolution(input: Any, weight: Any, bias: Any = None, stride: int = 1) -> Any:
    return op.Conv(input, weight, bias, group=weight.shape[0], pads=[weight.shape[-1] // 2] * 4, strides=[stride] * 2)


def ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


#: For opset 18 and float32.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.mobilemamba.bidirectional_scan.default: bidirectional_scan,
    torch.ops.mobilemamba.depthwise_conv2d.default: depthwise_conv2d,
    torch.ops.mobilemamba.haar_conv2d.default: haar_conv2d,
}
