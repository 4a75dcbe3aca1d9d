"""Patch embedding and patch merging as operators: against plain PyTorch, parts of the batch, graphs, refusals."""

from itertools import pairwise

import pytest
import reference
import torch
import torch.nn.functional as F
from devices import cpu_only, randn
from test_operators import LOW_PRECISION, check_against_reference, relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mobilemamba import ops
from mobilemamba.models.folded import Folded, fold_batchnorm
from mobilemamba.models.layers import ConvNorm, PatchEmbedding, PatchMerging

EMBEDDINGS = [  # batch, height, width, channels of the input and of each convolution, strides
    (2, 9, 12, (3, 4, 6), (2, 2)),
    (1, 5, 4, (1, 33), (3,)),
    (3, 7, 1, (2, 5, 3, 40), (2, 1, 2)),
    (2, 1, 1, (3, 2, 2), (1, 2)),
]
MERGINGS = [  # batch, channels, height, width, hidden, squeezed, out
    (2, 6, 5, 4, 24, 6, 9),
    (1, 33, 7, 7, 70, 5, 40),
    (3, 2, 1, 3, 8, 2, 3),
    (1, 1, 1, 1, 1, 1, 1),
]
NAMES = (
    "input expand_weight expand_bias depthwise_weight depthwise_bias squeeze_weight squeeze_bias excite_weight "
    "excite_bias project_weight project_bias"
).split()
DENSE = ("expand_weight", "squeeze_weight", "excite_weight", "project_weight")


def random(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Weights so large that outputs are of the size of inputs."""
    inputs = torch.Size(shape[1:]).numel() if len(shape) == 4 and shape[-1] in (1, 3) else 1
    return (randn(*shape, generator=generator) / inputs**0.5).to(dtype)


def embedding(batch, height, width, channels, strides, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input, then weight and bias of each convolution."""
    options = {"generator": torch.Generator().manual_seed(0), "dtype": dtype}
    arguments = [randn(batch, channels[0], height, width, generator=options["generator"]).to(dtype)]
    for inputs, outputs in pairwise(channels):
        arguments += [random(outputs, inputs, 3, 3, **options), random(outputs, **options)]
    return arguments


def merging(batch, channels, height, width, hidden, squeezed, out, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    options = {"generator": torch.Generator().manual_seed(0), "dtype": dtype}
    shapes = [(hidden, channels, 1, 1), (hidden, 1, 3, 3), (squeezed, hidden, 1, 1), (hidden, squeezed, 1, 1)]
    arguments = [randn(batch, channels, height, width, generator=options["generator"]).to(dtype)]
    for shape in [*shapes, (out, hidden, 1, 1)]:
        arguments += [random(*shape, **options), random(shape[0], **options)]
    return arguments


def embed(strides, pack: bool = False):
    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        weights = [ops.pack_conv2d_weight(w) if pack else w for w in parameters[::2]]
        return ops.patch_embedding(x, weights, list(parameters[1::2]), list(strides))

    return function


def embed_plain(strides):
    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            x = F.conv2d(x, weight, bias, strides[i], 1)
            x = x.relu() if i + 1 < len(strides) else x
        return x

    return function


def packed(arguments: list[Tensor]) -> list[Tensor]:
    return [ops.pack_conv2d_weight(x) if n in DENSE else x for n, x in zip(NAMES, arguments, strict=True)]


def merge_packed(*arguments: Tensor) -> Tensor:
    return ops.patch_merging(*packed(arguments))


def merge_plain(x, expand, expand_bias, depthwise, depthwise_bias, *rest: Tensor) -> Tensor:
    squeeze, squeeze_bias, excite, excite_bias, project, project_bias = rest
    x = F.conv2d(x, expand, expand_bias).relu()
    x = F.conv2d(x, depthwise, depthwise_bias, 2, 1, groups=x.size(1)).relu()
    gate = F.conv2d(F.conv2d(x.mean((2, 3), keepdim=True), squeeze, squeeze_bias).relu(), excite, excite_bias)
    return F.conv2d(x * gate.sigmoid(), project, project_bias)


PACK = pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])


@PACK
@pytest.mark.parametrize("shape", EMBEDDINGS, ids=str)
def test_embedding_in_float64(shape, pack):
    check_against_reference(embed(shape[-1], pack), embed_plain(shape[-1]), embedding(*shape))


@PACK
@pytest.mark.parametrize("shape", MERGINGS, ids=str)
def test_merging_in_float64(shape, pack):
    check_against_reference(merge_packed if pack else ops.patch_merging, merge_plain, merging(*shape))


@PACK
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_in_lower_precision(dtype, pack):
    """Also with float32 biases and depthwise kernels beside 16 bits.

    Values only: in 16 bits some activations round to the other side of a ReLU, where the gradient is another one.
    """
    arguments, strides = embedding(*EMBEDDINGS[0], dtype=dtype), EMBEDDINGS[0][-1]
    y, expected = embed(strides, pack)(*arguments), embed_plain(strides)(*[x.double() for x in arguments])
    assert y.dtype == dtype
    assert relative_error(y, expected) < 3 * LOW_PRECISION[dtype]
    for shape in MERGINGS[:2]:
        arguments = merging(*shape, dtype=dtype)
        mixed = [x if n in DENSE or n == "input" else x.float() for n, x in zip(NAMES, arguments, strict=True)]
        for tensors in (arguments, mixed):
            y = (merge_packed if pack else ops.patch_merging)(*tensors)
            assert y.dtype == dtype
            assert relative_error(y, merge_plain(*[x.double() for x in tensors])) < 3 * LOW_PRECISION[dtype]


@PACK
def test_gradcheck(pack):
    arguments = [x.requires_grad_() for x in embedding(1, 4, 3, (2, 3, 2), (2, 1))]
    assert torch.autograd.gradcheck(embed((2, 1), pack), arguments)
    arguments = [x.requires_grad_() for x in merging(1, 2, 3, 4, 4, 2, 3)]
    assert torch.autograd.gradcheck(merge_packed if pack else ops.patch_merging, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_does_not_depend_on_its_batch(dtype):
    """Nor does its gradient. The CPU takes 4 and 8 images at a time; the last part is smaller."""
    for function, arguments in (
        (embed((2, 2), pack=True), embedding(11, 9, 12, (3, 4, 6), (2, 2), dtype=dtype)),
        (merge_packed, merging(19, 6, 5, 4, 24, 6, 9, dtype=dtype)),
    ):
        x, *parameters = arguments
        x.requires_grad_()
        y = function(x, *parameters)
        singles = torch.cat([function(image[None], *parameters) for image in x])
        torch.testing.assert_close(y, singles)  # torch's mean, for one, sums in another order for one image
        assert y.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(y.float().sin().sum(), x)
        (expected,) = torch.autograd.grad(singles.float().sin().sum(), x)
        torch.testing.assert_close(grad, expected)
        assert function(x[:0], *parameters).shape == (0, *y.shape[1:])


def calls(function, *arguments: Tensor) -> int:
    """How often ``function`` calls packed_conv2d."""
    with torch.profiler.profile() as profiler:
        function(*arguments)
    return sum(event.name == "mobilemamba::packed_conv2d" for event in profiler.events())


@cpu_only
@torch.no_grad()
def test_the_cpu_takes_parts_of_a_batch():
    arguments = embedding(4, 9, 12, (3, 4, 6), (2, 2), dtype=torch.float32)
    assert calls(embed((2, 2), pack=True), *arguments) == 2
    assert calls(embed((2, 2), pack=True), torch.cat([arguments[0]] * 3), *arguments[1:]) == 3 * 2
    arguments = merging(8, 6, 5, 4, 24, 6, 9, dtype=torch.float32)
    assert calls(merge_packed, *arguments) == 4
    assert calls(merge_packed, torch.cat([arguments[0]] * 2), *arguments[1:]) == 2 * 4


@pytest.mark.parametrize("mode", ["fake", "symbolic", "real"])
def test_graphs_have_no_parts(mode):
    """They may run at another batch than the one that they were traced with."""
    arguments = embedding(12, 9, 12, (3, 4, 6), (2, 2), dtype=torch.float32)
    merging_arguments = merging(20, 6, 5, 4, 24, 6, 9, dtype=torch.float32)
    for function, inputs, count in ((embed((2, 2), True), arguments, 2), (merge_packed, merging_arguments, 4)):
        graph = make_fx(function, tracing_mode=mode)(*inputs).graph
        targets = [node.target for node in graph.nodes]
        assert targets.count(torch.ops.mobilemamba.packed_conv2d.default) == count
        assert torch.ops.aten.cat.default not in targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@PACK
def test_autocast(dtype, pack):
    """Activations and dense weights in the lower type, the other parameters in float32."""
    x, *parameters = embedding(*EMBEDDINGS[0], dtype=torch.float32)
    function = embed(EMBEDDINGS[0][-1], pack)
    with torch.autocast(x.device.type, dtype):
        y, of_lowered = function(x, *parameters), function(x.to(dtype), *parameters)
    lowered = [p.to(dtype) if p.dim() == 4 else p for p in parameters]
    assert torch.equal(y, function(x.to(dtype), *lowered))
    assert torch.equal(of_lowered, y)
    arguments = merging(*MERGINGS[0], dtype=torch.float32)
    merge = merge_packed if pack else ops.patch_merging
    with torch.autocast(x.device.type, dtype):
        y = merge(*arguments)
    lowered = [a.to(dtype) if n in DENSE or n == "input" else a for n, a in zip(NAMES, arguments, strict=True)]
    assert torch.equal(y, merge(*lowered))


@PACK
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(dtype, pack):
    x, *parameters = embedding(5, 9, 12, (3, 4, 6), (2, 2), dtype=dtype)
    weights = [ops.pack_conv2d_weight(w) if pack else w for w in parameters[::2]]
    leaves = [[y.requires_grad_() for y in tensors] for tensors in ([x], weights, parameters[1::2])]
    torch.library.opcheck(torch.ops.mobilemamba.patch_embedding, (leaves[0][0], *leaves[1:], [2, 2]))
    arguments = merging(*MERGINGS[0], dtype=dtype)
    arguments = [y.requires_grad_() for y in (packed(arguments) if pack else arguments)]
    torch.library.opcheck(torch.ops.mobilemamba.patch_merging, arguments)


def test_vmap_and_grad():
    """Over images; and over ensembles of plain weights, which torch's own operators take."""
    x, *parameters = embedding(3, 9, 12, (3, 4, 6), (2, 2), dtype=torch.float32)
    function = embed((2, 2), pack=True)
    actual = torch.vmap(function, in_dims=(0, *[None] * len(parameters)))(x[:, None], *parameters)
    assert torch.equal(actual[:, 0], function(x, *parameters))
    plain = embed((2, 2))
    grad = torch.func.grad(lambda y: plain(y, *parameters).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(plain(leaf, *parameters).sin().sum(), leaf)[0])


@torch.no_grad()
def test_layers_fold_to_the_operators():
    """In the order of the layers; statistics are not those of a fresh BatchNorm."""
    torch.manual_seed(0)
    convs = [ConvNorm(3, 8, 3, 2), torch.nn.ReLU(), ConvNorm(8, 16, 3, 1)]
    for module, channels in ((PatchEmbedding(*convs), 3), (PatchMerging(16, 24), 16)):
        module.double().eval()
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for tensor in (norm.weight, norm.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (norm.bias, norm.running_mean):
                    tensor.normal_()
        x = torch.randn(9, channels, 9, 6, dtype=torch.float64)
        expected = module(x)
        folded = fold_batchnorm(module)
        names = set(folded.state_dict())
        assert relative_error(folded(x), expected) < 1e-12
        for layer in folded.modules():
            if isinstance(layer, Folded):
                layer.pack()
        assert relative_error(folded(x), expected) < 1e-12
        assert set(folded.state_dict()) == names
    with reference.plain_pytorch():
        torch.testing.assert_close(module(x), expected)


REFUSED_EMBEDDINGS = [
    ("input", lambda x: x[0], r"input has shape \[3, 9, 12\], expected 4 dimensions \(batch, channels, height, width"),
    ("input", lambda x: x.int(), "input is Int, expected Float, Double, Half or BFloat16"),
    ("input", lambda x: x[:, :2], r"weights\[0\] has shape \[4, 3, 3, 3\], expected \[4, 2, 3, 3\] = \(out_channels"),
    ("weights", lambda x: [], "weights has 0 tensors, expected at least 1"),
    ("weights", lambda x: [x[0], x[1][:, 1:]], r"weights\[1\] has shape \[6, 3, 3, 3\], expected \[6, 4, 3, 3\]"),
    ("weights", lambda x: [x[0], x[1][0]], r"weights\[1\] has shape \[4, 3, 3\], expected 4 dimensions"),
    ("weights", lambda x: [x[0], x[1].half()], r"weights\[1\] is Half, expected Float like input"),
    ("weights", lambda x: [x[0][..., :1, :1], x[1]], r"weights\[0\] has shape \[4, 3, 1, 1\], expected \[4, 3, 3, 3\]"),
    (
        "weights",
        lambda x: [ops.pack_conv2d_weight(x[0])[:, 1:], x[1]],
        r"weights\[0\] has shape \[1, 13, 32, 2\], expected \[1, 14, 32, 2\] = as packed",
    ),
    ("biases", lambda x: x[:1], "biases has 1 tensors, expected 2 like weights"),
    ("biases", lambda x: [x[0], x[1][None]], r"biases\[1\] has shape \[1, 6\], expected 1 dimensions \(out_channels\)"),
    ("biases", lambda x: [x[0], x[1].long()], r"biases\[1\] is Long, expected Float like input"),
    ("biases", lambda x: [x[0].to("meta"), x[1]], r"biases\[0\] is on meta, expected .* like input"),
    ("strides", lambda x: [2], "strides has 1 values, expected 2 like weights"),
    ("strides", lambda x: [2, 0], r"strides\[1\] is 0, expected at least 1"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED_EMBEDDINGS)
def test_embedding_refuses(name, change, message):
    x, *parameters = embedding(*EMBEDDINGS[0], dtype=torch.float32)
    arguments = {"input": x, "weights": parameters[::2], "biases": parameters[1::2], "strides": [2, 2]}
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match="^patch_embedding: " + message):
        ops.patch_embedding(**arguments)


REFUSED_MERGINGS = [
    ("input", lambda x: x[0], r"input has shape .*, expected 4 dimensions"),
    ("input", lambda x: x[:, 1:], r"expand_weight has shape \[24, 6, 1, 1\], expected \[24, 5, 1, 1\] = \(out_chann"),
    ("expand_weight", lambda x: x.flatten(1), r"expand_weight has shape \[24, 6\], expected 4 dimensions"),
    ("expand_bias", lambda x: x[None], r"expand_bias has shape \[1, 24\], expected 1 dimensions"),
    ("depthwise_weight", lambda x: x[1:], r"depthwise_weight has shape \[23, 1, 3, 3\], expected \[24, 1, 3, 3\]"),
    ("depthwise_weight", lambda x: x[..., :2, :2], "depthwise_weight has shape .*, expected an odd kernel size k"),
    ("depthwise_bias", lambda x: x.double(), "depthwise_bias is Double, expected Float like input"),
    ("squeeze_weight", lambda x: x[:, 1:], r"squeeze_weight has shape \[6, 23, 1, 1\], expected \[6, 24, 1, 1\]"),
    ("squeeze_bias", lambda x: x.int(), "squeeze_bias is Int, expected Float like input"),
    ("excite_weight", lambda x: x.bfloat16(), "excite_weight is BFloat16, expected Float like input"),
    ("excite_bias", lambda x: x[1:], r"excite_bias has shape \[23\], expected \[24\] = \(hidden\)"),
    ("project_weight", lambda x: x.to("meta"), "project_weight is on meta, expected .* like input"),
    ("project_bias", lambda x: x[1:], r"project_weight has shape \[9, 24, 1, 1\], expected \[8, 24, 1, 1\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED_MERGINGS)
def test_merging_refuses(name, change, message):
    arguments = merging(*MERGINGS[0], dtype=torch.float32)
    arguments[NAMES.index(name)] = change(arguments[NAMES.index(name)])
    with pytest.raises(RuntimeError, match="^patch_merging: " + message):
        ops.patch_merging(*arguments)
