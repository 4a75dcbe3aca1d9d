"""The operators of the native core, documented: the Python face of ``csrc/library.cpp``.

Each function only calls ``torch.ops.mobilemamba``, so it works under autograd, autocast, ``torch.jit.script``,
``torch.compile`` and ``torch.export``, on every backend that the library was built for.

Kernel sizes are at most 32767, strides at most 2^31 - 1, dimensions at most 2^32.

They work inside ``torch.vmap`` and ``torch.func.grad``. Forward-mode derivatives are refused, and second derivatives of
the operators that are differentiable once: docs/derivatives.md has the table.
"""

import torch
from torch import Tensor

from .. import _native  # noqa: F401  (registers the operators)

__all__ = [
    "MRFFI_WEIGHTS",
    "backbone",
    "bidirectional_scan",
    "conv_norm",
    "depthwise_conv2d",
    "ffn",
    "ffn_norm",
    "haar_conv2d",
    "mrffi",
    "patch_embedding",
    "patch_merging",
]


def bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """Selective state-space scan of one sequence in both directions, summed.

    For direction ``k`` (0 runs t = 0 .. L-1, 1 runs t = L-1 .. 0), channel ``d`` and state ``n``::

        dt[t]    = softplus(sum_r dt_weight[k, d, r] * delta[k, r, t] + dt_bias[k, d])
        h[n, t]  = exp(-exp(A_log[k, d, n]) * dt[t]) * h[n, t -+ 1] + dt[t] * B[k, n, t] * u[d, t]
        y[d, t] += sum_n C[k, n, t] * h[n, t] + D[k, d] * u[d, t]

    Everything is indexed by the position in the sequence, so the second direction needs no flipped copy. The step
    size ``dt`` is rebuilt from its ``R`` low-rank rows inside the kernel and never stored.

    Args:
        u: input, ``(batch, channels, length)``; float16, bfloat16, float32 or float64, any strides. Channels-last (unit
            stride in ``channels``) is the fast layout; other layouts are copied to it first.
        delta: low-rank step sizes, ``(batch, 2, R, length)``.
        A_log: log of the negated state matrix, ``(2, channels, N)``.
        B: input matrix, ``(batch, 2, N, length)``.
        C: output matrix, ``(batch, 2, N, length)``.
        D: skip weight, ``(2, channels)``.
        dt_weight: projection of ``delta`` to the channels, ``(2, channels, R)``.
        dt_bias: bias of that projection, ``(2, channels)``.
            ``delta``, ``B`` and ``C`` have the dtype of ``u``. ``A_log``, ``D``, ``dt_weight`` and ``dt_bias`` have
            it too, or are float32 beside a float16 or bfloat16 ``u``.

    Returns:
        ``y``, ``(batch, channels, length)`` in the dtype of ``u``, channels-last in memory. State and sums are kept in
        float32 (float64 for float64). Differentiable once, in reverse mode, in every argument; deterministic.

    Raises:
        RuntimeError: a shape, dtype or device is not the expected one; the message names the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941), the two-direction scan; "Mamba" (arXiv 2312.00752), the recurrence.
    """
    return torch.ops.mobilemamba.bidirectional_scan(u, delta, A_log, B, C, D, dt_weight, dt_bias)


def haar_conv2d(input: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of the one-level Haar sub-bands: Haar transform, convolution, inverse transform.

    The orthonormal transform of a patch ``[[a, b], [c, d]]`` gives, in this order, ``(a+b+c+d)/2`` (LL),
    ``(a+b-c-d)/2`` (LH), ``(a-b+c-d)/2`` (HL) and ``(a-b-c+d)/2`` (HH); sub-band channel = 4 * channel + band. The
    convolution is ``k x k`` with zero "same" padding in the half-resolution plane. An odd height or width is treated
    as if a zero row or column were appended, and the result is cropped.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides;
            channels-last is the fast layout.
        weight: ``(4 * channels, 1, k, k)`` with ``k`` odd, in the dtype of ``input``, or float32 beside a float16 or
            bfloat16 ``input``. Sums are kept in float32 (float64 for float64).

    Returns:
        ``(batch, channels, height, width)`` in the dtype of ``input``, channels-last in memory. Differentiable any
        number of times; deterministic.

    Raises:
        RuntimeError: a shape, dtype or device is not the expected one; the message names the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941); "Wavelet Convolutions for Large Receptive Fields" (arXiv 2407.05848).
    """
    return torch.ops.mobilemamba.haar_conv2d(input, weight)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    activation: str = "none",
) -> Tensor:
    """Depthwise convolution with bias, activation and residual: ``activation(conv(input) + bias) + residual``.

    Every channel is convolved with its own ``k x k`` kernel, with zero padding of ``k // 2`` on every side.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides. Unit stride in
            ``channels`` (channels-last, or a slice of its channels) is the fast layout; other layouts are copied to it
            first.
        weight: ``(channels, 1, k, k)`` with ``k`` odd; sizes 3, 5 and 7 are the fast ones.
        bias: ``(channels,)``. ``weight`` and ``bias`` have the dtype of ``input``, or are float32 beside a float16 or
            bfloat16 ``input``. Sums are kept in float32 (float64 for float64).
        residual: added last; of the output's shape, in the dtype of ``input``.
        stride: of the convolution, at least 1.
        activation: ``"none"``, ``"relu"`` or ``"silu"``.

    Returns:
        ``(batch, channels, ceil(height / stride), ceil(width / stride))`` in the dtype of ``input``, channels-last in
        memory. Differentiable once, in reverse mode, in every tensor argument; deterministic. The backward pass
        computes the convolution again, so only the arguments are kept for it.

    Raises:
        RuntimeError: a shape, dtype, device, stride or activation is not an expected one; the message names the
            argument and both values.
    """
    return torch.ops.mobilemamba.depthwise_conv2d(input, weight, bias, residual, stride, activation)


def conv_norm(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution and batch normalisation in training: ``activation(norm(conv(input))) + residual``.

    The norm has the mean and the variance of each channel over the batch and its positions. The convolution has zero
    padding of ``k // 2`` on every side and no bias. On CPUs matrix products and the passes of the norm share the work;
    on CUDA the operator is composed of torch's.

    Args:
        input: ``(batch, in_channels, height, width)``; float16, bfloat16, float32 or float64, any strides;
            channels-last, or a slice of its channels, is the fast layout.
        weight: ``(out_channels, in_channels, k, k)``, or ``(channels, 1, k, k)`` for a depthwise convolution of at
            least 2 channels; ``k`` odd; in the dtype of ``input``.
        norm_weight, norm_bias: ``(out_channels,)``, in the dtype of ``input``, or float32 beside 16 bits.
        residual: added last; of the output's shape, in the dtype of ``input``.
        stride: of the convolution, at least 1.
        activation: ``"none"`` or ``"relu"``.
        eps: added to the variance.

    Returns:
        The output ``(batch, out_channels, ceil(height / stride), ceil(width / stride))`` in the dtype of ``input``,
        channels-last in memory; then ``(out_channels,)`` each the mean and the unbiased variance, for running
        statistics, in float32 (float64 for float64), without gradients. Differentiable once, in reverse mode, in every
        tensor argument; deterministic where torch's convolution is. For the backward pass it keeps the input and,
        unless the convolution is depthwise, its output; the norm and the activation are computed again.

    Raises:
        RuntimeError: a shape, dtype, device, stride or activation is not an expected one, or the output has a single
            position; the message names the argument and both values.
    """
    y, mean, var, _convolved = torch.ops.mobilemamba.conv_norm(
        input, weight, norm_weight, norm_bias, residual, stride, activation, eps
    )
    return y, mean, var


def ffn_norm(
    input: Tensor,
    expand_weight: Tensor,
    expand_norm_weight: Tensor,
    expand_norm_bias: Tensor,
    project_weight: Tensor,
    project_norm_weight: Tensor,
    project_norm_bias: Tensor,
    expand_eps: float = 1e-5,
    project_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The feed-forward layer in training: ``input + norm(project(relu(norm(expand(input)))))``.

    Each norm has the mean and the variance of each channel over the batch and its positions.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64; channels-last is the fast
            layout.
        expand_weight, project_weight: ``(hidden, channels, 1, 1)`` and ``(channels, hidden, 1, 1)``, in the dtype of
            ``input``.
        expand_norm_weight, expand_norm_bias: ``(hidden,)``; the project norm's: ``(channels,)``. In the dtype of
            ``input``, or float32 beside 16 bits.
        expand_eps, project_eps: added to the variances.

    Returns:
        The output, of the input's shape and dtype, channels-last in memory; then, as :func:`conv_norm` returns them,
        mean and unbiased variance of the hidden channels and of the output's. Differentiable once, in reverse mode, in
        every tensor argument; deterministic. For the backward pass it keeps the input and the two products; the norms
        and the activation are computed again.

    Raises:
        RuntimeError: a shape, dtype or device is not the expected one, or the input has a single position; the message
            names the argument and both values.
    """
    y, expand_mean, expand_var, project_mean, project_var, _expanded, _projected = torch.ops.mobilemamba.ffn_norm(
        input,
        expand_weight,
        expand_norm_weight,
        expand_norm_bias,
        project_weight,
        project_norm_weight,
        project_norm_bias,
        expand_eps,
        project_eps,
    )
    return y, expand_mean, expand_var, project_mean, project_var


def ffn(
    input: Tensor,
    residual: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """The feed-forward layer with BatchNorm folded, with its own residual and one more.

    At each position ``output = input + project_weight @ relu(expand_weight @ input + expand_bias) + project_bias +
    residual``. If there are enough positions for all threads, the CPU takes a chunk of positions through both products
    before the next chunk, so the hidden activations stay in the cache.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides, channels-last
            is the fast layout.
        residual: added last; of the shape and dtype of ``input``.
        expand_weight: ``(hidden, channels)``, in the dtype of ``input``, with ``hidden`` at least 1.
        expand_bias: ``(hidden,)``, in the dtype of ``input``, or float32 beside a float16 or bfloat16 ``input``.
        project_weight: ``(channels, hidden)``, in the dtype of ``input``. Both matrices may also be packed (by
            :func:`pack_conv2d_weight`, as kernels of size 1), which is the fast form.
        project_bias: ``(channels,)``, like ``expand_bias``.

    Returns:
        ``(batch, channels, height, width)`` in the dtype of ``input``, channels-last in memory. Sums are kept in
        float32 (float64 for float64), hidden activations in the dtype of ``input``. Differentiable once, in reverse
        mode, in every tensor; deterministic. The backward pass computes the hidden activations again, so only the
        arguments are kept for it.

    Raises:
        RuntimeError: a shape, dtype or device is not the expected one; the message names the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941), section 3.3.
    """
    return torch.ops.mobilemamba.ffn(input, residual, expand_weight, expand_bias, project_weight, project_bias)


#: The names of :func:`mrffi`'s weights, in the order of ``mrffi_weights`` in ``csrc/ops/mrffi.cpp``.
MRFFI_WEIGHTS = (
    "in_weight",
    "in_bias",
    "conv_weight",
    "conv_bias",
    "x_weight",
    "dt_weight",
    "dt_bias",
    "A_log",
    "D",
    "norm_weight",
    "norm_bias",
    "out_weight",
    "out_bias",
    "wavelet_weight",
    "local_weight",
    "local_bias",
    "local_scale",
    "local_shift",
    "proj_weight",
    "proj_bias",
)


def mrffi(input: Tensor, residual: Tensor | None, weights: list[Tensor], eps: float = 1e-5) -> Tensor:
    """MRFFI, MobileMamba's mixer, with BatchNorm folded: one operator for all its parts.

    The channels of ``input`` are divided into global (G), local (P) and identity parts::

        u, z = (in_weight @ x_G + in_bias).split(D)
        u = silu(conv(u, conv_weight) + conv_bias)
        delta, B, C = x_weight @ u                       # for each direction R, N and N rows
        y = LayerNorm(bidirectional_scan(u, delta, A_log, B, C, D, dt_weight, dt_bias)) * silu(z)
        g = out_weight @ y + out_bias + haar_conv2d(x_G, wavelet_weight)
        l = local_scale * relu(conv(x_P, local_weight) + local_bias) + local_shift
        output = proj_weight @ relu(concat(g, l, x_I)) + proj_bias + residual

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides, channels-last
            is the fast layout.
        residual: added last; of the shape and dtype of ``input``.
        weights: in the order of ``MRFFI_WEIGHTS``, with inner width D, rank R and state size N: ``in_weight (2D, G)``,
            ``in_bias (2D,)``, ``conv_weight (D, 1, k, k)``, ``conv_bias (D,)``, ``x_weight (2 * (R + 2N), D)``,
            ``dt_weight (2, D, R)``, ``dt_bias (2, D)``, ``A_log (2, D, N)``, ``D (2, D)``, ``norm_weight (D,)``,
            ``norm_bias (D,)``, ``out_weight (G, D)``, ``out_bias (G,)``, ``wavelet_weight (G, 4, k, k)``,
            ``local_weight (P, 1, k, k)``, ``local_bias (P,)``, ``local_scale (P,)``, ``local_shift (P,)``,
            ``proj_weight (channels, channels)``, ``proj_bias (channels,)``. The four matrices have the dtype of
            ``input`` and may also be packed (by :func:`pack_conv2d_weight`, as kernels of size 1); the others may be
            float32 beside a float16 or bfloat16 ``input``.
        eps: of the LayerNorm.

    Returns:
        ``(batch, channels, height, width)`` in the dtype of ``input``, channels-last in memory. Differentiable once, in
        reverse mode, in every tensor; deterministic. The backward pass computes the parts again, so only the arguments
        are kept for it.

    Raises:
        RuntimeError: a shape, dtype or device is not the expected one; the message names the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941), section 3.3.
    """
    return torch.ops.mobilemamba.mrffi(input, residual, weights, eps)


def patch_embedding(input: Tensor, weights: list[Tensor], biases: list[Tensor], strides: list[int]) -> Tensor:
    """Patch embedding with BatchNorm folded: 3x3 convolutions one after another, a ReLU after each but the last.

    Each convolution has zero padding of 1. The CPU takes a few images through all convolutions before the next images,
    so the activations between them stay in the cache. No image depends on another.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides, channels-last
            is the fast layout.
        weights: one ``(out_channels, in_channels, 3, 3)`` for each convolution, at least one, in the dtype of
            ``input``. They may also be packed (by :func:`pack_conv2d_weight`), which is the fast form.
        biases: ``(out_channels,)`` for each weight, in the dtype of ``input``, or float32 beside a float16 or bfloat16
            ``input``.
        strides: one for each convolution, at least 1.

    Returns:
        The output of the last convolution in the dtype of ``input``; each convolution divides height and width by its
        stride and rounds up. Channels-last in memory if the weights are packed or ``input`` is channels-last.
        Differentiable in every tensor.

    Raises:
        RuntimeError: a shape, dtype, device, stride or the length of a list is not the expected one; the message names
            the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941), section 3.3.
    """
    return torch.ops.mobilemamba.patch_embedding(input, weights, biases, strides)


def patch_merging(
    input: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """Patch merging with BatchNorm folded: it halves the resolution and changes the width.

    With hidden width F and squeezed width S, at each position and for each image::

        x = relu(expand_weight @ input + expand_bias)
        x = relu(depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride=2))
        s = relu(squeeze_weight @ mean(x) + squeeze_bias)         # mean over height and width
        x = x * sigmoid(excite_weight @ s + excite_bias)
        output = project_weight @ x + project_bias

    The CPU takes a few images through all layers before the next images, so the activations between them stay in the
    cache. No image depends on another.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides, channels-last
            is the fast layout.
        expand_weight: ``(F, channels, 1, 1)``, in the dtype of ``input``. This and the other weights but
            ``depthwise_weight`` may also be packed (by :func:`pack_conv2d_weight`), which is the fast form.
        expand_bias: ``(F,)``. Biases and ``depthwise_weight`` have the dtype of ``input``, or are float32 beside a
            float16 or bfloat16 ``input``.
        depthwise_weight: ``(F, 1, k, k)`` with ``k`` odd, ``3`` in the network.
        depthwise_bias: ``(F,)``.
        squeeze_weight: ``(S, F, 1, 1)``.
        squeeze_bias: ``(S,)``.
        excite_weight: ``(F, S, 1, 1)``.
        excite_bias: ``(F,)``.
        project_weight: ``(out_channels, F, 1, 1)``.
        project_bias: ``(out_channels,)``.

    Returns:
        ``(batch, out_channels, ceil(height / 2), ceil(width / 2))`` in the dtype of ``input``, channels-last in memory.
        Differentiable once, in reverse mode, in every tensor.

    Raises:
        RuntimeError: a shape, dtype or device is not the expected one; the message names the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941), section 3.3.
    """
    return torch.ops.mobilemamba.patch_merging(
        input,
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        squeeze_weight,
        squeeze_bias,
        excite_weight,
        excite_bias,
        project_weight,
        project_bias,
    )


def backbone(
    input: Tensor,
    weights: list[Tensor],
    strides: list[int],
    depths: list[int],
    head_weight: Tensor | None = None,
    head_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Tensor]:
    """The network with BatchNorm folded up to its feature maps, as one operator.

    It calls the operators of its layers in this order, with ``weights`` in the order of their arguments::

        x = patch_embedding(input, strides)                        # weight and bias of each convolution
        for i, depth in enumerate(depths):
            if i > 0:
                x = ffn(depthwise_conv2d(x))                       # 2 and 4 weights
                x = patch_merging(x)                               # 10
                x = ffn(depthwise_conv2d(x))                       # 2 and 4
            for _ in range(depth):
                y = ffn(depthwise_conv2d(x))                       # 2 and 4
                y = mrffi(y, residual=y)                           # 20, see MRFFI_WEIGHTS
                x = ffn(depthwise_conv2d(y), residual=x)           # 2 and 4
            maps[i] = x

    On the CPU the threads are started once, and any thread takes the next tasks of a layer. So a thread that does not
    run, because other processes need its core, does not hold up the others.

    Args:
        input: ``(batch, channels, height, width)``; float16, bfloat16, float32 or float64, any strides.
        weights: for each layer as its operator takes them.
        strides: of the convolutions of the patch embedding, at least 1.
        depths: number of blocks of each stage.
        eps: of the LayerNorms.

    Returns:
        A map for each stage, ``(batch, channels, height, width)`` with the channels of the stage, in the dtype of
        ``input``, channels-last in memory. The patch embedding divides height and width by its strides, and each
        patch merging by 2, rounded up. Differentiable once, in reverse mode, in every tensor.

    Raises:
        RuntimeError: a shape, dtype, device or the length of a list is not the expected one; the message names the
            operator, the argument and both values.

    Source: "MobileMamba" (arXiv 2411.15941), section 3.
    """
    return torch.ops.mobilemamba.backbone(input, weights, strides, depths, head_weight, head_bias, eps)
