"""torch.func and torch.vmap on the operators and on whole models; what is refused, in the operator's own words."""

from collections.abc import Callable

import pytest
import torch
from test_conv_norm import arguments_of as conv_norm_arguments
from test_ffn import arguments_of as ffn_arguments
from test_ffn_norm import arguments_of as ffn_norm_arguments
from test_mrffi import arguments_of as mrffi_arguments
from test_operators import depthwise_arguments, haar_arguments, scan_arguments
from test_packed_conv import arguments_of as packed_arguments
from test_packed_conv import packing as packed_conv
from test_patches import embed, embedding, merge_packed, merging
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import mobilemamba
from mobilemamba import ops

# torch warns where it has no rule for an operator inside vmap, and calls it slowly
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def mrffi(x: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
    return ops.mrffi(x, residual, list(weights))


def depthwise(*arguments: Tensor) -> Tensor:
    return ops.depthwise_conv2d(*arguments, 2, "silu")


def conv_norm(*arguments: Tensor) -> Tensor:
    return ops.conv_norm(*arguments, 2, "relu")[0]


# For each operator: the function, its arguments, and which of them have a batch.
OPERATORS: dict[str, tuple[Callable[..., Tensor], list[Tensor], tuple[int, ...]]] = {
    "bidirectional_scan": (ops.bidirectional_scan, scan_arguments(2, 5, 6, 2, 2), (0, 1, 3, 4)),
    "haar_conv2d": (ops.haar_conv2d, haar_arguments(2, 3, 5, 4, 3), (0,)),
    "depthwise_conv2d": (depthwise, depthwise_arguments(2, 3, 5, 4, 3, 2), (0, 3)),
    "conv_norm": (conv_norm, conv_norm_arguments(2, 3, 4, 5, 4, 3, 2), (0, 4)),
    "ffn_norm": (lambda *x: ops.ffn_norm(*x)[0], ffn_norm_arguments(2, 3, 4, 2, 3), (0,)),
    "packed_conv2d": (packed_conv("relu", 2), packed_arguments(2, 3, 5, 4, 3, 3, 2), (0, 3)),
    "ffn": (ops.ffn, ffn_arguments(2, 3, 4, 3, 5), (0, 1)),
    "mrffi": (mrffi, mrffi_arguments(2, 2, 3, 3, 2, 1, 4, 2, 1, 3, 3), (0, 1)),
    "patch_embedding": (embed((2, 1), pack=True), embedding(2, 5, 4, (2, 3, 4), (2, 1)), (0,)),
    "patch_merging": (merge_packed, merging(2, 3, 5, 4, 6, 2, 4), (0,)),
}
EACH = pytest.mark.parametrize("name", OPERATORS)


def copies(arguments: list[Tensor], mapped: tuple[int, ...], dims: tuple[int, ...]) -> tuple[list[Tensor], list[list]]:
    """The arguments for vmap, three different ones along dimension dims[i] of the mapped ones; and without vmap."""
    each = [[x + 0.1 * k if i in mapped else x for i, x in enumerate(arguments)] for k in range(3)]
    together = [torch.stack([one[i] for one in each], dims[i]) if i in mapped else x for i, x in enumerate(arguments)]
    return together, each


@EACH
def test_vmap_over_images(name):
    """Along any dimension, in chunks, nested; a residual may be the same for all."""
    function, arguments, images = OPERATORS[name]
    for mapped, dim in ((images, 0), (images, 1), (images, -1), (images[:1], 2)):
        dims = tuple(dim if i in mapped else None for i in range(len(arguments)))
        together, each = copies(arguments, mapped, dims)
        expected = torch.stack([function(*one) for one in each])
        torch.testing.assert_close(vmap(function, dims)(*together), expected)
        in_chunks = vmap(function, dims, out_dims=1, chunk_size=2)
        torch.testing.assert_close(in_chunks(*together).movedim(1, 0), expected)
    outer = tuple(0 if i in images else None for i in range(len(arguments)))
    nested = vmap(vmap(function, outer), outer)(*[x[None, None] if i in images else x for i, x in enumerate(arguments)])
    torch.testing.assert_close(nested[0, 0], function(*arguments))


@EACH
def test_vmap_over_weights(name):
    """As in an ensemble of models: with images for each model, and with the same images for all."""
    function, arguments, images = OPERATORS[name]
    everything = tuple(range(len(arguments)))
    for mapped in (everything, tuple(i for i in everything if i not in images), everything[-1:]):
        dims = tuple(0 if i in mapped else None for i in everything)
        together, each = copies(arguments, mapped, dims)
        expected = torch.stack([function(*one) for one in each])
        torch.testing.assert_close(vmap(function, dims)(*together), expected)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments).sin().sum()


def gradients(function: Callable[..., Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in arguments]
    return torch.autograd.grad(loss_of(function)(*leaves), leaves)


@EACH
def test_grad_and_gradients_per_sample(name):
    function, arguments, images = OPERATORS[name]
    argnums = tuple(range(len(arguments)))
    expected = gradients(function, arguments)
    torch.testing.assert_close(grad(loss_of(function), argnums)(*arguments), expected)
    y, pullback = vjp(function, *arguments)
    torch.testing.assert_close(pullback(y.cos()), expected)

    for mapped in (images, argnums):
        dims = tuple(0 if i in mapped else None for i in argnums)
        together, each = copies(arguments, mapped, dims)
        actual = vmap(grad(loss_of(function), argnums), dims)(*together)
        for i, per_sample in enumerate(zip(*[gradients(function, one) for one in each], strict=True)):
            torch.testing.assert_close(actual[i], torch.stack(per_sample))


@pytest.mark.parametrize("name", ["bidirectional_scan", "ffn"])
def test_jacobian(name):
    function, (x, *others), _ = OPERATORS[name]
    actual = jacrev(function)(x, *others)
    torch.testing.assert_close(actual, torch.autograd.functional.jacobian(lambda y: function(y, *others), x))


@pytest.mark.parametrize("name", ["haar_conv2d", "packed_conv2d"])
def test_second_derivatives_where_an_operator_has_them(name):
    function, (x, *others), _ = OPERATORS[name]

    def norm_of_gradient(y: Tensor) -> Tensor:
        return grad(loss_of(function))(y, *others).square().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(function)(leaf, *others), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(grad(norm_of_gradient)(x), expected)


@EACH
def test_parameters_that_a_function_captures_keep_their_gradients(name):
    """Those of the graph around a transform; and there are none from under no_grad."""
    function, (x, *others), _ = OPERATORS[name]
    leaves = [y.clone().requires_grad_() for y in others]
    value, _pullback = vjp(lambda y: function(y, *leaves), x)
    expected = torch.autograd.grad(function(x, *leaves).sin().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(value.sin().sum(), leaves), expected)

    def without_graph(y: Tensor) -> Tensor:
        with torch.no_grad():
            return function(y, *others).sum() + 0 * y.sum()

    assert not grad(lambda y: without_graph(y) + 0 * y.sum())(x).any()


FORWARD_MODE = r"forward-mode derivatives \(jvp, jacfwd, hessian\) are not implemented; use reverse mode"
TWICE = "second derivatives are not implemented; the operator is differentiable once"
ONCE = {"bidirectional_scan", "conv_norm", "depthwise_conv2d", "ffn", "ffn_norm", "mrffi"}


@EACH
def test_refuses_forward_mode(name):
    function, (x, *others), _ = OPERATORS[name]
    inner = {"patch_embedding": "packed_conv2d", "patch_merging": "packed_conv2d"}.get(name, name)
    for call in (
        lambda: jvp(lambda y: function(y, *others), (x,), (x,)),
        lambda: jacfwd(function, len(others))(x, *others),
        lambda: hessian(lambda y: loss_of(function)(y, *others))(x),
    ):
        with pytest.raises(NotImplementedError, match=f"^{inner}: {FORWARD_MODE}"):
            call()


@pytest.mark.parametrize("name", sorted(ONCE))
def test_refuses_second_derivatives_where_they_are_taken(name):
    function, (x, *others), _ = OPERATORS[name]
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(function)(leaf, *others), leaf, create_graph=True)
    torch.testing.assert_close(first, gradients(function, [x, *others])[0])
    for call in (
        lambda: first.sum().backward(),
        lambda: grad(lambda y: grad(loss_of(function))(y, *others).sum())(x),
    ):
        with pytest.raises(NotImplementedError, match=f"^{name}: {TWICE}"):
            call()


def test_refuses_an_empty_ensemble():
    function, (x, weight), _ = OPERATORS["haar_conv2d"]
    with pytest.raises(RuntimeError, match=r"haar_conv2d: torch\.vmap maps a dimension of size 0, expected at least 1"):
        vmap(function, (None, 0))(x, weight[None][:0])
    assert vmap(function, (0, None))(x[None][:0], weight).shape == (0, *x.shape)


def test_errors_inside_vmap_name_the_argument():
    with pytest.raises(RuntimeError, match=r"haar_conv2d: input has shape \[3, 5\], expected 4 dimensions"):
        vmap(ops.haar_conv2d, (0, None))(torch.zeros(2, 3, 5), torch.zeros(12, 1, 3, 3))


# Whole models --------------------------------------------------------------------------------------------------------


def network(seed: int, fused: bool) -> mobilemamba.MobileMamba:
    """With branches that are not zero, as after training."""
    torch.manual_seed(seed)
    model = mobilemamba.nano(in_chans=3, depths=(1, 1, 1)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.8)
    return model.fuse().requires_grad_() if fused else model


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


@FUSED
@torch.no_grad()
def test_ensemble_of_models(fused):
    models = [network(seed, fused) for seed in range(2)]
    parameters, buffers = stack_module_state(models)

    def run(parameters, buffers, images):
        return functional_call(models[0], (parameters, buffers), (images,))

    images = torch.randn(2, 2, 3, 19, 17)
    for dim in (0, None):
        of_model = images if dim == 0 else images[:1].expand_as(images)
        expected = torch.stack([model(x) for model, x in zip(models, of_model, strict=True)])
        actual = vmap(run, (0, 0, dim))(parameters, buffers, images if dim == 0 else images[0])
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(vmap(models[0])(images), models[0](images.flatten(0, 1)).unflatten(0, (2, 2)))


@FUSED
def test_gradients_per_sample_of_a_model(fused):
    model = network(0, fused).double()
    parameters = dict(model.named_parameters())
    images, classes = torch.randn(2, 3, 19, 17, dtype=torch.float64), torch.tensor([3, 5])

    def loss(parameters, image, label):
        logits = functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    actual = vmap(grad(loss), (None, 0, 0))(detached, images, classes)
    for i in range(2):
        expected = torch.autograd.grad(loss(parameters, images[i], classes[i]), list(parameters.values()))
        for (name, per_sample), single in zip(actual.items(), expected, strict=True):
            torch.testing.assert_close(per_sample[i], single, msg=lambda text, name=name: f"{name}: {text}")
