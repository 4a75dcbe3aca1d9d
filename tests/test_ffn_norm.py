"""The feed-forward layer in training as one operator: against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobilemamba
from mobilemamba import ops

# batch, channels, hidden, height, width
SMALL = (3, 3, 4, 2, 3)
SHAPES = [SMALL, (40, 24, 48, 5, 5), (4, 96, 192, 16, 16), (8, 12, 38, 7, 6)]


def arguments_of(
    batch: int, channels: int, hidden: int, height: int, width: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(0)

    def norm(width: int) -> list[Tensor]:
        return [torch.rand(width) + 0.5, torch.randn(width)]

    image = torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)
    expand, project = torch.randn(hidden, channels, 1, 1) / 4, torch.randn(channels, hidden, 1, 1) / 4
    return [x.to(dtype) for x in (image, expand, *norm(hidden), project, *norm(channels))]


def by_torch(
    x: Tensor, expand: Tensor, expand_scale: Tensor, expand_shift: Tensor, project: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    hidden = F.batch_norm(F.conv2d(x, expand), None, None, expand_scale, expand_shift, training=True).relu()
    return x + F.batch_norm(F.conv2d(hidden, project), None, None, scale, shift, training=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_gradients_and_statistics_in_float64(shape):
    arguments = [x.requires_grad_() for x in arguments_of(*shape)]
    y, *statistics = ops.ffn_norm(*arguments)
    expected = by_torch(*arguments)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, arguments, grad)
    for a, b in zip(actual, torch.autograd.grad(expected, arguments, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    _, mean, var = ops.conv_norm(*arguments[:4])
    torch.testing.assert_close(statistics[:2], [mean, var])
    assert not any(x.requires_grad for x in statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype):
    arguments = arguments_of(*SHAPES[1], dtype=dtype)
    y, expected = ops.ffn_norm(*arguments)[0], by_torch(*[x.double() for x in arguments])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert y.dtype == dtype
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


def test_keeps_the_input_and_two_products():
    """By torch it keeps the hidden activations after norm and ReLU as well."""
    arguments = [x.requires_grad_() for x in arguments_of(*SHAPES[2], dtype=torch.float32)]
    sizes = []

    def bytes_saved(function: object) -> int:
        sizes.clear()
        seen = set()

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in seen and x.dim() == 4 and x.size(2) > 1:
                seen.add(x.untyped_storage().data_ptr())
                sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function(*arguments)
        return sum(sizes)

    image = arguments[0].nbytes
    assert bytes_saved(ops.ffn_norm) == 4 * image
    assert bytes_saved(by_torch) == 6 * image


def test_gradcheck_and_opcheck():
    arguments = [x.requires_grad_() for x in arguments_of(2, 2, 3, 1, 3)]
    assert torch.autograd.gradcheck(lambda *x: ops.ffn_norm(*x)[0], arguments)
    torch.library.opcheck(torch.ops.mobilemamba.ffn_norm, arguments)
    image, *parameters = [x.detach() for x in arguments]
    y, *moments, expanded, projected = torch.ops.mobilemamba.ffn_norm(image, *parameters)
    backward = (y, image, parameters, [expanded, projected, *moments], 1e-5, 1e-5)
    torch.library.opcheck(torch.ops.mobilemamba.ffn_norm_backward, backward)


def test_bit_equal_for_any_number_of_threads():
    arguments = [x.requires_grad_() for x in arguments_of(*SHAPES[2], dtype=torch.float32)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y, *statistics = ops.ffn_norm(*arguments)
            results.append([y, *statistics, *torch.autograd.grad(y.sin().sum(), arguments)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (0, torch.zeros(1, 3, 1, 1), "expected more than one position"),
        (1, torch.zeros(4, 2, 1, 1), r"ffn_norm: expand_weight has shape \[4, 2, 1, 1\], expected \[4, 3, 1, 1\]"),
        (4, torch.zeros(3, 5, 1, 1), r"ffn_norm: project_weight has shape \[3, 5, 1, 1\], expected \[3, 4, 1, 1\]"),
        (5, torch.zeros(4), r"ffn_norm: project_norm_weight has shape \[4\], expected \[3\]"),
    ],
)
def test_refuses(index, tensor, message):
    arguments = arguments_of(*SMALL, dtype=torch.float32)
    arguments[index] = tensor
    with pytest.raises(RuntimeError, match=message):
        ops.ffn_norm(*arguments)


@pytest.mark.parametrize("place", ["expand", "expand.norm", "project.conv"])
def test_layers_with_hooks_are_called(place, monkeypatch):
    layer = mobilemamba.models.layers.FFN(4)
    monkeypatch.setattr(mobilemamba.models.layers, "ffn_norm", lambda *_: pytest.fail("the operator was called"))
    calls: list[nn.Module] = []
    layer.get_submodule(place).register_forward_hook(lambda *_: calls.append(layer))
    layer(torch.randn(2, 4, 3, 3))
    assert len(calls) == 1
