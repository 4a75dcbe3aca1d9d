"""The launch configurations of the CUDA kernels, as functions of the sizes: they cover the work and fit the device.

``launches.cpp`` makes a Python module of these functions, for the tests alone.
"""

import importlib.util
import math
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import host_library
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.cpp_extension import include_paths

PYTHON_HEADERS = Path(sysconfig.get_path("include"))
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (PYTHON_HEADERS / "Python.h").is_file(),
    reason="needs g++ and Python's headers (Debian: python3-dev)",
)

TURING, HOPPER = 64 * 1024, 227 * 1024  # bytes of shared memory that a block can have
DTYPES = ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture(scope="session")
def launches() -> ModuleType:
    """The module, built once for each Python version. torch's headers bring pybind11."""
    folder = host_library.BUILD / f"launches-{sys.implementation.cache_tag}"
    library, object = folder / "launches.so", folder / "launches.o"
    headers = [flag for path in (*include_paths("cpu"), PYTHON_HEADERS) for flag in ("-isystem", str(path))]
    source = host_library.HERE / "launches.cpp"
    host_library.run_ninja(folder, {object: source}, ["-O0", f"-I{host_library.CSRC}", *headers], library, [object])
    spec = importlib.util.spec_from_file_location("launches", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(1, 70000),
    st.integers(1, 2000),
    st.one_of(st.integers(1, 300), st.integers(1, 2**32)),
    st.integers(1, 64),
)
def test_scan(launches: Any, backward: bool, dtype: str, batch: int, channels: int, length: int, state: int) -> None:
    float64 = dtype == "float64"
    sizes = launches.ScanSizes(dtype, batch, channels, length, state)
    shape = (launches.scan_backward_shape if backward else launches.scan_forward_shape)(float64)
    launch = (launches.scan_backward_launch if backward else launches.scan_forward_launch)(sizes)
    values = 3 if backward else 2  # decay and state of each segment; backward the gradient too
    segment = launch.warps * shape.chunk_length
    assert (launch.segments - 1) * segment < length <= launch.segments * segment
    assert launch.tiles == math.ceil(channels / 32)
    assert launch.tasks == batch * launch.segments * launch.tiles
    assert 1 <= launch.warps <= shape.max_warps  # the kernels are compiled for it
    assert launch.shared_bytes <= TURING
    if launch.segments == 1:
        assert launches.scan_scratch_bytes(sizes, launch, values) == 0
    else:
        assert launch.warps >= 2  # the collect pass reduces across warps
        elements = batch * launch.segments * 2 * state * channels * values
        assert launches.scan_scratch_bytes(sizes, launch, values) == elements * (8 if float64 else 4)


@pytest.mark.parametrize("length", [9, 16, 49, 144, 196, 256])
def test_scan_reads_a_stage_of_each_preset_once(launches: Any, length: int) -> None:
    sizes = launches.ScanSizes("float32", batch=256, channels=320, length=length, state=1)
    assert launches.scan_forward_launch(sizes).segments == 1


def test_long_sequences_spread_over_many_blocks_at_batch_1(launches: Any) -> None:
    sizes = launches.ScanSizes("float32", batch=1, channels=320, length=65536, state=1)
    assert launches.scan_forward_launch(sizes).tasks >= 10 * 132  # an H100 has 132 multiprocessors


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(1, 1000),
    st.integers(1, 2000),
    st.one_of(st.integers(1, 40), st.integers(1, 100000)),
    st.one_of(st.integers(1, 40), st.integers(1, 100000)),
    st.sampled_from([1, 3, 5, 7, 9, 31]),
    st.integers(1, 3),
    st.sampled_from([TURING, 99 * 1024, HOPPER]),
)
def test_plane(
    launches: Any,
    haar: bool,
    backward: bool,
    dtype: str,
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    limit: int,
) -> None:
    if haar:
        stride = 1
        sizes = launches.haar_sizes(dtype, batch, channels, height, width, kernel)
    else:
        sizes = launches.depthwise_plane_sizes(
            launches.DepthwiseSizes(dtype, batch, channels, height, width, kernel, stride)
        )
    assert sizes.staged() == (dtype != "float64" and (kernel, stride) in [(3, 1), (3, 2), (5, 1), (7, 1)])
    assume(haar or not sizes.staged())  # such a depthwise convolution has strips instead
    launch = launches.plane_launch(sizes, backward, limit)
    if haar:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    out_height, out_width = math.ceil(height / stride), math.ceil(width / stride)
    assert launch.tiles_y == math.ceil(out_height / launch.tile_height)
    assert launch.tiles_x == math.ceil(out_width / launch.tile_width)
    assert launch.tile_height in (2, 4, 6, 8)
    assert launch.tile_width in (4, 8, 12, 16)
    tiles = batch * launch.tiles_y * launch.tiles_x
    assert launch.tasks == tiles * math.ceil(channels / 32)
    assert 4 <= launch.warps <= 8
    if backward:
        assert 1 <= launches.plane_slabs(sizes, limit) <= min(tiles, 1024)
    assert launch.shared_bytes <= limit
    if sizes.staged():
        assert launch.stage_width == (launch.tile_width - 1) * stride + kernel
        assert launch.stage_height == min(height, (launch.tile_height - 1) * stride + kernel)
        assert launch.shared_bytes >= 4 * launch.stage_height * launch.stage_width * 32 * 4  # of four sub-bands
        if backward:  # the warps' sums reuse this memory
            assert launch.shared_bytes >= 4 * kernel**2 * 32 * 4
    else:
        assert launch.shared_bytes == 0


ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HAVE_STRIPS = st.sampled_from([(3, 1), (3, 2), (5, 1), (7, 1)])  # kernel size and stride


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(ELEMENT_BYTES)),
    st.integers(1, 1000),
    st.one_of(st.integers(1, 200), st.integers(1, 2**20)),
    st.one_of(st.integers(1, 40), st.integers(1, 100000)),
    st.one_of(st.integers(1, 40), st.integers(1, 100000)),
    HAVE_STRIPS,
    st.integers(0, 2),
)
def test_depthwise_strips(
    launches: Any,
    dtype: str,
    batch: int,
    groups: int,
    height: int,
    width: int,
    kernel_and_stride: tuple[int, int],
    halved: int,
) -> None:
    kernel, stride = kernel_and_stride
    most = launches.depthwise_channels(ELEMENT_BYTES[dtype], kernel)
    assert most * ELEMENT_BYTES[dtype] <= 8
    together = max(most >> halved, 1)  # channels of a thread
    channels = groups * together
    sizes = launches.DepthwiseSizes(dtype, batch, channels, height, width, kernel, stride)
    assert launches.depthwise_plane_sizes(sizes).staged()  # so the sizes have kernels that compute strips
    out_height, out_width = math.ceil(height / stride), math.ceil(width / stride)
    slabs = launches.depthwise_slabs(sizes)

    def check_cover(launch: Any, most_rows: int) -> None:
        assert (launch.strips_y - 1) * launch.rows < out_height <= launch.strips_y * launch.rows
        assert (launch.strips_x - 1) * 4 < out_width <= launch.strips_x * 4
        assert launch.strips == batch * launch.strips_y * launch.strips_x
        assert 1 <= launch.rows <= most_rows
        assert launch.warps == 4  # the kernels are compiled for it

    over_rows = {8: launches.depthwise_launch(sizes, together)}
    if stride == 2:
        over_rows[1] = launches.depthwise_backward_input_launch(sizes, together)
    for most_rows, launch in over_rows.items():
        check_cover(launch, most_rows)
        assert groups <= launch.tasks * 128  # at least one thread for each group of channels
        assert launch.tasks <= max(16 * 132, math.ceil(groups / 128))
        assert launch.shared_bytes == 0

    backward = launches.depthwise_backward_weight_launch(sizes, slabs, together)
    check_cover(backward, 16)
    assert 1 <= slabs <= backward.strips
    assert backward.tasks == slabs * math.ceil(groups / 32)
    assert (kernel**2 + 1) * 32 * together * 4 <= backward.shared_bytes <= 48 * 1024


def test_depthwise_strips_keep_a_large_gpu_busy(launches: Any) -> None:
    """A stage of MobileMamba-S2 at batch 1."""
    sizes = launches.DepthwiseSizes("bfloat16", batch=1, channels=192, height=16, width=16, kernel=3, stride=1)
    assert launches.depthwise_launch(sizes, 4).rows == 1


TILES = {  # rows, panels and warps of a block
    "large": (128, 4, 8),
    "medium": (128, 2, 4),
    "narrow": (128, 1, 4),
    "small": (32, 1, 2),
}


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    st.one_of(st.just(1), st.integers(1, 1000), st.integers(1, 2**20)),
    st.integers(0, 2000),
    st.one_of(st.integers(1, 100), st.integers(1, 5000)),
    st.one_of(st.integers(1, 100), st.integers(1, 5000)),
    st.one_of(st.integers(1, 200), st.integers(1, 100000)),
    st.sampled_from([1, 1, 3, 5]),
    st.integers(1, 3),
)
def test_product(
    launches: Any, batch: int, in_channels: int, height: int, width: int, out_channels: int, kernel: int, stride: int
) -> None:
    launch = launches.product_launch(
        launches.ProductSizes(batch, in_channels, height, width, out_channels, kernel, stride)
    )
    if launch.shape.name == "lines":
        check_lines(launch, batch * math.ceil(height / stride), math.ceil(width / stride))
        assert kernel == 3
        assert kernel * in_channels <= 16  # inputs of an instruction
        assert out_channels <= 32
        return
    rows, panels, warps = TILES[launch.shape.name]
    all_rows, all_panels = batch * math.ceil(height / stride) * math.ceil(width / stride), math.ceil(out_channels / 32)
    assert launch.warps == warps  # the kernels are compiled for it
    assert (launch.columns - 1) * panels < all_panels <= launch.columns * panels
    assert launch.lines == math.ceil(all_rows / rows)
    tiles, resident = launch.lines * launch.columns, 132 * 16 // warps  # 16 warps on each of an H100's multiprocessors
    assert launch.tasks == min(tiles, resident)
    slice_bytes = (rows + panels * 32) * 32 * 2  # of 32 inputs of 16 bits
    assert launch.shared_bytes == 4 * slice_bytes
    assert launch.shared_bytes <= 99 * 1024  # what a block can have on every GPU with these tensor cores
    if launch.shape.name != "small":
        assert launch.tasks >= 132
    if launch.shape.name == "large":
        assert kernel > 1 or stride > 1  # it gathers patches
    assert launch.aligned == (in_channels % 8 == 0)
    assert launch.aligned_output == launch.whole_outputs == (out_channels % 2 == 0)


def check_lines(launch: Any, lines: int, width: int) -> None:
    """Parts of a line are whole steps of 16 outputs, and none is empty."""
    part = math.ceil(math.ceil(width / launch.columns) / 16) * 16
    assert (launch.columns - 1) * part < width <= launch.columns * part
    assert (launch.warps, launch.shared_bytes) == (4, 0)
    assert launch.lines == lines
    assert 1 <= launch.tasks <= max(1, math.ceil(lines * launch.columns / launch.warps))
    assert launch.tasks <= 4 * 132  # blocks that an H100 runs at a time


def test_product_has_every_shape(launches: Any) -> None:
    def shape(batch: int, in_channels: int, size: int, out_channels: int, kernel: int = 1) -> str:
        return launches.product_launch(
            launches.ProductSizes(batch, in_channels, size, size, out_channels, kernel, 1)
        ).shape.name

    assert shape(1, 64, 16, 128) == "small"
    assert shape(256, 64, 16, 32) == "narrow"
    assert shape(256, 64, 16, 128) == "medium"
    assert shape(256, 64, 16, 128, 3) == "large"
    assert shape(256, 3, 224, 24, 3) == "lines"
    assert shape(1, 3, 224, 33, 3) == "medium"
    assert shape(1, 6, 224, 24, 3) == "narrow"


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(1, 2000), st.integers(1, 2**24)),
    st.integers(1, 500),
    st.one_of(st.integers(1, 1000), st.integers(1, 10**6)),
    st.sampled_from([TURING, 99 * 1024, 163 * 1024, HOPPER]),
    st.booleans(),
)
def test_ffn(launches: Any, rows: int, channels: int, hidden: int, limit: int, always: bool) -> None:
    launch = launches.ffn_launch(launches.FfnSizes(rows, channels, hidden), limit, always)
    if not launch.exists():
        assert not always or channels > 448 or hidden > 2**16 or limit < 99 * 1024
        return
    assert always or (launch.tasks >= 88 and launch.rows >= 64)
    assert launch.rows in (32, 64, 96)
    assert launch.tasks == math.ceil(rows / launch.rows)
    assert launch.warps == launch.rows // 32 * launch.across <= 12  # the kernels are compiled for it
    assert (launch.across, launch.blocks) in [(2, 6), (2, 7), (4, 6), (4, 7)]
    assert channels <= launch.across * launch.blocks * 16
    part = launch.across * 32  # hidden channels
    assert (launch.parts - 1) * part < hidden <= launch.parts * part
    assert (launch.steps - 1) * 16 < channels <= launch.steps * 16
    assert (launch.expand_slices - 1) * launch.expand_steps < launch.steps
    assert launch.steps <= launch.expand_slices * launch.expand_steps
    assert launch.project_slices * launch.project_steps * 16 == part
    step_bytes = 16 * 32 * 2  # of a panel
    panels = math.ceil(launch.across * launch.blocks / 2)
    assert launch.stage_bytes >= launch.expand_steps * (part // 32) * step_bytes
    assert launch.stage_bytes >= launch.project_steps * panels * step_bytes
    assert launch.input_pitch >= launch.steps * 32
    assert launch.input_pitch % 32 == 16  # neighbouring rows are in different banks
    tiles = launch.rows * (launch.input_pitch + part * 2 + 16)
    assert launch.shared_bytes == tiles + 3 * launch.stage_bytes
    assert launch.shared_bytes <= limit
    assert launch.aligned == (channels % 8 == 0)
    assert launch.whole_outputs == (channels % 2 == 0)


@pytest.mark.parametrize(
    ("side", "channels", "rows"),
    [
        (14, 192, 96),
        (7, 384, 96),  # 131 tiles for 132 multiprocessors
        (4, 448, None),
        (16, 200, 96),
        (8, 376, 64),  # 256 tiles; of 96 rows there would be 171, a wave and a quarter
    ],
)
def test_ffn_of_the_presets(launches: Any, side: int, channels: int, rows: int | None) -> None:
    """At batch 256 on an H100; two products at batch 1, where a few tiles would leave most of the GPU idle."""
    launch = launches.ffn_launch(launches.FfnSizes(256 * side**2, channels, 2 * channels), HOPPER)
    assert launch.exists() == (rows is not None)
    if rows is not None:
        assert launch.rows == rows
        assert launch.warps <= 6 or channels > 224
        if channels <= 224:
            assert 2 * (launch.shared_bytes + 1024) <= 228 * 1024  # two blocks on a multiprocessor
    assert not launches.ffn_launch(launches.FfnSizes(side**2, channels, 2 * channels), HOPPER).exists()


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(1, 2000), st.integers(1, 2**24)),
    st.integers(1, 170),
    st.integers(0, 70),
    st.integers(1, 170),
    st.sampled_from([TURING, 99 * 1024, 163 * 1024, HOPPER]),
    st.booleans(),
)
def test_gate_product(
    launches: Any, rows: int, half: int, identity: int, quarter: int, limit: int, always: bool
) -> None:
    outputs, inner = 2 * half, 4 * quarter
    launch = launches.gate_product_launch(launches.GateProductSizes(rows, outputs, identity, inner), limit, always)
    if not launch.exists():
        few = not always and rows <= 65 * 32
        assert few or outputs > 320 or inner > 640 or identity > 64 or limit == TURING
        return
    assert always or launch.tasks >= 66
    assert launch.rows in (32, 64)
    assert launch.rows == 32 or launch.tasks >= 132
    assert launch.tasks == math.ceil(rows / launch.rows)
    assert launch.warps == launch.rows // 32 * launch.across
    assert outputs <= launch.across * 80
    assert inner <= (384 if launch.across == 2 else 640)  # the loads of a lane
    slice_steps = launch.steps // launch.slices
    assert slice_steps * launch.across == 4
    assert inner <= launch.steps * 16 < inner + 16 * slice_steps
    assert (launch.panels, launch.pairs) == (math.ceil(outputs / 32), inner // 2)
    assert launch.pitch == launch.steps * 32 + 16
    stage_bytes = launch.across * 5 // 2 * slice_steps * 1024
    assert launch.shared_bytes == launch.rows * launch.pitch + 3 * stage_bytes <= limit


def test_gate_product_has_refusals(launches: Any) -> None:
    def exists(rows: int = 50176, outputs: int = 160, identity: int = 0, inner: int = 320) -> bool:
        return launches.gate_product_launch(launches.GateProductSizes(rows, outputs, identity, inner), HOPPER).exists()

    assert exists()
    assert not any(
        [exists(outputs=161), exists(outputs=322), exists(inner=322), exists(inner=644), exists(identity=65)]
    )


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.integers(1, 1000),
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 170),
    st.integers(1, 40),
    st.sampled_from([TURING, 99 * 1024, 163 * 1024, HOPPER]),
    st.booleans(),
)
def test_conv_product(
    launches: Any, batch: int, height: int, width: int, quarter: int, half: int, limit: int, always: bool
) -> None:
    channels, outputs, rows = 4 * quarter, 2 * half, batch * height * width
    launch = launches.conv_product_launch(
        launches.ConvProductSizes(batch, height, width, channels, outputs), limit, always
    )
    if not launch.exists():
        assert (not always and rows <= 65 * 32) or outputs > 64 or limit == TURING
        return
    assert always or launch.tasks >= 66
    assert launch.rows in (32, 64)
    assert launch.rows == 32 or launch.tasks >= 132
    assert launch.tasks == math.ceil(rows / launch.rows)
    assert (launch.across, launch.warps) == (4, launch.rows // 8)
    assert outputs <= 64
    assert channels <= launch.steps * 16 < channels + 64
    assert launch.steps == 4 * launch.slices
    assert (launch.panels, launch.pairs) == (math.ceil(outputs / 32), channels // 2)
    assert launch.pitch == launch.steps * 32 + 16
    assert launch.shared_bytes == launch.rows * launch.pitch + 3 * 4 * 2 * 1024 <= limit


def test_conv_product_has_refusals(launches: Any) -> None:
    def exists(channels: int = 320, outputs: int = 24) -> bool:
        sizes = launches.ConvProductSizes(256, 14, 14, channels, outputs)
        return launches.conv_product_launch(sizes, HOPPER).exists()

    assert exists()
    assert not any([exists(channels=322), exists(outputs=66), exists(outputs=25)])
