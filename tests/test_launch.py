"""The launch configurations of the CUDA kernels, as functions of the sizes: they cover the work and fit the device."""

import ctypes
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import host_library
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SCAN = ("tasks", "warps", "shared_bytes", "segments", "tiles", "chunk_length", "scratch_bytes", "max_warps")
PLANE = ("tasks", "warps", "shared_bytes", "tiles_y", "tiles_x", "tile_height", "tile_width")
PLANE += ("stage_height", "stage_width", "staged", "slabs")
TURING, HOPPER = 64 * 1024, 227 * 1024  # shared memory that a block can have

pytestmark = pytest.mark.skipif(not host_library.CAN_BUILD, reason="needs g++ on x86-64 Linux")


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("launches") / "launches.so"
    include = ["-I", str(host_library.HERE / "host_cuda" / "include"), "-I", str(host_library.CSRC)]
    source = Path(host_library.HERE / "host_cuda" / "launches.cpp")
    # undefined: the launch itself, which nothing here calls
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *include, str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call(function, names: tuple[str, ...], *sizes: int) -> SimpleNamespace:
    out = (ctypes.c_int64 * len(names))()
    function(*(ctypes.c_int64(int(size)) for size in sizes), out)
    return SimpleNamespace(**dict(zip(names, out, strict=True)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.booleans(),
    st.integers(1, 70000),
    st.integers(1, 2000),
    st.one_of(st.integers(1, 300), st.integers(1, 2**32)),
    st.integers(1, 64),
)
def test_scan(launches, backward, float64, batch, channels, length, state):
    launch = call(launches.scan, SCAN, backward, float64, batch, channels, length, state)
    segment = launch.warps * launch.chunk_length
    assert (launch.segments - 1) * segment < length <= launch.segments * segment
    assert launch.tiles == math.ceil(channels / 32)
    assert launch.tasks == batch * launch.segments * launch.tiles
    assert 1 <= launch.warps <= launch.max_warps  # for which the kernels are compiled
    assert launch.shared_bytes <= TURING
    if launch.segments == 1:
        assert launch.scratch_bytes == 0
    else:
        assert launch.warps >= 2  # the first pass needs a warp for each thing that a segment hands on
        numbers = batch * launch.segments * 2 * state * channels * (3 if backward else 2)
        assert launch.scratch_bytes == numbers * (8 if float64 else 4)


def test_scan_reads_a_stage_of_each_preset_once(launches):
    for length in (9, 16, 49, 144, 196, 256):
        assert call(launches.scan, SCAN, 0, 0, 256, 320, length, 1).segments == 1


def test_long_sequences_spread_over_many_blocks_at_batch_1(launches):
    assert call(launches.scan, SCAN, 0, 0, 1, 320, 65536, 1).tasks >= 10 * 132


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 1000),
    st.integers(1, 2000),
    st.one_of(st.integers(1, 40), st.integers(1, 100000)),
    st.one_of(st.integers(1, 40), st.integers(1, 100000)),
    st.sampled_from([1, 3, 5, 7, 9, 31]),
    st.integers(1, 3),
    st.sampled_from([TURING, 99 * 1024, HOPPER]),
)
def test_plane(launches, haar, backward, float64, batch, channels, height, width, kernel, stride, limit):
    stride = 1 if haar else stride
    launch = call(launches.plane, PLANE, haar, backward, float64, batch, channels, height, width, kernel, stride, limit)
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
        assert 1 <= launch.slabs <= min(tiles, 1024)
    assert launch.shared_bytes <= limit
    assert launch.staged == (not float64 and (kernel, stride) in [(3, 1), (3, 2), (5, 1), (7, 1)])
    if launch.staged:
        assert launch.stage_width == (launch.tile_width - 1) * stride + kernel
        assert launch.stage_height == min(height, (launch.tile_height - 1) * stride + kernel)
        planes = 4 if haar else 1
        assert launch.shared_bytes >= planes * launch.stage_height * launch.stage_width * 32 * 4
        if backward:  # the warps' sums lie in the same memory
            assert launch.shared_bytes >= (planes * kernel**2 + (not haar)) * 32 * 4
    else:
        assert launch.shared_bytes == 0
