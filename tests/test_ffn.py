"""The feed-forward layer as one operator: against plain PyTorch in float64, layouts, threads, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, cpu_only, randn
from hypothesis import given
from hypothesis import strategies as st
from test_operators import LOW_PRECISION, check_against_reference, relative_error, same
from torch import Tensor

import mobilemamba
from mobilemamba import ops
from mobilemamba.models import backbone, layers
from mobilemamba.models.folded import fold_batchnorm

NAMES = ("input", "residual", "expand_weight", "expand_bias", "project_weight", "project_bias")
MATRICES = (2, 4)

SHAPES = [  # batch, channels, height, width, hidden
    (2, 6, 3, 4, 12),
    (1, 75, 7, 7, 150),  # odd, and partial panels
    (3, 33, 5, 1, 70),
    (1, 1, 1, 1, 1),
    (1, 48, 14, 14, 96),  # enough rows for chunks
    (5, 20, 9, 7, 1500),  # chunks as small as they may be, the last one smaller
    (2, 3, 16, 17, 5),
]
WIDE = [  # on CUDA the one kernel's tiles: two or four warps beside each other, of 96 or 112 outputs, whole or not
    (1, 134, 7, 15, 270),
    (2, 200, 3, 20, 400),
    (1, 376, 5, 7, 752),
    (3, 447, 4, 3, 33),
]


def arguments_of(
    batch: int, channels: int, height: int, width: int, hidden: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """In the order of ``NAMES``."""
    generator = torch.Generator().manual_seed(0)
    image = (batch, channels, height, width)
    shapes = [image, image, (hidden, channels), (hidden,), (channels, hidden), (channels,)]
    scales = [1, 1, channels, 1, hidden, 1]
    return [
        (randn(*shape, generator=generator) / scale**0.5).to(dtype) for shape, scale in zip(shapes, scales, strict=True)
    ]


def packed(arguments: list[Tensor]) -> list[Tensor]:
    return [ops.pack_conv2d_weight(x[:, :, None, None]) if i in MATRICES else x for i, x in enumerate(arguments)]


def packing(*arguments: Tensor | None) -> Tensor:
    """The operator as a function of the matrices before packing."""
    return ops.ffn(*packed(arguments))


def plain(x: Tensor, residual: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = F.conv2d(x, w1[:, :, None, None], b1).relu()
    y = x + F.conv2d(hidden, w2[:, :, None, None], b2)
    return y if residual is None else y + residual


FORMS = pytest.mark.parametrize("function", [ops.ffn, packing], ids=["plain", "packed"])


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64(shape, function):
    check_against_reference(function, plain, arguments_of(*shape))
    x, _, *weights = arguments_of(*shape)
    assert relative_error(function(x, None, *weights), plain(x, None, *weights)) < 1e-12


@FORMS
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_lower_precision(shape, dtype, function):
    """Values and gradients; the hidden activations are rounded as well."""
    arguments = arguments_of(*shape, dtype=dtype)
    check_against_reference(function, plain, arguments, 2 * LOW_PRECISION[dtype])
    if dtype != torch.float32:
        arguments = [x.float() if x.dim() == 1 else x for x in arguments]
        check_against_reference(function, plain, arguments, 2 * LOW_PRECISION[dtype])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_in_lower_precision(shape, dtype, residual):
    """Of channels-last images, and of slices of wider ones."""
    arguments = arguments_of(*shape, dtype=dtype)
    exact = [x.double() for x in arguments]
    if not residual:
        arguments[1] = exact[1] = None
    expected = plain(*exact)
    wide = torch.cat([arguments[0]] * 3, 1).contiguous(memory_format=torch.channels_last)
    for x in (arguments[0], wide[:, shape[1] : 2 * shape[1]]):
        assert relative_error(packing(x, *arguments[1:]), expected) < 2 * LOW_PRECISION[dtype]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("hidden", [1, 33, 70])
def test_infinity_stays_in_the_hidden_channels_that_have_it(hidden, dtype):
    """No hidden channel beyond the last one may make a NaN of it: -infinity becomes 0, and the output finite."""
    x, _, *weights = arguments_of(1, 40, 2, 3, hidden, dtype=dtype)
    weights[0][:, 7] = -weights[0][:, 7].abs() - 1
    x[0, 7, 1, 2] = torch.inf
    y = packing(x, None, *weights)
    assert y[0, 7, 1, 2] == torch.inf
    y[0, 7, 1, 2] = 0
    assert y.isfinite().all()
    expected = plain(x.double(), None, *[w.double() for w in weights])
    expected[0, 7, 1, 2] = 0
    assert relative_error(y, expected) < 2 * LOW_PRECISION[dtype]


@pytest.mark.skipif(DEVICE.type != "cuda", reason=f"tests kernels of CUDA, not {DEVICE}")
@pytest.mark.parametrize("form", ["kernel", "products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE, (256, 192, 14, 14, 384), (256, 384, 7, 7, 768)], ids=str)
def test_both_forms_on_cuda(shape, dtype, form, monkeypatch):
    """The one kernel and two products, whatever the library chooses for the size; the same bits every time."""
    monkeypatch.setenv("MOBILEMAMBA_CUDA_FORM", form)
    arguments = arguments_of(*shape, dtype=dtype)
    y = packing(*arguments)
    assert relative_error(y, plain(*[x.double() for x in arguments])) < 2 * LOW_PRECISION[dtype]
    assert all(torch.equal(packing(*arguments), y) for _ in range(10))


@given(
    st.integers(1, 4),
    st.integers(1, 100),
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from(sorted(LOW_PRECISION, key=str)),
)
def test_on_random_shapes(batch, channels, height, width, hidden, residual, dtype):
    arguments = arguments_of(batch, channels, height, width, hidden, dtype)
    exact = [x.double() for x in arguments]
    if not residual:
        arguments[1] = exact[1] = None
    assert relative_error(packing(*arguments), plain(*exact)) < 2 * LOW_PRECISION[dtype]


@FORMS
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 4), (1, 5, 1, 1, 3), (1, 1, 2, 1, 1)], ids=str)
def test_gradcheck_in_every_input_and_weight(shape, function):
    arguments = [x.requires_grad_() for x in arguments_of(*shape)]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradcheck(lambda x, *weights: function(x, None, *weights), [arguments[0], *arguments[2:]])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, pack, residual):
    arguments = arguments_of(*SHAPES[0], dtype=dtype)
    arguments = [x.requires_grad_() for x in (packed(arguments) if pack else arguments)]
    if not residual:
        arguments[1] = None
    checks = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.mobilemamba.ffn, arguments, **checks)
    x, _, *weights = (None if y is None else y.detach() for y in arguments)
    torch.library.opcheck(torch.ops.mobilemamba.ffn_backward, [torch.randn_like(x), x, *weights])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:5], (0, 3, 2, 2, 4), (2, 3, 1, 1, 4), (2, 1, 3, 2, 4)], ids=str)
def test_meta_has_the_shapes_strides_and_dtypes_of_the_real_backends(shape, dtype):
    x, residual, *weights = packed(arguments_of(*shape, dtype=dtype))
    arguments = {"ffn": (x, residual, *weights), "ffn_backward": (residual, x, *weights)}
    for name, tensors in arguments.items():
        operator = getattr(torch.ops.mobilemamba, name)
        real, meta = operator(*tensors), operator(*[y.to("meta") for y in tensors])
        for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (real, meta)), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_takes_any_strides(shape, dtype, function):
    x, residual, *weights = arguments_of(*shape, dtype=dtype)
    expected = function(x, residual, *weights)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    last, channels = torch.channels_last, x.size(1)
    for change in (
        lambda y: y.contiguous(memory_format=last),
        lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
        lambda y: torch.cat([y, y, y], 1).contiguous(memory_format=last)[:, channels : 2 * channels],
    ):
        assert same(function(change(x), residual, *weights), expected)
        assert same(function(x, change(residual), *weights), expected)
    strided = [torch.stack([w, w], -1)[..., 0] for w in weights]
    assert same(function(x, residual, *strided), expected)
    assert function(x[:0], residual[:0], *weights).shape == (0, *x.shape[1:])


@FORMS
def test_an_empty_batch_has_zero_gradients(function):
    x, _, *weights = (y.requires_grad_() for y in arguments_of(*SHAPES[0]))
    grads = torch.autograd.grad(function(x[:0], None, *weights).sum(), weights)
    assert not any(grad.any() for grad in grads)


def test_takes_its_input_as_residual():
    for dtype in (torch.float32, torch.bfloat16):
        x, _, *weights = arguments_of(*SHAPES[4], dtype=dtype)
        assert torch.equal(packing(x, x, *weights), packing(x, x.clone(), *weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    arguments = arguments_of(*SHAPES[0], dtype=torch.float32)
    with torch.autocast(arguments[0].device.type, dtype):
        y = ops.ffn(*arguments)
    assert torch.equal(y, ops.ffn(*[x if x.dim() == 1 else x.to(dtype) for x in arguments]))


@cpu_only
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 20, 7, 7, 40),  # chunks for one thread only
        (1, 48, 14, 14, 96),  # and for up to four
        (1, 33, 48, 1, 70),
        (3, 40, 21, 5, 2000),
        (4, 75, 17, 13, 150),
    ],
    ids=str,
)
def test_bit_equal_for_any_number_of_threads_and_however_rows_are_cut(shape, dtype):
    x, residual, *weights = arguments_of(*shape, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            results.append(packing(x, residual, *weights))
        torch.set_num_threads(1)
        for y, single, added in zip(results[0], x, residual, strict=True):
            rows = [packing(single[None, :, i : i + 1], added[None, :, i : i + 1], *weights) for i in range(x.size(2))]
            assert torch.equal(torch.cat(rows, 2)[0], y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@cpu_only
def test_chunks_need_no_memory_for_all_hidden_activations():
    arguments = packed(arguments_of(4, 32, 64, 64, 64, dtype=torch.float32))
    arguments[:2] = [x.contiguous(memory_format=torch.channels_last) for x in arguments[:2]]
    with torch.profiler.profile(profile_memory=True) as profile:
        y = ops.ffn(*arguments)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert y.nbytes <= allocated < y.nbytes + 4 * 64 * 64 * 64 * y.element_size() / 2


REFUSED = [
    ("input", lambda x: x[0], r"input has shape .*, expected 4 dimensions \(batch, channels, height, width\)"),
    ("input", lambda x: x.int(), "input is Int, expected Float, Double, Half or BFloat16"),
    ("input", lambda x: x[:, :5], r"expand_weight has shape \[12, 6\], expected \[12, 5\] = \(out, in\)"),
    ("residual", lambda x: x[:, :3], r"residual has shape \[2, 3, 3, 4\], expected \[2, 6, 3, 4\]"),
    ("residual", lambda x: x[0], "residual has shape .*, expected 4 dimensions"),
    ("residual", lambda x: x.half(), "residual is Half, expected Float like input"),
    ("expand_weight", lambda x: x.t(), r"expand_weight has shape \[6, 12\], expected \[12, 6\] = \(out, in\)"),
    ("expand_weight", lambda x: x[0], r"expand_weight has shape \[6\], expected 2 dimensions \(out, in\)"),
    ("expand_weight", lambda x: x[:, :, None, None], r"expand_weight has shape .* \[1, 3, 32, 2\] = as packed"),
    ("expand_weight", lambda x: x.double(), "expand_weight is Double, expected Float like input"),
    ("expand_bias", lambda x: x[None], r"expand_bias has shape \[1, 12\], expected 1 dimensions \(hidden\)"),
    ("expand_bias", lambda x: x[:0], r"expand_bias has shape \[0\], expected a hidden width of at least 1"),
    ("expand_bias", lambda x: x.half(), "expand_bias is Half, expected Float like input"),
    ("project_weight", lambda x: x[:, 1:], r"project_weight has shape \[6, 11\], expected \[6, 12\] = \(out, in\)"),
    ("project_weight", lambda x: x[:, :, None, None], r"project_weight has shape .* \[1, 6, 32, 2\] = as packed"),
    ("project_weight", lambda x: x.bfloat16(), "project_weight is BFloat16, expected Float like input"),
    ("project_bias", lambda x: x[1:], r"project_bias has shape \[5\], expected \[6\] = \(channels\)"),
    ("project_bias", lambda x: x.double(), "project_bias is Double, expected Float like input"),
    ("project_bias", lambda x: x.to("meta"), "project_bias is on meta, expected .* like input"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refuses(name, change, message):
    arguments = arguments_of(*SHAPES[0], dtype=torch.float32)
    i = NAMES.index(name)
    arguments[i] = change(arguments[i])
    with pytest.raises(RuntimeError, match="^ffn: " + message):
        ops.ffn(*arguments)


def test_backward_refuses():
    x, _, *weights = arguments_of(*SHAPES[0])
    with pytest.raises(RuntimeError, match=r"^ffn_backward: grad_output has shape .*, expected \[2, 6, 3, 4\]"):
        torch.ops.mobilemamba.ffn_backward(x[:, 1:], x, *weights)
    with pytest.raises(RuntimeError, match=r"^ffn_backward: grad_output is Float, expected Double like input"):
        torch.ops.mobilemamba.ffn_backward(x.float(), x, *weights)


@torch.no_grad()
def test_modules_fold_to_the_operator():
    """The layer, and the block around it with its own residual; statistics are not those of a fresh BatchNorm."""
    torch.manual_seed(0)
    mixer = mobilemamba.MRFFI(32, 0.5, 0.25, 3, (3,))
    for module, count in (
        (layers.FFN(32), 1),
        (backbone.Block(32, mixer, 0.5), 2),
    ):
        module.double().eval()
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for tensor in (norm.weight, norm.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (norm.bias, norm.running_mean):
                    tensor.normal_()
        x = torch.randn(2, 32, 9, 6, dtype=torch.float64)
        expected = module(x)
        folded = fold_batchnorm(module)
        parts = [part for part in folded.modules() if isinstance(part, layers.FoldedFFN)]
        assert len(parts) == count
        assert type(folded) in (layers.FoldedFFN, backbone.FoldedBlock)
        assert relative_error(folded(x), expected) < 1e-12
        for part in parts:
            assert {name for name, _ in part.named_parameters()} == set(NAMES[2:])
            part.pack()
        assert relative_error(folded(x), expected) < 1e-12
