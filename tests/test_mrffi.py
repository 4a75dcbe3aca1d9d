"""The mixer as one operator: against plain PyTorch in float64, layouts, gradients, packed weights, refusals."""

import pytest
import reference
import torch
import torch.nn.functional as F
from devices import cpu_only, randn
from test_operators import LOW_PRECISION, check_against_reference, relative_error, same
from torch import Tensor

import mobilemamba
from mobilemamba import ops

NAMES = ops.MRFFI_WEIGHTS
MATRICES = [NAMES.index(name) for name in ("in_weight", "x_weight", "out_weight", "proj_weight")]

SHAPES = [  # batch, height, width, global, local, identity, inner, rank, state, wavelet kernel, local kernel
    (2, 5, 6, 16, 5, 3, 24, 2, 1, 3, 3),
    (1, 7, 7, 16, 4, 0, 32, 1, 1, 5, 7),  # no identity
    (1, 3, 1, 3, 0, 2, 5, 2, 3, 3, 1),  # no local part, several states
    (3, 1, 4, 2, 2, 0, 33, 3, 2, 1, 5),
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3),
]
WIDE = [  # on CUDA two steps in one kernel: two or four warps beside each other, tiles of 32 and 64 rows
    (2, 6, 5, 160, 32, 0, 320, 10, 1, 3, 3),
    (1, 5, 7, 272, 75, 37, 544, 17, 1, 3, 3),
    (170, 5, 10, 16, 5, 3, 24, 2, 1, 3, 3),
    (1, 2, 150, 16, 5, 3, 24, 2, 1, 3, 3),  # lines longer than a tile
    (2, 3, 5, 17, 5, 3, 24, 2, 1, 3, 3),  # an odd number of outputs: two launches
]


def arguments_of(
    batch, height, width, g, p, rest, d, r, n, wavelet, local, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Input, residual, and the weights in their order."""
    c, generator = g + p + rest, torch.Generator().manual_seed(0)
    shapes = [(batch, c, height, width)] * 2
    shapes += [(2 * d, g), (2 * d,), (d, 1, 3, 3), (d,), (2 * (r + 2 * n), d), (2, d, r), (2, d), (2, d, n), (2, d)]
    shapes += [(d,), (d,), (g, d), (g,), (g, 4, wavelet, wavelet)]
    shapes += [(p, 1, local, local), (p,), (p,), (p,), (c, c), (c,)]
    tensors = [randn(*shape, generator=generator) for shape in shapes]
    # values as large as in networks: matrices and kernels are scaled by their number of inputs
    scale = {"in_weight": g, "x_weight": d, "out_weight": d, "proj_weight": c, "wavelet_weight": wavelet**2}
    scale |= {"conv_weight": 9, "local_weight": local**2}
    weights = [tensors[2 + i] / scale.get(name, 1) ** 0.5 for i, name in enumerate(NAMES)]
    return [x.to(dtype) for x in (*tensors[:2], *weights)]


def operator(x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
    return ops.mrffi(x, residual, list(weights))


def packing(x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
    packed = list(weights)
    for i in MATRICES:
        packed[i] = ops.pack_conv2d_weight(weights[i][:, :, None, None])
    return ops.mrffi(x, residual, packed)


def plain(x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
    w = dict(zip(NAMES, weights, strict=True))
    g, p = len(w["out_bias"]), len(w["local_bias"])
    x_global, x_local, x_identity = x.split([g, p, x.size(1) - g - p], dim=1)

    def matrix(y: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(y, w[name][:, :, None, None], bias)

    u, z = matrix(x_global, "in_weight", w["in_bias"]).chunk(2, dim=1)
    u = F.silu(F.conv2d(u, w["conv_weight"], w["conv_bias"], padding=1, groups=u.size(1)))
    rank, state = w["dt_weight"].size(2), w["A_log"].size(2)
    rows = matrix(u, "x_weight").flatten(2).unflatten(1, (2, rank + 2 * state))
    delta, b, c = rows.split([rank, state, state], dim=2)
    y = reference.bidirectional_scan(u.flatten(2), delta, w["A_log"], b, c, w["D"], w["dt_weight"], w["dt_bias"])
    y = F.layer_norm(y.transpose(1, 2), [y.size(1)], w["norm_weight"], w["norm_bias"]).transpose(1, 2)
    y = y.unflatten(2, z.shape[2:]) * F.silu(z)
    wavelet = reference.haar_conv2d(x_global, w["wavelet_weight"].flatten(0, 1).unsqueeze(1))
    parts = [matrix(y, "out_weight", w["out_bias"]) + wavelet, x_identity]
    if p:
        kernel = w["local_weight"]
        y = F.conv2d(x_local, kernel, w["local_bias"], padding=kernel.size(3) // 2, groups=p).relu()
        parts.insert(1, y * w["local_scale"][:, None, None] + w["local_shift"][:, None, None])
    y = matrix(torch.cat(parts, 1).relu(), "proj_weight", w["proj_bias"])
    return y if residual is None else y + residual


@pytest.mark.parametrize("function", [operator, packing])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64(shape, function):
    check_against_reference(function, plain, arguments_of(*shape), 1e-10)
    x, _, *weights = arguments_of(*shape)
    assert relative_error(function(x, None, *weights), plain(x, None, *weights)) < 1e-12


@pytest.mark.parametrize("function", [operator, packing])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_in_lower_precision(shape, dtype, function):
    """Values and gradients; intermediate results are rounded, so that errors add up."""
    arguments = arguments_of(*shape, dtype=dtype)
    check_against_reference(function, plain, arguments, 6 * LOW_PRECISION[dtype])
    if dtype != torch.float32:
        keep = {0, 1, *(2 + i for i in MATRICES)}
        arguments = [x if i in keep else x.float() for i, x in enumerate(arguments)]
        check_against_reference(function, plain, arguments, 6 * LOW_PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_in_lower_precision(shape, dtype):
    arguments = arguments_of(*shape, dtype=dtype)
    exact = [x.double() for x in arguments]
    for i in (0, 1):
        arguments[i] = arguments[i].contiguous(memory_format=torch.channels_last)
    keep = {0, 1, *(2 + i for i in MATRICES)}
    arguments = [x if i in keep else x.float() for i, x in enumerate(arguments)]
    assert relative_error(packing(*arguments), plain(*exact)) < 6 * LOW_PRECISION[dtype]


@pytest.mark.parametrize("shape", [SHAPES[1], (2, 3, 2, 2, 2, 1, 3, 2, 2, 3, 3), SHAPES[2]], ids=str)
def test_gradcheck_in_every_input_and_weight(shape):
    arguments = [x.requires_grad_() for x in arguments_of(*(min(size, 4) for size in shape[:9]), *shape[9:])]
    assert torch.autograd.gradcheck(operator, arguments)
    if shape == SHAPES[2]:
        assert torch.autograd.gradcheck(packing, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, residual, *weights = (y.requires_grad_() for y in arguments_of(*SHAPES[2], dtype=dtype))
    checks = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.mobilemamba.mrffi, (x, residual, weights), **checks)
    arguments = [torch.randn_like(x), x.detach(), [w.detach() for w in weights], 1e-5]
    torch.library.opcheck(torch.ops.mobilemamba.mrffi_backward, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_any_strides(dtype):
    x, residual, *weights = arguments_of(*SHAPES[0], dtype=dtype)
    expected = operator(x, residual, *weights)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    last = torch.channels_last
    for variant in (x.contiguous(memory_format=last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert same(operator(variant, residual.contiguous(memory_format=last), *weights), expected)
    strided = [torch.stack([w, w], -1)[..., 0] for w in weights]
    assert same(operator(x, residual, *strided), expected)
    assert operator(x[:0], None, *weights).shape == (0, *x.shape[1:])


def test_an_empty_batch_has_zero_gradients():
    x, _, *weights = (y.requires_grad_() for y in arguments_of(*SHAPES[0]))
    grads = torch.autograd.grad(operator(x[:0], None, *weights).sum(), weights)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, residual, *weights = arguments_of(*SHAPES[0], dtype=torch.float32)
    with torch.autocast(x.device.type, dtype):
        y = operator(x, residual, *weights)
    lowered = [w.to(dtype) if i in MATRICES else w for i, w in enumerate(weights)]
    assert torch.equal(y, operator(x.to(dtype), residual.to(dtype), *lowered))


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [operator, packing])
@pytest.mark.parametrize(
    "shape", [(2, 14, 14, 48, 20, 10, 96, 3, 1, 7, 5), (38, 4, 5, 16, 5, 3, 24, 2, 1, 3, 3)], ids=str
)
def test_bit_equal_for_any_number_of_threads_and_however_the_batch_is_cut(shape, form, dtype):
    """With parameters that want gradients, in which no thread may see a graph to record; and in inference mode."""
    x, residual, *weights = (tensor.requires_grad_() for tensor in arguments_of(*shape, dtype=dtype))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            results.append(form(x, residual, *weights).detach())
            with torch.inference_mode():
                results.append(form(x, residual, *weights))
        single = [form(x[i : i + 1], residual[i : i + 1], *weights) for i in range(len(x))]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in [*results, torch.cat(single)])


REFUSED = [
    ("input", lambda x: x[0], "input has shape .*, expected 4 dimensions"),
    (
        "input",
        lambda x: x[:, :20],
        "input has 20 channels, expected at least the 16 of out_bias and the 5 of local_bias",
    ),
    ("residual", lambda x: x[:, :3], r"residual has shape \[2, 3, 5, 6\], expected \[2, 24, 5, 6\]"),
    ("in_weight", lambda x: x.t(), r"in_weight has shape \[16, 48\], expected \[48, 16\] = \(out, in\)"),
    ("in_weight", lambda x: x[:, :, None, None], r"in_weight has shape .* expected \[2, 8, 32, 2\] = as packed"),
    ("proj_weight", lambda x: x.half(), "proj_weight is Half, expected Float like input"),
    ("dt_bias", lambda x: x[:1], r"dt_bias has shape \[1, 24\], expected \[2, 24\]"),
    ("D", lambda x: x.double(), "D is Double, expected Float like input"),
    ("wavelet_weight", lambda x: x[..., :2, :2], "wavelet_weight has shape .*, expected an odd kernel size"),
    ("norm_bias", lambda x: x[1:], r"norm_bias has shape \[23\], expected \[24\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refuses(name, change, message):
    arguments = arguments_of(*SHAPES[0], dtype=torch.float32)
    i = ["input", "residual", *NAMES].index(name)
    arguments[i] = change(arguments[i])
    with pytest.raises(RuntimeError, match="^mrffi: " + message):
        operator(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_library_has_the_same_names_in_the_same_order(name):
    x, residual, *weights = arguments_of(*SHAPES[0], dtype=torch.float32)
    weights[NAMES.index(name)] = weights[NAMES.index(name)].long()
    with pytest.raises(RuntimeError, match=f"^mrffi: {name} is Long, expected Float like input"):
        operator(x, residual, *weights)


def test_refuses_too_few_weights():
    x, residual, *weights = arguments_of(*SHAPES[0])
    with pytest.raises(RuntimeError, match="mrffi: weights has 19 tensors, expected 20"):
        operator(x, residual, *weights[:-1])


@pytest.mark.parametrize("kernels", [(7,), (3, 5), (3, 5, 7)], ids=str)
def test_the_module_folds_to_the_operator(kernels):
    """Any kernels of the local part, and statistics that are not those of a fresh BatchNorm."""
    torch.manual_seed(0)
    block = mobilemamba.MRFFI(64, 0.5, 0.35, 3, kernels).double().eval()
    for norm in block.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for tensor in (norm.weight, norm.running_var):
                tensor.data.uniform_(0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                tensor.data.normal_()
    x = torch.randn(2, 64, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x, x)
        folded = mobilemamba.models.folded.fold_batchnorm(block)
        assert relative_error(folded(x, x), expected) < 1e-12
        folded.pack()
        assert relative_error(folded(x, x), expected) < 1e-12
    assert {name for name, _ in folded.named_parameters()} == set(NAMES)
