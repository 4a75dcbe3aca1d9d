"""The operators against the slow reference: values, gradients, layouts, dtypes, determinism, and what is refused."""

import threading
from functools import partial

import pytest
import reference
import torch
from devices import DEVICE, cpu_only, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mobilemamba import ops

SCAN_NAMES = ("u", "delta", "A_log", "B", "C", "D", "dt_weight", "dt_bias")
LOW_PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def scan_arguments(
    batch: int,
    channels: int,
    length: int,
    rank: int = 2,
    state: int = 1,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = scale * randn(*shape, generator=generator)
        return x.to(dtype).requires_grad_(requires_grad)

    return [
        normal(batch, channels, length),
        normal(batch, 2, rank, length),
        normal(2, channels, state, scale=0.5),
        normal(batch, 2, state, length),
        normal(batch, 2, state, length),
        normal(2, channels),
        normal(2, channels, rank, scale=rank**-0.5),
        normal(2, channels),
    ]


def haar_arguments(
    batch: int, channels: int, height: int, width: int, kernel: int, dtype=torch.float64, requires_grad: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        randn(*shape, generator=generator).to(dtype).requires_grad_(requires_grad)
        for shape in ((batch, channels, height, width), (4 * channels, 1, kernel, kernel))
    ]


def depthwise_arguments(
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int = 1,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[Tensor]:
    """Input, weight, bias and residual; a shorter list is without the last ones."""
    generator = torch.Generator().manual_seed(0)
    output = (batch, channels, -(-height // stride), -(-width // stride))
    return [
        randn(*shape, generator=generator).to(dtype).requires_grad_(requires_grad)
        for shape in ((batch, channels, height, width), (channels, 1, kernel, kernel), (channels,), output)
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0 if actual.shape == expected.shape else float("inf")
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal to the bit on the CPU. Elsewhere torch's matrix products may take another algorithm for another layout."""
    if actual.device.type == "cpu":
        return torch.equal(actual, expected)
    return relative_error(actual, expected) < LOW_PRECISION.get(actual.dtype, 1e-12)


def check_against_reference(operator, expected, arguments: list[Tensor], tolerance: float = 1e-12) -> None:
    """Value and every gradient of ``operator``, against ``expected`` in float64."""
    exact = [x.detach().double().requires_grad_() for x in arguments]
    leaves = [x.detach().requires_grad_() for x in arguments]
    y, y_exact = operator(*leaves), expected(*exact)
    assert y.shape == y_exact.shape
    assert y.dtype == arguments[0].dtype
    assert relative_error(y, y_exact) < tolerance
    grad = randn(*y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, leaves, grad)
    grads_exact = torch.autograd.grad(y_exact, exact, grad.double(), allow_unused=True, materialize_grads=True)
    for leaf, g, g_exact in zip(leaves, grads, grads_exact, strict=True):
        assert g.dtype == leaf.dtype
        assert g.shape == leaf.shape
        assert relative_error(g, g_exact) < 2 * tolerance or g_exact.abs().max() < 1e-12


# Values and gradients ------------------------------------------------------------------------------------------------

SCAN_SHAPES = [  # batch, channels, length, rank, state
    (2, 5, 7, 3, 1),
    (1, 70, 200, 2, 3),  # several chunks and a partial vector, N > 1
    (2, 130, 65, 1, 1),  # three groups of channels, a chunk and one position
    (1, 3, 1, 1, 2),  # one position
    (1, 64, 64, 17, 1),
    (3, 1, 128, 1, 16),
]
LONGER_SCANS = [(1, 33, 300, 17, 1), (2, 3, 520, 2, 2)]


@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
def test_scan_in_float64(shape):
    check_against_reference(ops.bidirectional_scan, reference.bidirectional_scan, scan_arguments(*shape))


# one position has no decay, and no gradient for it
@pytest.mark.parametrize("shape", [shape for shape in SCAN_SHAPES if shape[2] > 1], ids=str)
def test_the_scan_that_benchmarks_compare_with(shape):
    check_against_reference(reference.doubling_scan, reference.bidirectional_scan, scan_arguments(*shape))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", [*SCAN_SHAPES, *LONGER_SCANS], ids=str)
def test_scan_in_lower_precision(shape, dtype):
    arguments = scan_arguments(*shape, dtype=dtype)
    check_against_reference(ops.bidirectional_scan, reference.bidirectional_scan, arguments, LOW_PRECISION[dtype])


HAAR_SHAPES = [  # batch, channels, height, width, kernel
    (2, 5, 7, 6, 3),
    (1, 17, 9, 13, 5),
    (2, 3, 1, 1, 7),
    (1, 33, 14, 14, 7),
    (1, 2, 3, 4, 1),
    (1, 2, 5, 4, 9),  # a kernel wider than the plane, and without a specialisation
    (2, 16, 2, 31, 3),
]
LARGER_HAARS = [(1, 3, 50, 40, 7), (2, 40, 22, 35, 5), (1, 5, 24, 70, 3)]


@pytest.mark.parametrize("shape", HAAR_SHAPES, ids=str)
def test_haar_in_float64(shape):
    check_against_reference(ops.haar_conv2d, reference.haar_conv2d, haar_arguments(*shape))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", [*HAAR_SHAPES, *LARGER_HAARS], ids=str)
def test_haar_in_lower_precision(shape, dtype):
    arguments = haar_arguments(*shape, dtype=dtype)
    check_against_reference(ops.haar_conv2d, reference.haar_conv2d, arguments, LOW_PRECISION[dtype])


DEPTHWISE_SHAPES = [  # batch, channels, height, width, kernel, stride
    (2, 5, 7, 6, 3, 1),
    (1, 17, 14, 14, 7, 2),
    (3, 33, 7, 9, 5, 1),
    (2, 16, 40, 11, 3, 2),  # several tasks in a column of the image
    (1, 20, 35, 20, 7, 1),
    (1, 6, 18, 17, 5, 2),
    (2, 3, 1, 1, 7, 1),
    (1, 2, 3, 4, 1, 2),
    (1, 2, 5, 4, 9, 1),  # a kernel wider than the image, and without a specialisation
    (2, 4, 19, 23, 3, 3),  # nor for this stride
    (1, 3, 21, 9, 1, 4),  # rows that no output sees
    (2, 3, 5, 4, 3, 10**9),
]
ACTIVATIONS = ["none", "relu", "silu"]


def check_depthwise(arguments: list[Tensor], stride: int, activation: str, tolerance: float = 1e-12) -> None:
    options = {"stride": stride, "activation": activation}
    operator, expected = (partial(module.depthwise_conv2d, **options) for module in (ops, reference))
    check_against_reference(operator, expected, arguments, tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", DEPTHWISE_SHAPES, ids=str)
def test_depthwise_in_float64(shape, activation):
    arguments = depthwise_arguments(*shape)
    for count in (2, 3, 4):
        check_depthwise(arguments[:count], shape[-1], activation)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", DEPTHWISE_SHAPES, ids=str)
def test_depthwise_in_lower_precision(shape, activation, dtype):
    check_depthwise(depthwise_arguments(*shape, dtype=dtype), shape[-1], activation, LOW_PRECISION[dtype])


def test_depthwise_residual_without_bias():
    image, weight, _, residual = depthwise_arguments(2, 5, 7, 6, 3)
    check_against_reference(
        lambda x, w, r: ops.depthwise_conv2d(x, w, residual=r, activation="silu"),
        lambda x, w, r: reference.depthwise_conv2d(x, w, residual=r, activation="silu"),
        [image, weight, residual],
    )


def test_depthwise_gradient_of_one_argument():
    """The others need none."""
    arguments = depthwise_arguments(2, 5, 7, 6, 3)
    for i in range(4):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(arguments)]
        expected = torch.autograd.grad(reference.depthwise_conv2d(*leaves, activation="relu").sin().sum(), leaves[i])
        actual = torch.autograd.grad(ops.depthwise_conv2d(*leaves, activation="relu").sin().sum(), leaves[i])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_16_bit_input(dtype):
    arguments = scan_arguments(2, 20, 9, 3, dtype=dtype)
    for i in (2, 5, 6, 7):
        arguments[i] = arguments[i].float()
    tolerance = LOW_PRECISION[dtype]
    check_against_reference(ops.bidirectional_scan, reference.bidirectional_scan, arguments, tolerance)
    image, weight = haar_arguments(2, 5, 7, 6, 3, dtype=dtype)
    check_against_reference(ops.haar_conv2d, reference.haar_conv2d, [image, weight.float()], tolerance)
    image, weight, bias, residual = depthwise_arguments(2, 20, 7, 6, 3, 2, dtype=dtype)
    for parameters in ([weight.float(), bias.float()], [weight.float(), bias], [weight, bias.float()]):
        check_depthwise([image, *parameters, residual], 2, "silu", tolerance)


sizes = st.integers(1, 40)


@given(st.integers(1, 3), sizes, st.integers(1, 150), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_scan_on_random_shapes(batch, channels, length, rank, state, seed):
    arguments = scan_arguments(batch, channels, length, rank, state, seed=seed)
    check_against_reference(ops.bidirectional_scan, reference.bidirectional_scan, arguments, 1e-11)


@given(st.integers(1, 3), sizes, st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3, 5, 7, 9]))
def test_haar_on_random_shapes(batch, channels, height, width, kernel):
    arguments = haar_arguments(batch, channels, height, width, kernel)
    check_against_reference(ops.haar_conv2d, reference.haar_conv2d, arguments, 1e-11)


@given(
    st.tuples(st.integers(1, 3), sizes, sizes, st.integers(1, 20), st.sampled_from([1, 3, 5, 7, 9]), st.integers(1, 4)),
    st.sampled_from(ACTIVATIONS),
    st.integers(2, 4),
)
def test_depthwise_on_random_shapes(shape, activation, count):
    check_depthwise(depthwise_arguments(*shape)[:count], shape[-1], activation, 1e-11)


def test_scan_of_the_longest_sequences():
    """65,536 positions; the gradients in float32 against those in float64."""
    arguments = scan_arguments(1, 2, 65536, 1, dtype=torch.float64)
    single = [x.float().requires_grad_() for x in arguments]
    y = ops.bidirectional_scan(*single)
    with torch.no_grad():
        assert relative_error(y, reference.bidirectional_scan(*arguments)) < 1e-5
    double = [x.requires_grad_() for x in arguments]
    grads = torch.autograd.grad(y.sin().sum(), single)
    exact = torch.autograd.grad(ops.bidirectional_scan(*double).sin().sum(), double)
    assert all(relative_error(g, e) < 1e-4 for g, e in zip(grads, exact, strict=True))


def test_batches_beyond_65535():
    arguments = scan_arguments(66000, 1, 1, 1, dtype=torch.float32)
    y = ops.bidirectional_scan(*arguments)
    assert torch.equal(y[-9:], ops.bidirectional_scan(*[x[-9:] if len(x) == 66000 else x for x in arguments]))
    image, weight = haar_arguments(66000, 1, 1, 2, 3, dtype=torch.float32)
    assert torch.equal(ops.haar_conv2d(image, weight)[-9:], ops.haar_conv2d(image[-9:], weight))


def test_extreme_step_sizes_and_states():
    """Softplus far out on both sides, decays that underflow, infinities nowhere."""
    arguments = scan_arguments(1, 32, 20, dtype=torch.float32)
    arguments[7] = torch.linspace(-200, 200, 64).view(2, 32)
    arguments[2] = torch.linspace(-8, 8, 64).view(2, 32, 1)
    y = ops.bidirectional_scan(*arguments)
    assert y.isfinite().all()
    assert relative_error(y, reference.bidirectional_scan(*[x.double() for x in arguments])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_step_sizes_keep_their_digits_in_16_bits(dtype):
    """The step size is never rounded to 16 bits, so neither must be what is computed of it."""
    arguments = scan_arguments(1, 32, 20, dtype=dtype)
    parameters = [torch.zeros(2, 32, 1), torch.zeros(2, 32), torch.zeros(2, 32, 2), torch.full((2, 32), -11.0)]
    arguments[2], arguments[5], arguments[6], arguments[7] = parameters
    check_against_reference(ops.bidirectional_scan, reference.bidirectional_scan, arguments, LOW_PRECISION[dtype] / 4)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_infinity_at_the_right_border_stays_in_its_taps(kernel):
    image, weight, _, residual = depthwise_arguments(1, 3, 5, 5, kernel, dtype=torch.float32)
    image[..., -1] = torch.inf
    backward = torch.ops.mobilemamba.depthwise_conv2d_backward
    _, grad_weight, _ = backward(residual.abs() + 1, image, weight, None, 1, "none")
    assert not grad_weight.isnan().any()
    assert grad_weight[..., 0].isfinite().all()  # never lies over the last column


def test_nan_and_infinity_pass_through():
    for value in (float("nan"), float("inf")):
        arguments = scan_arguments(1, 16, 5, dtype=torch.float32)
        arguments[0][0, 3, 2] = value
        bad = ~ops.bidirectional_scan(*arguments).isfinite()
        assert bad[0, 3].all()
        assert bad.sum() == 5
        image, weight = haar_arguments(1, 3, 4, 4, 1, dtype=torch.float32)
        image[0, 1, 0, 0] = value
        assert not ops.haar_conv2d(image, weight)[0, 1, :2, :2].isfinite().any()
        image, weight, bias, residual = depthwise_arguments(1, 20, 9, 8, 3, dtype=torch.float32)
        image[0, 3, 4, 4] = value
        weight.abs_()
        for activation in ACTIVATIONS:
            bad = ~ops.depthwise_conv2d(image, weight, bias, residual, activation=activation).isfinite()
            assert bad[0, 3, 3:6, 3:6].all()
            assert bad.sum() == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_survives(dtype):
    """A Haar convolution with the identity kernel gives back its input: all finite values, subnormal ones too."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.float().abs() < 1e4]
    image = torch.zeros(1, 1, 2, 2 * len(every), dtype=dtype)
    image[0, 0, 0, ::2] = every  # alone in its patch, so that the sums are exact
    weight = torch.ones(4, 1, 1, 1)
    assert torch.equal(ops.haar_conv2d(image, weight)[0, 0, 0, ::2].float(), every.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits_is_torchs(dtype):
    x = torch.cat([torch.randn(4000) * 10.0**e for e in range(-9, 6)] + [torch.tensor([65519.0, 65520.0, 1e38])])
    arguments = scan_arguments(1, len(x), 1, dtype=dtype)
    arguments[0] = torch.ones_like(arguments[0])
    arguments[3] = torch.zeros_like(arguments[3])
    D = torch.stack([x, torch.zeros_like(x)])  # y = D * u exactly
    y = ops.bidirectional_scan(*arguments[:2], *[a.float() for a in arguments[2:3]], *arguments[3:5], D, *arguments[6:])
    assert torch.equal(y[0, :, 0], x.to(dtype))


# Layouts -------------------------------------------------------------------------------------------------------------


def test_scan_takes_any_strides():
    arguments = scan_arguments(2, 20, 9, 3, 2)
    expected = ops.bidirectional_scan(*arguments)
    strided = [torch.empty(*x.shape, 3, dtype=x.dtype)[..., 1].copy_(x) for x in arguments]
    transposed = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in arguments]
    for variant in (strided, transposed):
        assert torch.equal(ops.bidirectional_scan(*variant), expected)
    expanded = [arguments[0][:1].expand(2, -1, -1), *[x[:1].expand(2, *x.shape[1:]) for x in arguments[1:2]]]
    y = ops.bidirectional_scan(*expanded, *arguments[2:])
    assert torch.equal(y, ops.bidirectional_scan(*[x.contiguous() for x in expanded], *arguments[2:]))


def test_haar_takes_any_strides():
    image, weight = haar_arguments(2, 20, 7, 6, 3)
    expected = ops.haar_conv2d(image, weight)
    for variant in (
        image.contiguous(memory_format=torch.channels_last),
        image.transpose(2, 3).contiguous().transpose(2, 3),
        torch.empty(*image.shape, 2, dtype=image.dtype)[..., 1].copy_(image),
    ):
        assert torch.equal(ops.haar_conv2d(variant, weight), expected)
    assert torch.equal(ops.haar_conv2d(image, weight.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_takes_any_strides(stride):
    arguments = depthwise_arguments(2, 20, 7, 6, 3, stride)
    operator = partial(ops.depthwise_conv2d, stride=stride, activation="silu")
    grad = torch.randn_like(arguments[3])
    expected = operator(*arguments)
    assert expected.is_contiguous(memory_format=torch.channels_last)

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def channel_slice(x: Tensor) -> Tensor:
        return channels_last(torch.cat([x, x, x], 1))[:, x.shape[1] : 2 * x.shape[1]] if x.dim() == 4 else x

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() == 4 else x

    def spread(x: Tensor) -> Tensor:
        return torch.empty(*x.shape, 2, dtype=x.dtype)[..., 1].copy_(x)

    for layout in (channels_last, channel_slice, transposed, spread):
        variant = [layout(x) if i != 1 else x for i, x in enumerate(arguments)]
        variant[1] = spread(arguments[1])
        assert torch.equal(operator(*variant), expected)
        gradients = torch.ops.mobilemamba.depthwise_conv2d_backward
        for a, b in zip(
            gradients(layout(grad), *variant[:3], stride, "silu"),
            gradients(grad, *arguments[:3], stride, "silu"),
            strict=True,
        ):
            assert torch.equal(a, b)
    expanded = [x[:1].expand_as(x) if i in (0, 3) else x for i, x in enumerate(arguments)]
    assert torch.equal(operator(*expanded), operator(*[x.contiguous() for x in expanded]))


@cpu_only
def test_depthwise_reads_a_channel_slice_where_it_is():
    image = torch.randn(2, 9, 9, 64).permute(0, 3, 1, 2)[:, 16:48]
    weight, bias = torch.randn(32, 1, 3, 3), torch.randn(32)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = ops.depthwise_conv2d(image, weight, bias, residual=image)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated == y.nbytes + weight.nbytes  # the weight is packed


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 1), (1, 2, 1, 1, 1), (1, 2, 3, 2, 2)], ids=str)
def test_scan_gradcheck(shape, channels_last):
    arguments = scan_arguments(*shape, requires_grad=True)
    if channels_last:
        arguments = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(ops.bidirectional_scan, arguments)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 3), (1, 2, 1, 1, 3), (1, 1, 5, 3, 1)], ids=str)
def test_haar_gradcheck(shape, channels_last):
    image, weight = haar_arguments(*shape, requires_grad=True)
    if channels_last:
        image = image.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(ops.haar_conv2d, (image, weight))
    assert torch.autograd.gradgradcheck(ops.haar_conv2d, (image, weight))


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 3, 1), (1, 2, 4, 3, 3, 2), (1, 1, 5, 3, 1, 3)], ids=str)
def test_depthwise_gradcheck(shape, activation):
    arguments = depthwise_arguments(*shape, requires_grad=True)
    operator = partial(ops.depthwise_conv2d, stride=shape[-1], activation=activation)
    for count in (2, 3, 4):
        assert torch.autograd.gradcheck(operator, arguments[:count])
    last = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in arguments[:2]]
    assert torch.autograd.gradcheck(operator, last)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("empty", range(4))
def test_depthwise_empty_inputs(empty, stride):
    shape = [2, 3, 4, 5]
    shape[empty] = 0
    arguments = depthwise_arguments(*shape, 3, stride, requires_grad=True)
    y = ops.depthwise_conv2d(*arguments, stride=stride, activation="silu")
    assert y.shape == arguments[3].shape
    grads = torch.autograd.grad(y.sum(), arguments)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, arguments, strict=True))


@pytest.mark.parametrize("empty", ["batch", "length"])
def test_empty_inputs(empty):
    arguments = scan_arguments(0 if empty == "batch" else 2, 5, 0 if empty == "length" else 4, requires_grad=True)
    y = ops.bidirectional_scan(*arguments)
    assert y.shape == arguments[0].shape
    grads = torch.autograd.grad(y.sum(), arguments)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, arguments, strict=True))
    image, weight = haar_arguments(0 if empty == "batch" else 2, 3, 4, 0 if empty == "length" else 4, 3)
    image.requires_grad_(), weight.requires_grad_()
    y = ops.haar_conv2d(image, weight)
    grads = torch.autograd.grad(y.sum(), (image, weight))
    assert y.shape == image.shape
    assert not grads[1].any()


def test_offsets_beyond_32_bits():
    """Strides that no 32-bit number holds; the memory in between is never touched."""
    far = 2**31 + 64
    storage = torch.empty(far + 4096, dtype=torch.bfloat16)

    arguments = scan_arguments(2, 20, 9, 3, dtype=torch.bfloat16)
    u = storage.as_strided((2, 20, 9), (far, 1, 20)).copy_(arguments[0])
    assert torch.equal(ops.bidirectional_scan(u, *arguments[1:]), ops.bidirectional_scan(*arguments))
    image, weight = haar_arguments(2, 5, 6, 7, 3, dtype=torch.bfloat16)
    far_image = storage.as_strided((2, 5, 6, 7), (far, 1, 35, 5)).copy_(image)
    assert torch.equal(ops.haar_conv2d(far_image, weight), ops.haar_conv2d(image, weight))
    for strides in ((far, 1, 35, 5), (5, 1, far, 10), (5, 1, 10, far // 6)):  # batch, rows, columns
        shape = (2, 5, 2, 7) if strides[2] == far else (2, 5, 6, 7)
        image, weight, bias, residual = depthwise_arguments(*shape, 3, dtype=torch.bfloat16)
        expected = ops.depthwise_conv2d(image, weight, bias, residual)
        gradients = torch.ops.mobilemamba.depthwise_conv2d_backward
        expected_gradients = gradients(residual, image, weight, bias, 1, "silu")
        far_image = storage.as_strided(shape, strides).copy_(image)
        assert torch.equal(ops.depthwise_conv2d(far_image, weight, bias, residual), expected)
        actual_gradients = gradients(residual, far_image, weight, bias, 1, "silu")
        assert all(torch.equal(a, b) for a, b in zip(actual_gradients, expected_gradients, strict=True))
        far_residual = far_image.copy_(residual)
        assert torch.equal(ops.depthwise_conv2d(image, weight, bias, far_residual), expected)
        actual_gradients = gradients(far_residual, image, weight, bias, 1, "silu")
        assert all(torch.equal(a, b) for a, b in zip(actual_gradients, expected_gradients, strict=True))


def test_infinities_stay_in_their_channels_and_lanes():
    """A partial vector gives what a full one does."""
    for channels in (5, 16):
        arguments = scan_arguments(1, channels, 4, dtype=torch.float32, requires_grad=True)
        with torch.no_grad():
            arguments[1][0, :, 0, 2] = -torch.inf
            arguments[6].abs_()
        grads = torch.autograd.grad(ops.bidirectional_scan(*arguments).sum(), arguments)
        assert grads[1].isfinite().all()


# Determinism, threads ------------------------------------------------------------------------------------------------


def run_all(arguments: list[Tensor], image: Tensor, weight: Tensor, depthwise: list[Tensor]) -> list[Tensor]:
    y, z = ops.bidirectional_scan(*arguments), ops.haar_conv2d(image, weight)
    results = [y, z, *torch.autograd.grad(y.sin().sum() + z.sin().sum(), [*arguments, image, weight])]
    for stride in (1, 2):
        y = ops.depthwise_conv2d(*depthwise, stride=stride, activation="silu")
        results += [y, *torch.autograd.grad(y.sin().sum(), depthwise)]
    return results


@cpu_only
def test_bit_equal_for_any_number_of_threads():
    arguments = scan_arguments(3, 200, 100, 5, dtype=torch.float32, requires_grad=True)
    image, weight = haar_arguments(3, 40, 9, 8, 5, dtype=torch.float32, requires_grad=True)
    depthwise = depthwise_arguments(5, 40, 37, 8, 5, dtype=torch.float32, requires_grad=True)[:3]
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            runs.append(run_all(arguments, image, weight, depthwise))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_called_from_several_threads():
    arguments = scan_arguments(2, 40, 30)
    expected = ops.bidirectional_scan(*arguments)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(ops.bidirectional_scan(*arguments))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(y, expected) for y in results)


# Autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_what_varies_and_keeps_parameters(dtype):
    arguments = scan_arguments(1, 8, 6, dtype=torch.float32, requires_grad=True)
    image, weight = haar_arguments(1, 3, 4, 4, 3, dtype=torch.float32, requires_grad=True)
    with torch.autocast(DEVICE.type, dtype):
        y, z = ops.bidirectional_scan(*arguments), ops.haar_conv2d(image, weight)
    assert y.dtype == z.dtype == dtype
    with torch.autocast(DEVICE.type, dtype):  # a model in the other 16-bit type
        other = torch.bfloat16 if dtype == torch.float16 else torch.float16
        assert ops.bidirectional_scan(*[x.to(other) for x in arguments]).dtype == dtype
        assert ops.haar_conv2d(image.to(other), weight.to(other)).dtype == dtype
    lowered = [x.to(dtype) if i in (0, 1, 3, 4) else x for i, x in enumerate(arguments)]
    assert torch.equal(y, ops.bidirectional_scan(*lowered))
    grads = torch.autograd.grad(y.float().sum() + z.float().sum(), [*arguments, image, weight])
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_depthwise(dtype):
    image, weight, bias, residual = depthwise_arguments(1, 3, 4, 4, 3, dtype=torch.float32, requires_grad=True)
    with torch.autocast(DEVICE.type, dtype):
        y = ops.depthwise_conv2d(image, weight, bias, residual)
        assert ops.depthwise_conv2d(image, weight).dtype == dtype
        other = torch.bfloat16 if dtype == torch.float16 else torch.float16
        assert ops.depthwise_conv2d(*[x.to(other) for x in (image, weight, bias, residual)]).dtype == dtype
    assert torch.equal(y, ops.depthwise_conv2d(image.to(dtype), weight, bias, residual.to(dtype)))
    grads = torch.autograd.grad(y.float().sum(), (image, weight, bias, residual))
    assert all(g.dtype == torch.float32 for g in grads)


# What is refused -----------------------------------------------------------------------------------------------------


def changed(arguments: list[Tensor], name: str, change) -> list[Tensor]:
    return [change(x) if n == name else x for n, x in zip(SCAN_NAMES, arguments, strict=True)]


REFUSED_SCANS = [
    ("u", lambda x: x[0], r"u has shape \[5, 7\], expected 3 dimensions \(batch, channels, length\)"),
    ("u", lambda x: x.long(), "u is Long, expected Float, Double, Half or BFloat16"),
    ("u", lambda x: x[:, :4], r"A_log has shape \[2, 5, 1\], expected \[2, 4, 1\] = \(2, channels, N\)"),
    ("delta", lambda x: x[:, :1], r"delta has shape \[2, 1, 3, 7\], expected \[2, 2, 3, 7\] = \(batch, 2, R, length\)"),
    ("delta", lambda x: x.double(), "delta is Double, expected Float like u"),
    ("A_log", lambda x: x[0], r"A_log has shape \[5, 1\], expected 3 dimensions \(2, channels, N\)"),
    (
        "B",
        lambda x: x.repeat(1, 1, 2, 1),
        r"B has shape \[2, 2, 2, 7\], expected \[2, 2, 1, 7\] = \(batch, 2, N, length",
    ),
    ("C", lambda x: x[..., :6], r"C has shape \[2, 2, 1, 6\], expected \[2, 2, 1, 7\]"),
    ("C", lambda x: x.half(), "C is Half, expected Float like u"),
    ("D", lambda x: x.t(), r"D has shape \[5, 2\], expected \[2, 5\] = \(2, channels\)"),
    ("D", lambda x: x.double(), "D is Double, expected Float like u"),
    ("dt_weight", lambda x: x[..., :2], r"dt_weight has shape \[2, 5, 2\], expected \[2, 5, 3\] = \(2, channels, R\)"),
    ("dt_bias", lambda x: x[:, :3], r"dt_bias has shape \[2, 3\], expected \[2, 5\]"),
    ("delta", lambda x: x.to("meta"), f"delta is on meta, expected {DEVICE} like u"),
    ("dt_bias", lambda x: x.to("meta"), f"dt_bias is on meta, expected {DEVICE} like u"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED_SCANS, ids=lambda x: x if isinstance(x, str) else "")
def test_scan_refuses(name, change, message):
    arguments = scan_arguments(2, 5, 7, 3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="bidirectional_scan: " + message):
        ops.bidirectional_scan(*changed(arguments, name, change))


def test_scan_refuses_no_states_or_rank():
    with pytest.raises(RuntimeError, match=r"delta has shape \[1, 2, 0, 3\], expected a rank R of at least 1"):
        ops.bidirectional_scan(*scan_arguments(1, 2, 3, rank=1)[:1], *empty_rank())
    arguments = scan_arguments(1, 2, 3)
    arguments[2], arguments[3], arguments[4] = arguments[2][..., :0], arguments[3][:, :, :0], arguments[4][:, :, :0]
    with pytest.raises(RuntimeError, match=r"A_log has shape \[2, 2, 0\], expected a state size N of at least 1"):
        ops.bidirectional_scan(*arguments)


def empty_rank() -> list[Tensor]:
    arguments = scan_arguments(1, 2, 3, rank=1)
    arguments[1], arguments[6] = arguments[1][:, :, :0], arguments[6][..., :0]
    return arguments[1:]


@pytest.mark.parametrize(
    ("image", "weight", "message"),
    [
        ((2, 3, 4), (12, 1, 3, 3), r"input has shape \[2, 3, 4\], expected 4 dimensions"),
        ((2, 3, 4, 4), (12, 3, 3), r"weight has shape \[12, 3, 3\], expected 4 dimensions \(4 \* channels, 1, k, k\)"),
        ((2, 3, 4, 4), (16, 1, 3, 3), r"weight has shape \[16, 1, 3, 3\], expected \[12, 1, 3, 3\]"),
        ((2, 3, 4, 4), (12, 1, 5, 3), r"weight has shape \[12, 1, 5, 3\], expected \[12, 1, 3, 3\]"),
        ((2, 3, 4, 4), (12, 1, 4, 4), r"weight has shape \[12, 1, 4, 4\], expected an odd kernel size k"),
    ],
    ids=str,
)
def test_haar_refuses_shapes(image, weight, message):
    with pytest.raises(RuntimeError, match="haar_conv2d: " + message):
        ops.haar_conv2d(torch.zeros(image), torch.zeros(weight))


def test_haar_refuses_dtypes_and_devices():
    image, weight = haar_arguments(1, 3, 4, 4, 3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="haar_conv2d: weight is Double, expected Float like input"):
        ops.haar_conv2d(image, weight.double())
    with pytest.raises(RuntimeError, match="haar_conv2d: input is Int, expected Float, Double, Half or BFloat16"):
        ops.haar_conv2d(image.int(), weight)
    with pytest.raises(RuntimeError, match=f"haar_conv2d: weight is on meta, expected {DEVICE} like input"):
        ops.haar_conv2d(image, weight.to("meta"))
    with pytest.raises(RuntimeError, match="kernel_size is 2, expected an odd number from 1 to 32767"):
        torch.ops.mobilemamba.haar_conv2d_backward_weight(image, image, 2)


DEPTHWISE_NAMES = ("input", "weight", "bias", "residual", "stride", "activation")
REFUSED_DEPTHWISE = [
    ("input", lambda x: x[0], r"input has shape \[5, 7, 6\], expected 4 dimensions \(batch, channels, height, width\)"),
    ("input", lambda x: x.int(), "input is Int, expected Float, Double, Half or BFloat16"),
    ("weight", lambda x: x[:, 0], r"weight has shape \[5, 3, 3\], expected 4 dimensions \(channels, 1, k, k\)"),
    ("weight", lambda x: x[:4], r"weight has shape \[4, 1, 3, 3\], expected \[5, 1, 3, 3\] = \(channels, 1, k, k\)"),
    ("weight", lambda x: x.repeat(1, 2, 1, 1), r"weight has shape \[5, 2, 3, 3\], expected \[5, 1, 3, 3\]"),
    ("weight", lambda x: x[:, :, :1], r"weight has shape \[5, 1, 1, 3\], expected \[5, 1, 3, 3\]"),
    (
        "weight",
        lambda x: x[:, :, :2, :2],
        r"weight has shape \[5, 1, 2, 2\], expected an odd kernel size k",
    ),
    ("weight", lambda x: x[:, :, :0, :0], r"weight has shape \[5, 1, 0, 0\], expected an odd kernel size k"),
    ("weight", lambda x: x.double(), "weight is Double, expected Float like input"),
    ("weight", lambda x: x.to("meta"), f"weight is on meta, expected {DEVICE} like input"),
    ("bias", lambda x: x[:4], r"bias has shape \[4\], expected \[5\] = \(channels\)"),
    ("bias", lambda x: x[None], r"bias has shape \[1, 5\], expected 1 dimensions \(channels\)"),
    ("bias", lambda x: x.half(), "bias is Half, expected Float like input"),
    (
        "residual",
        lambda x: x[:, :, :3],
        r"residual has shape \[2, 5, 3, 3\], expected \[2, 5, 4, 3\] = "
        r"\(batch, channels, ceil\(height / stride\), ceil\(width / stride\)\)",
    ),
    ("residual", lambda x: x.double(), "residual is Double, expected Float like input"),
    ("stride", lambda x: 0, "stride is 0, expected at least 1"),
    ("activation", lambda x: "gelu", 'activation is "gelu", expected "none", "relu" or "silu"'),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), REFUSED_DEPTHWISE, ids=lambda x: x if isinstance(x, str) else ""
)
def test_depthwise_refuses(name, change, message):
    arguments = [*depthwise_arguments(2, 5, 7, 6, 3, 2, dtype=torch.float32), 2, "relu"]
    changed = [change(x) if n == name else x for n, x in zip(DEPTHWISE_NAMES, arguments, strict=True)]
    with pytest.raises(RuntimeError, match="^depthwise_conv2d: " + message):
        ops.depthwise_conv2d(*changed)


def test_depthwise_backward_refuses():
    image, weight, bias, residual = depthwise_arguments(2, 5, 7, 6, 3, 2, dtype=torch.float32)
    backward = torch.ops.mobilemamba.depthwise_conv2d_backward
    with pytest.raises(
        RuntimeError, match=r"depthwise_conv2d_backward: grad_output has shape \[2, 5, 7, 6\], expected"
    ):
        backward(image, image, weight, bias, 2, "none")
    with pytest.raises(RuntimeError, match="depthwise_conv2d_backward: grad_output is Half, expected Float like input"):
        backward(residual.half(), image, weight, bias, 2, "none")
