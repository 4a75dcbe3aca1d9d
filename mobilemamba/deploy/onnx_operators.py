"""The native operators in standard ONNX operators: a ``custom_translation_table`` for ``torch.onnx.export``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import BOOL, FLOAT, INT64, graph, script
from onnxscript import opset18 as op

__all__ = ["TRANSLATIONS"]


DOUBLINGS = [2**power for power in range(63)]
TRUE = onnx.numpy_helper.from_array(np.array(True))
INT64_TYPE = onnx.TensorProto.INT64


@script()
def recurrences(a: FLOAT[...], b: FLOAT[...]) -> FLOAT[...]:
    """Both directions of the scan's states, (batch, direction, channels, state, length).

    h[t] = a[t] h[t - 1] + b[t] in the first direction, h[t] = a[t] h[t + 1] + b[t] in the second, by doubling:
    log2(length) steps without division.

    OpenVINO and ONNX Runtime's shape inference need the trip count and the condition of a loop, the pads of all
    dimensions and the value of a padding, and shapes that they can follow.
    """
    axis = op.Constant(value_ints=[-1])
    start = op.Constant(value_ints=[0])
    others = op.Constant(value_ints=[0, 0, 0, 0])
    zero = op.Constant(value_float=0.0)
    length = op.Shape(a, start=-1)
    steps = op.ReduceSum(op.Cast(op.Less(op.Constant(value_ints=DOUBLINGS), length), to=INT64_TYPE), start, keepdims=0)

    @graph()
    def double(
        step: INT64,
        going: BOOL,
        a_first: FLOAT[...],
        b_first: FLOAT[...],
        a_second: FLOAT[...],
        b_second: FLOAT[...],
        shift: INT64[1],
    ):
        # (a, b)[t] is the recurrence over `shift` positions up to t
        shape = op.Shape(a_first)
        before = op.Concat(others, shift, others, start, axis=0)
        a_before = op.Reshape(op.Pad(op.Slice(a_first, start, length - shift, axis), before, zero), shape)
        b_before = op.Reshape(op.Pad(op.Slice(b_first, start, length - shift, axis), before, zero), shape)
        behind = op.Concat(others, start, others, shift, axis=0)
        a_behind = op.Reshape(op.Pad(op.Slice(a_second, shift, length, axis), behind, zero), shape)
        b_behind = op.Reshape(op.Pad(op.Slice(b_second, shift, length, axis), behind, zero), shape)
        still_going = op.Identity(going)
        return (
            still_going,
            a_first * a_before,
            a_first * b_before + b_first,
            a_second * a_behind,
            a_second * b_behind + b_second,
            shift + shift,
        )

    a_1, a_2 = op.Split(a, axis=1, num_outputs=2)
    b_1, b_2 = op.Split(b, axis=1, num_outputs=2)
    going = op.Constant(value=TRUE)
    _, h_1, _, h_2, _ = op.Loop(steps, going, a_1, b_1, a_2, b_2, op.Constant(value_ints=[1]), body=double)
    return op.Concat(h_1, h_2, axis=1)


def bidirectional_scan(u: Any, delta: Any, A_log: Any, B: Any, C: Any, D: Any, dt_weight: Any, dt_bias: Any) -> Any:
    """``ops.bidirectional_scan``; tensors inside are (batch, direction, channels, state, length)."""
    dt = op.Unsqueeze(op.Softplus(op.MatMul(dt_weight, delta) + op.Unsqueeze(dt_bias, ints(-1))), ints(3))
    decay = op.Exp(dt * op.Unsqueeze(op.Neg(op.Exp(A_log)), ints(-1)))
    added = dt * op.Unsqueeze(B, ints(2)) * op.Unsqueeze(u, ints(1, 3))
    y = op.ReduceSum(recurrences(decay, added) * op.Unsqueeze(C, ints(2)), ints(3), keepdims=0)
    return op.ReduceSum(y + op.Unsqueeze(D, ints(-1)) * op.Unsqueeze(u, ints(1)), ints(1), keepdims=0)


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
    pads = op.Concat(ints(0, 0, 0, 0, 0, 0), op.Mod(size, ints(2)), axis=0)
    padded = op.Pad(input, pads, op.Constant(value_float=0.0))
    subbands = convolution(op.Conv(padded, filters, group=channels, strides=[2, 2]), weight)
    image = op.Slice(op.ConvTranspose(subbands, filters, group=channels, strides=[2, 2]), ints(0, 0), size, axes)
    return op.Reshape(image, op.Shape(input))


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
