"""The convolution on a packed weight: against torch's in float64, layouts, gradients, refusals."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from devices import randn
from hypothesis import given
from hypothesis import strategies as st
from test_operators import LOW_PRECISION, check_against_reference, relative_error
from torch import Tensor

import mobilemamba
from mobilemamba import ops
from mobilemamba.models.folded import Folded

SHAPES = [  # batch, in_channels, out_channels, height, width, kernel_size, stride
    (2, 6, 5, 3, 4, 1, 1),
    (1, 75, 45, 7, 7, 1, 1),  # odd, and partial panels
    (3, 33, 70, 5, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 1),
    (1, 64, 96, 10, 10, 1, 1),  # rows of more than one task, whole tiles
    (2, 17, 33, 1, 9, 1, 1),
    (2, 3, 24, 21, 22, 3, 2),  # as in a patch embedding
    (1, 24, 48, 8, 9, 3, 2),
    (2, 5, 40, 5, 4, 5, 1),
    (2, 33, 7, 6, 5, 1, 3),
    (1, 4, 6, 1, 2, 7, 2),  # a kernel larger than the image
]


def arguments_of(
    batch: int,
    inputs: int,
    outputs: int,
    height: int,
    width: int,
    kernel: int = 1,
    stride: int = 1,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Input, weight (not packed), bias and residual."""
    generator = torch.Generator().manual_seed(0)
    result = (batch, outputs, -(-height // stride), -(-width // stride))
    shapes = [(batch, inputs, height, width), (outputs, inputs, kernel, kernel), (outputs,), result]
    x, weight, bias, residual = (randn(*shape, generator=generator) for shape in shapes)
    return [y.to(dtype) for y in (x, weight / inputs**0.5 / kernel, bias, residual)]


def packing(activation: str = "none", stride: int = 1):
    """The operator as a function of the weight before packing."""
    return lambda x, w, b, r=None: ops.packed_conv2d(x, ops.pack_conv2d_weight(w), b, r, w.size(3), stride, activation)


def plain(activation: str = "none", stride: int = 1):
    def function(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, w, b, stride, w.size(3) // 2)
        y = y.relu() if activation == "relu" else y
        return y if r is None else y + r

    return function


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64(shape, activation):
    for count in (3, 4):
        check_against_reference(
            packing(activation, shape[-1]), plain(activation, shape[-1]), arguments_of(*shape)[:count]
        )


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_lower_precision(shape, dtype):
    arguments = arguments_of(*shape, dtype=dtype)
    operators = packing(stride=shape[-1]), plain(stride=shape[-1])
    check_against_reference(*operators, arguments, 2 * LOW_PRECISION[dtype])
    if dtype != torch.float32:
        arguments[2] = arguments[2].float()
        check_against_reference(*operators, arguments, 2 * LOW_PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [7, 8])
@pytest.mark.parametrize(("outputs", "kernel"), [(4250, 1), (8450, 1), (4250, 3), (8450, 3), (33800, 3)])
def test_in_lower_precision_with_many_outputs(outputs, kernel, inputs, dtype):
    """On CUDA many tasks mean larger tiles: each of the kernel's shapes, with and without aligned pixels."""
    arguments = arguments_of(2, inputs, outputs, 5, 4, kernel, dtype=dtype)
    arguments[0] = arguments[0].contiguous(memory_format=torch.channels_last)
    y, expected = packing("relu")(*arguments), plain("relu")(*[x.double() for x in arguments])
    assert relative_error(y, expected) < LOW_PRECISION[dtype]


@given(
    st.integers(1, 3),
    st.integers(1, 200),
    st.integers(1, 140),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([1, 1, 3, 5]),
    st.integers(1, 3),
    st.sampled_from(sorted(LOW_PRECISION, key=str)),
)
def test_on_random_shapes(batch, inputs, outputs, height, width, kernel, stride, dtype):
    arguments = arguments_of(batch, inputs, outputs, height, width, kernel, stride, dtype)
    y, expected = packing("relu", stride)(*arguments), plain("relu", stride)(*[x.double() for x in arguments])
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else LOW_PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [191, 192, 193, 320, 321, 385, 1500])
@pytest.mark.parametrize("rows", [1, 13, 193, 400])
def test_where_the_kernel_divides_inputs_and_rows(rows, inputs, dtype):
    arguments = arguments_of(1, inputs, 45, rows, 1, dtype=dtype)
    y, expected = packing("relu")(*arguments), plain("relu")(*[x.double() for x in arguments])
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else LOW_PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [1, 3, 21, 32, 33, 63, 65, 107, 161])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 3)])
def test_where_the_kernel_divides_patches(kernel, stride, inputs, dtype):
    """Into lines, which reach over the border or not, and pieces of them."""
    for width in (1, 2, 9, 30):
        arguments = arguments_of(2, inputs, 24, 8, width, kernel, stride, dtype)
        y, expected = packing("relu", stride)(*arguments), plain("relu", stride)(*[x.double() for x in arguments])
        assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else LOW_PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_of_few_channels(stride, inputs, dtype):
    """The first layer of a network; on CUDA lines of patches fit an instruction, and parts of lines are tasks."""
    sizes = [(2, 24, 5, width) for width in (1, 2, 15, 16, 17, 50)] + [(1, 32, 1, 33), (2, 9, 4, 20)]
    sizes += [(900, 8, 9, 18)] if inputs == 3 else []  # more lines than warps
    for batch, outputs, height, width in sizes:
        x, *others = arguments_of(batch, inputs, outputs, height, width, 3, stride, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        y, expected = packing("relu", stride)(x, *others), plain("relu", stride)(*[t.double() for t in (x, *others)])
        assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else LOW_PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinity_stays_in_its_patches(dtype):
    x, weight, bias, _ = arguments_of(2, 3, 24, 6, 21, 3, 2, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = packing(stride=2)(x, weight, bias)
    for row, column in ((0, 0), (3, 20), (5, 8)):
        infinite = x.clone(memory_format=torch.preserve_format)
        infinite[0, 1, row, column] = torch.inf
        y = packing(stride=2)(infinite, weight, bias)
        reached = plain(stride=2)(infinite.double(), weight.double(), bias.double()).isfinite().logical_not()
        assert 0 < reached.sum() < 24 * 5
        assert not y[reached].isfinite().any()
        assert torch.equal(y[~reached], expected[~reached])


def test_refuses_no_channels():
    for out, inputs, message in (
        (5, 0, r"input has .*, expected in_channels of at"),
        (0, 5, "bias has .*, expected out_"),
    ):
        weight = ops.pack_conv2d_weight(torch.zeros(out, inputs, 1, 1))
        with pytest.raises(RuntimeError, match="^packed_conv2d: " + message):
            ops.packed_conv2d(torch.zeros(2, inputs, 3, 4), weight, torch.zeros(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_any_strides(dtype):
    x, weight, bias, residual = arguments_of(2, 20, 40, 7, 6, dtype=dtype)
    check_any_strides(packing("relu"), x, weight, bias, residual)
    x, weight, bias, residual = arguments_of(2, 20, 40, 7, 6, 3, 2, dtype)
    check_any_strides(packing("relu", stride=2), x, weight, bias, residual)


def check_any_strides(operator, x, weight, bias, residual):
    expected = operator(x, weight, bias, residual)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    last = torch.channels_last
    wide = torch.cat([x, x, x], 1).contiguous(memory_format=last)
    for variant in (
        x.contiguous(memory_format=last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, 20:40],
        torch.stack([x, x], 3).contiguous(memory_format=torch.channels_last_3d)[:, :, :, 1],
    ):
        assert torch.equal(operator(variant, weight, bias, residual), expected)
        assert torch.equal(operator(x, weight, bias, residual.contiguous(memory_format=last)), expected)
    empty = operator(x[:0], weight, bias, residual[:0])
    assert empty.shape == (0, *expected.shape[1:])


def test_no_number_beyond_the_channels_is_used():
    """Rows end where they end, also for an odd number of channels."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.full((1, 4, 4, 12), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
        x, weight, bias, _ = arguments_of(1, 7, 5, 4, 4, dtype=dtype)
        wide[:, 2:9] = x
        assert torch.equal(packing()(wide[:, 2:9], weight, bias), packing()(x, weight, bias))


def test_gradcheck():
    for activation, shape in (("none", (2, 3, 5, 2, 3)), ("relu", (2, 3, 5, 2, 3)), ("relu", (1, 2, 3, 4, 5, 3, 2))):
        arguments = [x.requires_grad_() for x in arguments_of(*shape)]
        operator = packing(activation, stride=(*shape, 1, 1)[6])
        assert torch.autograd.gradcheck(operator, arguments)
        assert torch.autograd.gradgradcheck(operator, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_equal_for_any_number_of_threads(dtype):
    arguments = arguments_of(2, 60, 100, 14, 14, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(packing()(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, weight, bias, residual = arguments_of(1, 6, 5, 3, 3, dtype=torch.float32)
    packed = ops.pack_conv2d_weight(weight)
    with torch.autocast(x.device.type, dtype):
        y = ops.packed_conv2d(x, packed, bias, residual)
    assert torch.equal(y, ops.packed_conv2d(x.to(dtype), packed.to(dtype), bias, residual.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, residual = (y.requires_grad_() for y in arguments_of(2, 3, 5, 4, 3, dtype=dtype))
    packed = ops.pack_conv2d_weight(weight.detach()).requires_grad_()
    checks = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for activation in ("none", "relu"):
        arguments = (x, packed, bias, residual, 1, 1, activation)
        torch.library.opcheck(torch.ops.mobilemamba.packed_conv2d, arguments, **checks)
    x, weight, bias, _ = (y.requires_grad_() for y in arguments_of(2, 3, 5, 4, 3, 3, 2, dtype=dtype))
    packed = ops.pack_conv2d_weight(weight.detach()).requires_grad_()
    torch.library.opcheck(torch.ops.mobilemamba.packed_conv2d, (x, packed, bias, None, 3, 2, "relu"), **checks)


def test_packing_is_exact():
    _, weight, _, _ = arguments_of(1, 33, 70, 1, 1)
    packed = ops.pack_conv2d_weight(weight)
    assert packed.shape == (3, 17, 32, 2)
    panels = packed.permute(0, 2, 1, 3).reshape(96, 34)
    assert torch.equal(panels[:70, :33], weight.flatten(1))
    assert not panels[70:].any()
    assert not panels[:, 33:].any()


REFUSED = [
    ("input", lambda x: x[0], r"input has shape \[3, 2, 2\], expected 4 dimensions"),
    (
        "weight",
        lambda x: x[:, :1],
        r"weight has shape \[2, 1, 32, 2\], expected \[2, 2, 32, 2\] = as packed: \(ceil\(out",
    ),
    ("weight", lambda x: x.double(), "weight is Double, expected Float like input"),
    ("bias", lambda x: x[:5], r"weight has shape \[2, 2, 32, 2\], expected \[1, 2, 32, 2\]"),
    ("bias", lambda x: x.long(), "bias is Long, expected Float like input"),
    ("residual", lambda x: x[:, :3], r"residual has shape \[1, 3, 2, 2\], expected \[1, 40, 2, 2\]"),
    ("residual", lambda x: x.half(), "residual is Half, expected Float like input"),
    ("kernel_size", lambda x: 2, "kernel_size is 2, expected an odd number"),
    ("stride", lambda x: 0, "stride is 0, expected at least 1"),
    ("activation", lambda x: "silu", 'activation is "silu", expected "none" or "relu"'),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refuses(name, change, message):
    x, weight, bias, residual = arguments_of(1, 3, 40, 2, 2, dtype=torch.float32)
    arguments = {"input": x, "weight": ops.pack_conv2d_weight(weight), "bias": bias, "residual": residual}
    arguments |= {"kernel_size": 1, "stride": 1, "activation": "none"}
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match="^packed_conv2d: " + message):
        ops.packed_conv2d(**arguments)


# Packed weights in models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused() -> torch.nn.Module:
    torch.manual_seed(0)
    return mobilemamba.nano(in_chans=3).fuse()


@torch.no_grad()
def test_packed_models_are_copied_pickled_saved_and_scripted(fused):
    assert all(m.packed for m in fused.modules() if isinstance(m, Folded))
    x = torch.randn(2, 3, 40, 33)
    expected = fused(x)
    other = mobilemamba.nano(in_chans=3).fuse()
    other.load_state_dict(fused.state_dict())
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(fused), file)
    file.seek(0)
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), other, torch.jit.load(file)]
    assert all(torch.equal(model(x), expected) for model in copies)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_packed_models_change_their_type(fused, dtype):
    x = torch.randn(2, 3, 40, 33)
    model = copy.deepcopy(fused).to(dtype)
    y, expected = model(x.to(dtype)), fused(x)
    assert y.dtype == dtype
    assert ((y - expected).double().abs().max() / expected.std()).item() < (1e-4 if dtype == torch.float64 else 3e-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_parameters_stay_float32(fused, dtype):
    """However a fused model comes to 16 bits; and none leaves the order or the memory that it has."""

    def types(model):
        return {name: parameter.dtype for name, parameter in model.named_parameters()}

    def matrices(model):
        parts = [(name, m) for name, m in model.named_modules() if isinstance(m, Folded)]
        return {f"{name}.{matrix}" for name, m in parts for matrix in m.matrices}

    torch.manual_seed(0)
    network = mobilemamba.nano(in_chans=3)
    wanted = {name: dtype if name in matrices(fused) else torch.float32 for name in types(fused)}
    lowered = network.fuse().to(dtype)
    assert set(wanted.values()) == {dtype, torch.float32}
    for model in (lowered, network.to(dtype).fuse(), copy.deepcopy(fused).to("cpu", dtype), lowered.to("cpu")):
        assert types(model) == wanted
    assert set(types(copy.deepcopy(lowered).float()).values()) == {torch.float32}
    assert set(types(copy.deepcopy(lowered).double()).values()) == {torch.float64}

    strides = [parameter.stride() for parameter in fused.parameters()]
    moved = copy.deepcopy(fused).to(dtype, memory_format=torch.channels_last)
    assert [parameter.stride() for parameter in moved.parameters()] == strides
    assert all(parameter.is_shared() for parameter in copy.deepcopy(lowered).share_memory().parameters())

    # rounded parameters that somebody has assigned are not changed behind their back
    short = {name: tensor.to(dtype) for name, tensor in fused.state_dict().items()}
    moved.load_state_dict(short, assign=True)
    assert set(types(moved.to("cpu")).values()) == {dtype}
    assert all(parameter.is_shared() for parameter in moved.share_memory().parameters())
