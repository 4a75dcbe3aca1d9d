"""Convolution with batch normalisation as one operator: against torch's own layers, and in a model that trains."""

from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobilemamba
from mobilemamba import ops

# batch, in, out, height, width, kernel, stride; out = 0: depthwise
POINTWISE, DEPTHWISE, DENSE = (3, 5, 7, 6, 5, 1, 1), (3, 6, 0, 7, 5, 3, 2), (2, 3, 4, 7, 5, 3, 2)
SHAPES = [
    POINTWISE,
    DEPTHWISE,
    DENSE,
    (40, 24, 32, 5, 4, 1, 1),  # several blocks of rows, the last one partial
    (4, 96, 160, 16, 16, 1, 1),  # several parts and partial sums of the weight's gradient
    (2, 38, 0, 4, 4, 5, 1),  # rows that the kernels join
    (3, 12, 0, 3, 3, 1, 1),
    (2, 1, 1, 3, 3, 3, 1),
    (2, 24, 12, 60, 60, 3, 2),  # a dense convolution whose images are in parts
    (9, 3, 5, 6, 5, 3, 1),  # and one with several images in a part
]


def arguments_of(
    batch: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Images whose mean is far from zero, weights, and a residual."""
    torch.manual_seed(0)
    weight = torch.randn(out or channels, channels if out else 1, kernel, kernel) / kernel
    scale, shift = torch.rand(out or channels) + 0.5, torch.randn(out or channels)
    residual = torch.randn(batch, out or channels, -(-height // stride), -(-width // stride))
    tensors = [torch.randn(batch, channels, height, width) + 3, weight, scale, shift, residual]
    images = [0, 4]
    return [x.to(dtype, memory_format=torch.channels_last if i in images else None) for i, x in enumerate(tensors)]


def by_torch(
    input: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    groups = input.size(1) // weight.size(1)
    y = F.conv2d(input, weight, None, stride, weight.size(3) // 2, groups=groups)
    y = F.batch_norm(y, None, None, scale, shift, training=True)
    y = y.relu() if activation == "relu" else y
    return y if residual is None else y + residual


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_in_float64(shape, activation):
    arguments = [x.requires_grad_() for x in arguments_of(*shape)]
    for given in (arguments, [*arguments[:4], None]):
        y, mean, var = ops.conv_norm(*given, shape[-1], activation)
        expected = by_torch(*given, shape[-1], activation)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not mean.requires_grad
        assert not var.requires_grad
        wanted, grad = [x for x in given if x is not None], torch.randn_like(y)
        actual = torch.autograd.grad(y, wanted, grad)
        for a, b in zip(actual, torch.autograd.grad(expected, wanted, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_lower_precision(shape, dtype):
    """Against float64, with the tolerance of the type; without a ReLU, whose threshold rounding crosses."""
    arguments = [x.requires_grad_() for x in arguments_of(*shape, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in arguments]
    y, expected = ops.conv_norm(*arguments, shape[-1])[0], by_torch(*exact, shape[-1], "none")
    grad = torch.randn_like(y)
    pairs = [(y, expected)]
    actual = torch.autograd.grad(y, arguments, grad)
    pairs += zip(actual, torch.autograd.grad(expected, exact, grad.double()), strict=True)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for a, b in pairs:
        assert a.dtype == dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_statistics_of_values_far_from_zero():
    """A mean of 1000 times the standard deviation leaves the variance three digits in float32."""
    x = (torch.randn(8, 16, 9, 9) + 1000).to(memory_format=torch.channels_last)
    weight = torch.ones(16, 1, 1, 1)
    y, mean, var = ops.conv_norm(x, weight, torch.ones(16), torch.zeros(16))
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(y.double(), F.batch_norm(x.double(), None, None, training=True), rtol=1e-3, atol=1e-3)


def test_takes_any_strides_and_a_slice_of_channels():
    x, weight, scale, shift, _ = arguments_of(3, 20, 7, 6, 5, 1, 1)
    part = x[:, 4:9]
    expected = by_torch(part, weight[:, :5], scale, shift, None, 1, "relu")
    for image in (part, part.contiguous(), part.transpose(2, 3).contiguous().transpose(2, 3)):
        y, _, _ = ops.conv_norm(image, weight[:, :5], scale, shift, activation="relu")
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("shape", "images"), [((4, 16, 16, 8, 8, 1, 1), 2), ((4, 16, 0, 8, 8, 3, 1), 1)], ids=str)
def test_what_is_kept_for_the_backward_pass(shape, images):
    """The input; of a product also its output. By torch the norm's output would be kept for the ReLU."""
    arguments = [x.requires_grad_() for x in arguments_of(*shape)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.conv_norm(*arguments, 1, "relu")
    assert sum(x.nbytes for x in kept if x.dim() == 4 and x.size(2) == 8) == images * arguments[0].nbytes


SMALL = {"pointwise": (2, 2, 3, 2, 1, 1, 1), "depthwise": (2, 2, 0, 3, 1, 3, 2), "dense": (2, 2, 3, 3, 1, 3, 2)}


@pytest.mark.parametrize("kind", SMALL)
def test_gradcheck_and_opcheck(kind):
    shape = SMALL[kind]
    arguments = [x.requires_grad_() for x in arguments_of(*shape)]
    options = (shape[-1], "relu", 1e-5)
    assert torch.autograd.gradcheck(lambda *x: ops.conv_norm(*x, *options)[0], arguments)
    if kind != "pointwise":  # torch's checks take seconds
        return
    torch.library.opcheck(torch.ops.mobilemamba.conv_norm, (*arguments, *options))
    detached = [x.detach() for x in arguments]
    y, mean, var, convolved = torch.ops.mobilemamba.conv_norm(*detached, *options)
    for input_gradient in (True, False):
        backward = (y, *detached[:4], convolved, mean, var, *options, input_gradient)
        torch.library.opcheck(torch.ops.mobilemamba.conv_norm_backward, backward)


@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[5], (1, 24, 12, 60, 60, 3, 2)], ids=str)
def test_bit_equal_for_any_number_of_threads(shape):
    arguments = [x.requires_grad_() for x in arguments_of(*shape, dtype=torch.float32)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y, mean, var = ops.conv_norm(*arguments, shape[-1], "relu")
            results.append([y, mean, var, *torch.autograd.grad(y.sin().sum(), arguments)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 4, 1, 1)}, r"conv_norm: weight has shape \[7, 4, 1, 1\], expected \[7, 5, 1, 1\]"),
        ({"weight": torch.zeros(7, 5, 2, 2)}, "expected an odd kernel size k"),
        ({"norm_bias": torch.zeros(6)}, r"conv_norm: norm_bias has shape \[6\], expected \[7\]"),
        ({"residual": torch.zeros(3, 7, 6, 4)}, r"conv_norm: residual has shape \[3, 7, 6, 4\]"),
        ({"input": torch.zeros(1, 5, 1, 1), "residual": None}, "expected more than one position"),
        ({"activation": "silu"}, 'conv_norm: activation is "silu", expected "none" or "relu"'),
        ({"stride": 0}, "conv_norm: stride is 0, expected at least 1"),
    ],
)
def test_refuses(change, message):
    names = ("input", "weight", "norm_weight", "norm_bias", "residual")
    arguments = dict(zip(names, arguments_of(*POINTWISE, dtype=torch.float32), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        ops.conv_norm(**arguments)


# In a model ----------------------------------------------------------------------------------------------------------


def network(**options: object) -> mobilemamba.MobileMamba:
    torch.manual_seed(0)
    model = mobilemamba.nano(depths=(1, 1, 0), **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)  # many start as zero
    return model


def test_a_training_step_is_that_of_torchs_layers(monkeypatch):
    """Values, gradients and running statistics, in float64."""
    images, steps = torch.randn(3, 1, 13, 12, dtype=torch.float64), []
    used = []
    for operator in (ops.conv_norm, ops.ffn_norm):
        wrapped = partial(lambda operator, *x: used.append(operator) or operator(*x), operator)
        monkeypatch.setattr(mobilemamba.models.layers, operator.__name__, wrapped)
    for plain in (False, True):
        model = network().double().train()
        if plain:
            with reference.plain_pytorch():
                y = model(images)
        else:
            y = model(images)
        y.square().sum().backward()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        steps.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    both = used.count(ops.conv_norm), used.count(ops.ffn_norm)
    assert both[0] + 2 * both[1] == len(norms)  # each norm once: none in plain PyTorch
    assert both[1] == sum(isinstance(m, mobilemamba.models.layers.FFN) for m in model.modules())
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.eval(),  # frozen
        lambda norm: norm.register_forward_hook(lambda *_: None),
        lambda norm: setattr(norm, "momentum", None),  # an average of all batches
        lambda norm: setattr(norm, "weight", None),
    ],
    ids=["frozen", "hook", "momentum", "affine"],
)
def test_other_norms_are_called(change, monkeypatch):
    layer = mobilemamba.models.layers.ConvNorm(4, 8)
    change(layer.norm)
    monkeypatch.setattr(mobilemamba.models.layers, "conv_norm", lambda *_: pytest.fail("the operator was called"))
    layer(torch.randn(2, 4, 3, 3))


def test_a_norm_without_running_statistics():
    layer = mobilemamba.models.layers.ConvNorm(4, 8).eval()
    layer.norm = nn.BatchNorm2d(8, track_running_stats=False)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer.eval()(x), layer.norm(layer.conv(x)))


def test_a_single_position_is_refused_by_torch():
    layer = mobilemamba.models.layers.ConvNorm(4, 8, 3, 2)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_images_and_matrices(dtype):
    arguments = arguments_of(*POINTWISE, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y, mean, _ = ops.conv_norm(*arguments)
    assert (y.dtype, mean.dtype) == (dtype, torch.float32)
