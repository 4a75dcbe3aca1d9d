"""The launch configurations of the CUDA kernels, as functions of the sizes: they cover the work and fit the device."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilemamba import _C

TURING, HOPPER = 64 * 1024, 227 * 1024  # bytes of shared memory that a block can have
DTYPES = [_C.DType.float32, _C.DType.float64, _C.DType.float16, _C.DType.bfloat16]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(1, 70000),
    st.integers(1, 2000),
    st.one_of(st.integers(1, 300), st.integers(1, 2**32)),
    st.integers(1, 64),
)
def test_scan(backward: bool, dtype: _C.DType, batch: int, channels: int, length: int, state: int) -> None:
    float64 = dtype == _C.DType.float64
    sizes = _C.ScanSizes(dtype, batch, channels, length, state)
    shape = (_C.scan_backward_shape if backward else _C.scan_forward_shape)(float64)
    launch = (_C.scan_backward_launch if backward else _C.scan_forward_launch)(sizes)
    values = 3 if backward else 2  # decay and state of each segment; backward the gradient too
    segment = launch.warps * shape.chunk_length
    assert (launch.segments - 1) * segment < length <= launch.segments * segment
    assert launch.tiles == math.ceil(channels / 32)
    assert launch.tasks == batch * launch.segments * launch.tiles
    assert 1 <= launch.warps <= shape.max_warps  # the kernels are compiled for it
    assert launch.shared_bytes <= TURING
    if launch.segments == 1:
        assert _C.scan_scratch_bytes(sizes, launch, values) == 0
    else:
        assert launch.warps >= 2  # the collect pass reduces across warps
        elements = batch * launch.segments * 2 * state * channels * values
        assert _C.scan_scratch_bytes(sizes, launch, values) == elements * (8 if float64 else 4)


@pytest.mark.parametrize("length", [9, 16, 49, 144, 196, 256])
def test_scan_reads_a_stage_of_each_preset_once(length: int) -> None:
    sizes = _C.ScanSizes(_C.DType.float32, batch=256, channels=320, length=length, state=1)
    assert _C.scan_forward_launch(sizes).segments == 1


def test_long_sequences_spread_over_many_blocks_at_batch_1() -> None:
    sizes = _C.ScanSizes(_C.DType.float32, batch=1, channels=320, length=65536, state=1)
    assert _C.scan_forward_launch(sizes).tasks >= 10 * 132  # an H100 has 132 multiprocessors


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
    haar: bool,
    backward: bool,
    dtype: _C.DType,
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
        sizes = _C.haar_sizes(dtype, batch, channels, height, width, kernel)
    else:
        sizes = _C.depthwise_sizes(dtype, batch, channels, height, width, kernel, stride)
    launch = _C.plane_launch(sizes, backward, limit)
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
        assert 1 <= _C.plane_slabs(sizes, limit) <= min(tiles, 1024)
    assert launch.shared_bytes <= limit
    assert sizes.staged() == (dtype != _C.DType.float64 and (kernel, stride) in [(3, 1), (3, 2), (5, 1), (7, 1)])
    if sizes.staged():
        assert launch.stage_width == (launch.tile_width - 1) * stride + kernel
        assert launch.stage_height == min(height, (launch.tile_height - 1) * stride + kernel)
        planes = 4 if haar else 1
        assert launch.shared_bytes >= planes * launch.stage_height * launch.stage_width * 32 * 4
        if backward:  # the warps' sums reuse this memory
            assert launch.shared_bytes >= (planes * kernel**2 + (not haar)) * 32 * 4
    else:
        assert launch.shared_bytes == 0
