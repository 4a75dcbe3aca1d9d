"""The CUDA kernels on a GPU, compared with the CPU kernels; then streams, graphs, synchronisation and memory."""

import fcntl
import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from test_operators import check_against_reference, depthwise_arguments, haar_arguments, scan_arguments
from test_packed_conv import SHAPES as PACKED_CONV_SHAPES
from test_packed_conv import arguments_of as packed_conv_arguments
from test_packed_conv import packing
from torch import Tensor

from mobilemamba import _native, ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if not _native.has_cuda_kernels():
    pytest.skip("the library was built without CUDA kernels", allow_module_level=True)

CUDA = torch.device("cuda", 0)
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative errors
GIB = 2**30


@pytest.fixture(autouse=True)
def turns_of_processes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that measures the GPU's memory, or needs most of it, runs while no other process tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    with (folder / "gpu.lock").open("w") as lock:
        alone = request.node.get_closest_marker("alone") is not None
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def on_device(arguments: list[Tensor], device: torch.device = CUDA) -> list[Tensor]:
    """Copies on the device that require gradients."""
    return [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in arguments]


def check_against_cpu(operator: Callable[..., Tensor], arguments: list[Tensor]) -> None:
    """Compares value and gradients on the device with those of the CPU kernels in float64."""

    def on_cpu(*arguments: Tensor) -> Tensor:
        return operator(*[x.cpu() for x in arguments]).to(CUDA)

    check_against_reference(operator, on_cpu, on_device(arguments), DTYPES[arguments[0].dtype])


# Values and gradients ------------------------------------------------------------------------------------------------

SCAN_SHAPES = [  # batch, channels, length, rank, state
    *((2, 33, length, 3, state) for length in (1, 7, 8, 9, 196, 256, 257, 1000) for state in (1, 3)),
    *((1, channels, 196, 2, 1) for channels in (1, 31, 544)),
    (2, 544, 49, 17, 1),  # as in s6: 17 low-rank rows
    (1, 64, 20, 40, 16),
    (1, 33, 65536, 2, 1),
    (1, 5, 65536, 1, 3),
    (70000, 3, 2, 1, 1),
    (0, 33, 196, 3, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
def test_scan(shape, dtype):
    check_against_cpu(ops.bidirectional_scan, scan_arguments(*shape, dtype=dtype))


PLANES = [  # batch, channels, height, width
    (2, 33, 14, 14),
    (1, 31, 13, 7),  # odd planes
    (3, 1, 1, 1),
    (1, 40, 71, 66),  # several tiles
    (1, 544, 7, 7),
    (70000, 2, 2, 3),
    (0, 33, 4, 4),
]
KERNELS = [1, 3, 5, 7, 9]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_haar(shape, kernel, dtype):
    check_against_cpu(ops.haar_conv2d, haar_arguments(*shape, kernel, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_depthwise(shape, kernel, stride, dtype):
    arguments = depthwise_arguments(*shape, kernel, stride, dtype=dtype)
    check_against_cpu(partial(ops.depthwise_conv2d, stride=stride, activation="silu"), arguments)
    check_against_cpu(partial(ops.depthwise_conv2d, stride=stride, activation="relu"), arguments[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("shape", PACKED_CONV_SHAPES, ids=str)
def test_packed_conv(shape, activation, dtype):
    check_against_cpu(packing(activation, stride=shape[-1]), packed_conv_arguments(*shape, dtype=dtype))


def cases(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Operators and their arguments on the device, large enough for many blocks and for several passes of the scan."""
    return {
        "scan": (ops.bidirectional_scan, on_device(scan_arguments(2, 70, 700, 3, dtype=dtype))),
        "scan of several states": (ops.bidirectional_scan, on_device(scan_arguments(2, 70, 60, 3, 4, dtype=dtype))),
        "haar": (ops.haar_conv2d, on_device(haar_arguments(3, 70, 41, 40, 5, dtype=dtype))),
        "depthwise": (
            partial(ops.depthwise_conv2d, activation="silu"),
            on_device(depthwise_arguments(3, 70, 41, 40, 5, dtype=dtype)),
        ),
        "strided depthwise": (
            partial(ops.depthwise_conv2d, stride=2, activation="relu"),
            on_device(depthwise_arguments(3, 70, 41, 40, 3, 2, dtype=dtype)),
        ),
    }


each_case = pytest.mark.parametrize("name", list(cases()))


def step(operator: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """Value and gradients."""
    y = operator(*arguments)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), arguments)]


def all_equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@each_case
def test_bit_equal_every_time(name):
    operator, arguments = cases()[name]
    expected = step(operator, arguments)
    assert all(x.isfinite().all() for x in expected)
    for _ in range(20):
        assert all_equal(step(operator, arguments), expected)


@each_case
def test_memory_is_written_before_it_is_read(name):
    operator, arguments = cases()[name]
    expected = step(operator, arguments)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert all_equal(step(operator, arguments), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_are_laid_out_as_on_the_cpu(layout):
    """Outputs, and gradients of images, are channels-last."""
    image, weight, bias, residual = depthwise_arguments(2, 33, 9, 8, 3, dtype=torch.float32)
    image, residual = (x.contiguous(memory_format=layout) for x in (image, residual))
    scan = scan_arguments(2, 33, 20, dtype=torch.float32)
    haar = image, haar_arguments(2, 33, 9, 8, 3, dtype=torch.float32)[1]
    operators = torch.ops.mobilemamba
    for operator, arguments in (
        (operators.bidirectional_scan, scan),
        (operators.bidirectional_scan_backward, [scan[0], *scan]),
        (operators.haar_conv2d, haar),
        (operators.haar_conv2d_backward_weight, [residual, image, 3]),
        (operators.depthwise_conv2d, [image, weight, bias, residual]),
        (operators.depthwise_conv2d_backward, [residual, image, weight, bias, 1, "silu"]),
    ):
        there = operator(*[x.to(CUDA) if isinstance(x, Tensor) else x for x in arguments])
        here = operator(*arguments)
        pairs = zip(there, here, strict=True) if isinstance(here, tuple) else [(there, here)]
        for a, b in pairs:
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, CUDA)
    y = operators.haar_conv2d(*[x.to(CUDA) for x in haar])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_refuses_tensors_of_two_devices():
    u, delta, *rest = scan_arguments(1, 3, 4)
    with pytest.raises(RuntimeError, match="bidirectional_scan: delta is on cuda:0, expected cpu like u"):
        ops.bidirectional_scan(u, delta.to(CUDA), *rest)
    with pytest.raises(RuntimeError, match="bidirectional_scan: delta is on cpu, expected cuda:0 like u"):
        ops.bidirectional_scan(u.to(CUDA), delta, *[x.to(CUDA) for x in rest])
    image, weight = haar_arguments(1, 3, 4, 4, 3)
    with pytest.raises(RuntimeError, match="haar_conv2d: weight is on cpu, expected cuda:0 like input"):
        ops.haar_conv2d(image.to(CUDA), weight)
    image, weight, bias, _ = depthwise_arguments(1, 3, 4, 4, 3)
    with pytest.raises(RuntimeError, match="depthwise_conv2d: bias is on cpu, expected cuda:0 like input"):
        ops.depthwise_conv2d(image.to(CUDA), weight.to(CUDA), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Under autocast an operator gives the same as on lowered activations and float32 parameters."""
    varying = {"scan": (0, 1, 3, 4), "haar": (0,), "depthwise": (0, 3)}
    for name, lowered in varying.items():
        operator, arguments = cases()[name]
        with torch.autocast("cuda", dtype):
            y = operator(*arguments)
        assert y.dtype == dtype
        assert torch.equal(y, operator(*[x.to(dtype) if i in lowered else x for i, x in enumerate(arguments)]))
        grads = torch.autograd.grad(y.float().sum(), arguments)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


# Streams, graphs, devices --------------------------------------------------------------------------------------------


@each_case
def test_ordered_with_the_current_stream(name):
    """A kernel sees the results of earlier work in the stream, and the host does not wait for them."""
    operator, arguments = cases()[name]
    expected = step(operator, arguments)
    late = [torch.full_like(x, torch.nan).requires_grad_() for x in arguments]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(operator, arguments)  # so that the allocator has memory for this stream
        stream.synchronize()
        torch.cuda._sleep(10**9)  # about half a second
        with torch.no_grad():
            for x, value in zip(late, arguments, strict=True):
                x.copy_(value)
        actual = step(operator, late)
        assert not stream.query(), "the host waited for the device"
    stream.synchronize()
    assert all_equal(actual, expected)


@each_case
def test_no_synchronisation(name):
    operator, arguments = cases()[name]
    step(operator, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(operator, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Captures ``function``; returns the graph and the tensors that hold its results after a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@each_case
def test_graph_replay_follows_its_input(name):
    operator, arguments = cases()[name]
    graph, results = captured(lambda: step(operator, arguments))
    for factor in (0.5, -1.25):
        with torch.no_grad():
            for x in arguments:
                x.mul_(factor)
        graph.replay()
        assert all_equal(results, step(operator, arguments))


@each_case
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_on_another_device_than_the_current_one(name):
    operator, arguments = cases()[name]
    actual = step(operator, on_device(arguments, torch.device("cuda", 1)))
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in actual)
    assert all_equal([x.to(CUDA) for x in actual], step(operator, arguments))


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_channel_slices_are_read_where_they_are():
    image = torch.randn(2, 9, 9, 64, device=CUDA).permute(0, 3, 1, 2)[:, 16:48]
    weight, bias = torch.randn(32, 1, 3, 3, device=CUDA), torch.randn(32, device=CUDA)
    before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
    y = ops.depthwise_conv2d(image, weight, bias, residual=image)
    allocated = torch.cuda.memory_stats()["requested_bytes.all.allocated"] - before
    assert allocated == y.nbytes + weight.nbytes  # the weight is packed


@pytest.mark.alone
def test_no_memory_but_from_torchs_allocator():
    def outside() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    everything = list(cases().values())
    for operator, arguments in everything:
        step(operator, arguments)
    before = outside()
    for _ in range(20):
        for operator, arguments in everything:
            step(operator, arguments)
    assert outside() == before


MANY = 2**31 + 2**20  # elements


def needs(gibibytes: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * GIB:
        pytest.skip(f"{free / GIB:.0f} GiB of device memory are free; needs {gibibytes}")


def repeated(x: Tensor, batch: int) -> Tensor:
    """A new tensor whose batch entries all equal the only one of ``x``, in the same layout."""
    channels_last = x.movedim(1, -1).expand(batch, *x.movedim(1, -1).shape[1:]).contiguous()
    return channels_last.movedim(-1, 1)


def check_large_batch(operator, backward, images: int, arguments: list[Tensor]) -> None:
    """With more than 2**31 elements in equal batch entries, each entry's results equal those of a single entry.

    The arguments with the indices ``images`` have a batch dimension. ``backward(grad, *arguments)`` returns their
    gradients and those of the parameters, which are sums over the batch.
    """
    batch = MANY // arguments[0].numel() + 1
    large = [repeated(x, batch) if i in images else x for i, x in enumerate(arguments)]
    assert large[0].numel() > 2**31
    y = operator(*arguments)
    grad = torch.randn_like(y)
    expected = [y, *backward(grad, *arguments)]
    for entry, several in zip(expected, [operator(*large), *backward(repeated(grad, batch), *large)], strict=True):
        if several.shape[0] == batch:
            for i in (0, 1, batch // 2, batch - 2, batch - 1):
                assert torch.equal(several[i], entry[0])
        else:
            torch.testing.assert_close(several.double() / batch, entry.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.alone
def test_scan_of_more_than_2_to_the_31_elements():
    needs(50)
    arguments = [x.to(CUDA) for x in scan_arguments(1, 64, 4096, 1, dtype=torch.bfloat16)]
    for i in (2, 5, 6, 7):
        arguments[i] = arguments[i].float()
    check_large_batch(
        ops.bidirectional_scan, torch.ops.mobilemamba.bidirectional_scan_backward, (0, 1, 3, 4), arguments
    )


@pytest.mark.alone
def test_haar_of_more_than_2_to_the_31_elements():
    needs(50)
    image, weight = (x.to(CUDA) for x in haar_arguments(1, 64, 64, 64, 3, dtype=torch.bfloat16))

    def backward(grad: Tensor, image: Tensor, weight: Tensor) -> list[Tensor]:
        grad_image = ops.haar_conv2d(grad, weight.flip(2, 3))
        return [grad_image, torch.ops.mobilemamba.haar_conv2d_backward_weight(grad, image, 3)]

    check_large_batch(ops.haar_conv2d, backward, (0,), [image, weight.float()])


@pytest.mark.alone
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_of_more_than_2_to_the_31_elements(stride):
    needs(50)
    image, weight, bias, residual = (
        x.to(CUDA) for x in depthwise_arguments(1, 64, 64, 64, 3, stride, dtype=torch.bfloat16)
    )

    def backward(grad: Tensor, image: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> list[Tensor]:
        return torch.ops.mobilemamba.depthwise_conv2d_backward(grad, image, weight, bias, stride, "silu")

    operator = partial(ops.depthwise_conv2d, stride=stride, activation="silu")
    check_large_batch(operator, backward, (0, 3), [image, weight.float(), bias.float(), residual])


@pytest.mark.alone
def test_one_image_of_more_than_2_to_the_31_elements():
    """Its last rows equal those of a small image."""
    needs(40)
    rows, margin, height = 24, 8, MANY // (64 * 4096) + 2
    image = torch.randn(1, height, 4096, 64, device=CUDA, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert image.numel() > 2**31
    last = image[:, :, -rows:].contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, 1, 5, 5, device=CUDA), torch.randn(64, device=CUDA)
    haar_weight = torch.randn(256, 1, 3, 3, device=CUDA)
    assert (height - rows) % 2 == 0  # the same Haar patches
    for operator in (
        lambda x: ops.haar_conv2d(x, haar_weight),
        lambda x: ops.depthwise_conv2d(x, weight, bias, x, activation="silu"),
        lambda x: torch.ops.mobilemamba.depthwise_conv2d_backward(x, x, weight, bias, 1, "silu")[0],
    ):
        torch.testing.assert_close(operator(image)[:, :, -rows + margin :], operator(last)[:, :, margin:])
