"""What the operators cost, for ``torch.utils.flop_counter.FlopCounterMode``, which cannot see inside them.

A formula takes the shapes of an operator's arguments, and ``out_shape``, and returns floating-point operations. As in
the counter's own formulas, a multiplication and the addition after it count two, and activations, biases and norms
count nothing. A formula counts the operator's definition, not what a kernel repeats or saves, so a model costs the same
however it is computed. A backward pass counts twice the forward pass: each product has a gradient for both factors.
Every operator with a kernel needs a formula; the others are counted by the operators that they call. ``counting``
imports this module when the counter is imported.
"""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import _native  # noqa: F401  (registers the operators)
from .operators import MRFFI_WEIGHTS

__all__: list[str] = []

Shape = list[int]
NATIVE = torch.ops.mobilemamba


@register_flop_formula(NATIVE.bidirectional_scan)
def scan(u: Shape, delta: Shape, A_log: Shape, *_: Any, out_shape: Any = None) -> int:
    rank, states = delta[2], A_log[2]
    # dt from R rows; for each state dt * A, dt * u * B, the recurrence and C * h; and once dt * u and D * u
    return 2 * 2 * prod(u) * (rank + 4 * states + 2)


@register_flop_formula(NATIVE.bidirectional_scan_backward)
def scan_backward(grad_y: Shape, u: Shape, delta: Shape, A_log: Shape, *_: Any, out_shape: Any = None) -> int:
    return 2 * scan(u, delta, A_log)


def haar(image: Shape, kernel: int) -> int:
    batch, channels, height, width = image
    coefficients = 4 * batch * channels * ((height + 1) // 2) * ((width + 1) // 2)
    return 2 * coefficients * (kernel**2 + 4 + 4)  # two transforms with four terms for each coefficient


@register_flop_formula(NATIVE.haar_conv2d)
def haar_conv2d(input: Shape, weight: Shape, out_shape: Any = None) -> int:
    return haar(input, weight[3])


@register_flop_formula(NATIVE.haar_conv2d_backward_weight)
def haar_conv2d_backward_weight(grad_output: Shape, input: Shape, kernel_size: int, out_shape: Any = None) -> int:
    return haar(input, kernel_size)


@register_flop_formula(NATIVE.depthwise_conv2d)
def depthwise_conv2d(input: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


@register_flop_formula(NATIVE.depthwise_conv2d_backward)
def depthwise_conv2d_backward(grad_output: Shape, input: Shape, weight: Shape, *_: Any, out_shape: Any = None) -> int:
    return 2 * depthwise_conv2d(input, weight, out_val=grad_output)  # type: ignore[call-arg]


@register_flop_formula(NATIVE.conv_norm)
def conv_norm(input: Shape, weight: Shape, *_: Any, out_shape: list[Shape], **__: Any) -> int:
    return 2 * prod(out_shape[0]) * prod(weight[1:])


@register_flop_formula(NATIVE.conv_norm_backward)
def conv_norm_backward(grad_output: Shape, input: Shape, weight: Shape, *args: Any, **__: Any) -> int:
    return (2 if args[-1] else 1) * 2 * prod(grad_output) * prod(weight[1:])


@register_flop_formula(NATIVE.ffn_norm)
def ffn_norm(input: Shape, expand_weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(input) * expand_weight[0]


@register_flop_formula(NATIVE.ffn_norm_backward)
def ffn_norm_backward(grad_output: Shape, input: Shape, parameters: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * ffn_norm(input, parameters[0])


@register_flop_formula(NATIVE.packed_conv2d)
def packed_conv2d(
    input: Shape,
    weight: Shape,
    bias: Shape,
    residual: Shape | None = None,
    kernel_size: int = 1,
    *_: Any,
    out_shape: Shape,
    **__: Any,
) -> int:
    return 2 * prod(out_shape) * input[1] * kernel_size**2


@register_flop_formula(NATIVE.ffn)
def ffn(input: Shape, residual: Shape | None, expand_weight: Shape, expand_bias: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(input) * expand_bias[0]


@register_flop_formula(NATIVE.ffn_backward)
def ffn_backward(grad_output: Shape, input: Shape, expand_weight: Shape, expand_bias: Shape, *_: Any, **__: Any) -> int:
    return 2 * ffn(input, None, expand_weight, expand_bias)


@register_flop_formula(NATIVE.mrffi)
def mrffi(input: Shape, residual: Shape | None, weights: list[Shape], *_: Any, **__: Any) -> int:
    batch, channels, height, width = input
    w = dict(zip(MRFFI_WEIGHTS, weights, strict=True))
    inner, outputs, local = w["conv_bias"][0], w["out_bias"][0], w["local_bias"][0]
    rank, states, positions = w["dt_weight"][2], w["A_log"][2], batch * height * width
    products = 2 * inner * outputs + 2 * (rank + 2 * states) * inner + inner * outputs + channels**2
    kernels = inner * w["conv_weight"][3] ** 2 + local * (w["local_weight"][3] ** 2 + 1)
    sequence = scan([batch, inner, height * width], [batch, 2, rank, height * width], w["A_log"])
    wavelet = haar([batch, outputs, height, width], w["wavelet_weight"][3])
    return 2 * positions * (products + kernels) + sequence + wavelet


@register_flop_formula(NATIVE.mrffi_backward)
def mrffi_backward(grad_output: Shape, input: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * mrffi(input, None, weights)


@register_flop_formula(NATIVE.backbone)
def backbone(
    input: Shape,
    weights: list[Shape],
    strides: list[int],
    depths: list[int],
    head_weight: Shape | None = None,
    head_bias: Shape | None = None,
    *_: Any,
    out_shape: list[Shape],
    **__: Any,
) -> int:
    rest = iter(weights)
    batch, channels, height, width = input
    total = 0

    def residual_layers() -> int:
        x = [batch, channels, height, width]
        kernel, _bias, *feed_forward = take(2 + 4)
        return 2 * prod(x) * prod(kernel[1:]) + ffn(x, None, *feed_forward)

    def take(count: int) -> list[Shape]:
        return [next(rest) for _ in range(count)]

    for stride in strides:
        outputs = take(2)[1][0]
        height, width = -(-height // stride), -(-width // stride)
        total += 2 * batch * height * width * outputs * channels * 3**2
        channels = outputs
    for i, depth in enumerate(depths):
        if i > 0:
            total += residual_layers()
            w = take(10)  # in the order of patch_merging
            hidden, squeezed, kernel = w[1][0], w[5][0], w[2][3]
            total += 2 * batch * hidden * (height * width * channels + 2 * squeezed)
            channels, height, width = out_shape[i][1:]
            total += 2 * batch * height * width * hidden * (kernel**2 + channels)
            total += residual_layers()
        for _block in range(depth):
            total += residual_layers()
            total += mrffi([batch, channels, height, width], None, take(len(MRFFI_WEIGHTS)))
            total += residual_layers()
    return total + (2 * batch * channels * head_bias[0] if head_bias else 0)
