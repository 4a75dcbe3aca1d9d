"""Sizes at the edges of int64, and empty ones: a right shape, or one line of ours that names the argument."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import prod

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mobilemamba import ops

LARGEST = 2**32  # size of a dimension
NATIVE = torch.ops.mobilemamba
Shape = tuple[int, ...]


@dataclass
class Operator:
    """An operator as a function of its sizes. ``shapes`` and ``result`` take them by name."""

    call: Callable[..., Tensor | tuple]
    sizes: dict[str, int]
    shapes: Callable[..., list[Shape]]
    result: Callable[..., Shape]


def up(size: int, divisor: int) -> int:
    return -(-size // divisor)


def packed(out: int, inputs: int) -> Shape:
    return (up(out, 32), up(inputs, 2), 32, 2)


def scan_shapes(batch, channels, length, rank, state) -> list[Shape]:
    return [
        (batch, channels, length),
        (batch, 2, rank, length),
        (2, channels, state),
        *[(batch, 2, state, length)] * 2,
        (2, channels),
        (2, channels, rank),
        (2, channels),
    ]


def mrffi_shapes(batch, height, width, g, p, rest, d, r, n, k) -> list[Shape]:
    c = g + p + rest
    shapes = [(batch, c, height, width), (2 * d, g), (2 * d,), (d, 1, k, k), (d,), (2 * (r + 2 * n), d), (2, d, r)]
    shapes += [(2, d), (2, d, n), (2, d), (d,), (d,), (g, d), (g,), (g, 4, k, k), (p, 1, k, k), (p,), (p,), (p,)]
    return [*shapes, (c, c), (c,)]


def merging_shapes(batch, channels, height, width, hidden, squeezed, out, k) -> list[Shape]:
    weights = [(hidden, channels), (hidden, 1, k, k), (squeezed, hidden), (hidden, squeezed), (out, hidden)]
    shapes = [(batch, channels, height, width)]
    for weight in weights:
        shapes += [weight if len(weight) == 4 else packed(*weight), (weight[0],)]
    return shapes


IMAGE = {"batch": 2, "channels": 3, "height": 4, "width": 5}
OPERATORS = {
    "bidirectional_scan": Operator(
        ops.bidirectional_scan,
        {"batch": 2, "channels": 3, "length": 4, "rank": 2, "state": 2},
        scan_shapes,
        lambda batch, channels, length, **_: (batch, channels, length),
    ),
    "haar_conv2d": Operator(
        ops.haar_conv2d,
        {**IMAGE, "k": 3},
        lambda batch, channels, height, width, k: [(batch, channels, height, width), (4 * channels, 1, k, k)],
        lambda batch, channels, height, width, **_: (batch, channels, height, width),
    ),
    "depthwise_conv2d": Operator(
        ops.depthwise_conv2d,
        {**IMAGE, "k": 3},
        lambda batch, channels, height, width, k: [(batch, channels, height, width), (channels, 1, k, k), (channels,)],
        lambda batch, channels, height, width, **_: (batch, channels, height, width),
    ),
    "packed_conv2d": Operator(
        lambda x, w, b: ops.packed_conv2d(x, w, b, stride=2),
        {**IMAGE, "out": 7},
        lambda batch, channels, height, width, out: [(batch, channels, height, width), packed(out, channels), (out,)],
        lambda batch, channels, height, width, out: (batch, out, up(height, 2), up(width, 2)),
    ),
    "pack_conv2d_weight": Operator(
        ops.pack_conv2d_weight,
        {"out": 7, "channels": 3, "k": 3},
        lambda out, channels, k: [(out, channels, k, k)],
        lambda out, channels, k: packed(out, channels * k * k),
    ),
    "ffn": Operator(
        lambda x, *weights: ops.ffn(x, None, *weights),
        {**IMAGE, "hidden": 6},
        lambda batch, channels, height, width, hidden: [
            (batch, channels, height, width),
            packed(hidden, channels),
            (hidden,),
            packed(channels, hidden),
            (channels,),
        ],
        lambda batch, channels, height, width, **_: (batch, channels, height, width),
    ),
    "mrffi": Operator(
        lambda x, *weights: ops.mrffi(x, None, list(weights)),
        {"batch": 2, "height": 2, "width": 3, "g": 3, "p": 2, "rest": 1, "d": 4, "r": 2, "n": 1, "k": 3},
        mrffi_shapes,
        lambda batch, height, width, g, p, rest, **_: (batch, g + p + rest, height, width),
    ),
    "patch_embedding": Operator(
        lambda x, w, b: ops.patch_embedding(x, [w], [b], [2]),
        {**IMAGE, "out": 7},
        lambda batch, channels, height, width, out: [
            (batch, channels, height, width),
            packed(out, 9 * channels),
            (out,),
        ],
        lambda batch, channels, height, width, out: (batch, out, up(height, 2), up(width, 2)),
    ),
    "patch_merging": Operator(
        ops.patch_merging,
        {**IMAGE, "hidden": 6, "squeezed": 2, "out": 4, "k": 3},
        merging_shapes,
        lambda batch, height, width, out, **_: (batch, out, up(height, 2), up(width, 2)),
    ),
}
EACH_SIZE = pytest.mark.parametrize(("name", "size"), [(n, s) for n, o in OPERATORS.items() for s in o.sizes])
NEVER_EMPTY = {"k", "rank", "state", "r", "n", "d", "hidden"}  # as the operators say
#: Odd, because kernel sizes are. About each power of two a size or a product of sizes leaves a bound or a type.
EDGES = [2**15 - 1, 2**15 + 1, *(2**power + sign for power in (31, 32, 33, 40, 55, 61, 62) for sign in (-1, 1))]
EDGES.append(2**63 - 1)


def tensors(shapes: list[Shape], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor] | None:
    """Zeros; None if torch has no tensors of these shapes, or they would take much memory."""
    if device == "cpu" and max(map(prod, shapes)) > 2**20:
        return None
    try:
        return [torch.zeros(shape, device=device.replace("fake", "cpu"), dtype=dtype) for shape in shapes]
    except (RuntimeError, TypeError) as error:
        if "overflow" in str(error).lower():
            return None
        raise


def check_edges(name: str, size: str, device: str, edges: list[int], others: int) -> int:
    """Each edge as this size, the others ``others`` or 1. Returns how many of the calls had tensors."""
    operator, calls = OPERATORS[name], 0
    for edge in edges:
        sizes = {n: 1 if n in NEVER_EMPTY else others for n in operator.sizes} | {size: edge}
        arguments = tensors(operator.shapes(**sizes), device)
        if arguments is None:
            continue
        calls += 1
        try:
            result = operator.call(*arguments)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
        else:
            assert tuple(result.shape) == operator.result(**sizes)
            assert edge <= LARGEST
            continue
        assert re.match(
            f"{name}: .* (sizes of at most 2\\^32|of at least 1|k of at most 32767|k odd and at most)", line
        ), line
    return calls


@EACH_SIZE
def test_a_size_at_the_edge(name, size):
    """Without memory, and with tensors that are empty because of another size."""
    assert check_edges(name, size, "meta", EDGES, 1) + check_edges(name, size, "meta", EDGES, 0)
    assert check_edges(name, size, "cpu", EDGES, 0) or size not in ("height", "width", "length")


@pytest.mark.parametrize("name", OPERATORS)
def test_sizes_at_the_edge_of_fake_tensors(name):
    with FakeTensorMode():
        for size in list(OPERATORS[name].sizes)[1:3]:
            assert check_edges(name, size, "fake", [2**31 + 1, 2**33 + 1, 2**61 + 1], 0)


IMAGE_TENSOR, KERNELS, PANEL = torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), torch.zeros(1, 1, 32, 2)
NO_INPUT, NO_PANEL = torch.zeros(1, 0, 2, 2), torch.zeros(1, 0, 32, 2)
#: For each integer of an operator: its name, a call with it, and the largest that is allowed.
INTEGERS = [
    ("depthwise_conv2d: stride", lambda x, n: ops.depthwise_conv2d(x, KERNELS.to(x), stride=n), 2**31 - 1),
    (
        "depthwise_conv2d: stride",
        lambda x, n: NATIVE.depthwise_conv2d_backward(x[:, :, :1, :1], x, KERNELS.to(x), None, n, "none")[0],
        2**31 - 1,
    ),
    ("packed_conv2d: stride", lambda x, n: ops.packed_conv2d(x, PANEL.to(x), x[0, 0, 0, :1], None, 1, n), 2**31 - 1),
    (
        "patch_embedding: strides[0]",
        lambda x, n: ops.patch_embedding(x, [KERNELS.to(x).expand(2, 2, 3, 3)], [x[0, :, 0, 0]], [n]),
        2**31 - 1,
    ),
    (
        "patch_embedding: strides[0]",
        lambda x, n: ops.patch_embedding(x, [torch.zeros(1, 9, 32, 2).to(x)], [x[0, :, 0, 0]], [n]),
        2**31 - 1,
    ),
    ("packed_conv2d: kernel_size", lambda x, n: ops.packed_conv2d(x, PANEL.to(x), x[0, 0, 0, :1], None, n), None),
    (
        "packed_conv2d: kernel_size",
        lambda x, n: ops.packed_conv2d(NO_INPUT.to(x), NO_PANEL.to(x), x[0, 0, 0, :1], None, n),
        None,
    ),
    ("haar_conv2d_backward_weight: kernel_size", lambda x, n: NATIVE.haar_conv2d_backward_weight(x, x, n), None),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("argument", "call", "largest"), INTEGERS)
def test_an_integer_at_the_edge(argument, call, largest, device):
    image = IMAGE_TENSOR.to(device)
    for value in (-(2**63), -(2**31) - 1, -1, 0, *EDGES):
        if largest is not None and 0 < value <= largest:
            assert call(image, value).shape[2:] in ((1, 1), (3, 3))
        elif value <= 0 or value > 2**15:
            with pytest.raises(RuntimeError, match=f"^{re.escape(argument)} is {value}, expected "):
                call(image, value)
    if largest is not None:
        assert call(image, largest).shape[2:] in ((1, 1), (3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_sizes(name, dtype):
    """An empty result with zero gradients, or an error of ours, and the same without data."""
    operator = OPERATORS[name]
    for empty in (names for count in (1, 2) for names in combinations(operator.sizes, count)):
        sizes = operator.sizes | dict.fromkeys(empty, 0)
        results = []
        for device in ("cpu", "meta"):
            arguments = tensors(operator.shapes(**sizes), device, dtype)
            assert arguments is not None
            arguments = [x.requires_grad_() for x in arguments]
            try:
                result = operator.call(*arguments)
            except RuntimeError as error:
                line = str(error).splitlines()[0]
                assert line.startswith(f"{name}: "), line
                results.append(line)
                continue
            assert tuple(result.shape) == operator.result(**sizes)
            results.append(result.stride())
            if device == "cpu":
                assert not any(g.any() for g in torch.autograd.grad(result.sum(), arguments) if not result.numel())
        assert results[0] == results[1], empty
