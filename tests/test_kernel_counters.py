"""What the host build of the CUDA kernels counts: rules on small kernels, and bars on those of a pass.

tools/kernel_counters.py makes a table of the counts, and CI compares it. Here planted faults show that it would differ.
"""

import ctypes
import re
import shutil
import sys
from pathlib import Path

import host_library
import pytest
import torch

sys.path.insert(0, str(host_library.HERE.parent / "tools"))

import counted_pass
import kernel_counters

pytestmark = pytest.mark.skipif(not host_library.CAN_BUILD, reason="needs g++ on x86-64 Linux")


@pytest.fixture(scope="module")
def small() -> tuple[ctypes.CDLL, counted_pass.Code]:
    """The kernels of counted_kernels.cu, without torch."""
    folder = host_library.BUILD / "counted_kernels"
    host_library.copy_unrolled(host_library.HERE, folder / "source", "counted_kernels.cu")
    runtime = {
        folder / f"{name}.o": host_library.HERE / "host_cuda" / f"{name}.cpp" for name in ("runtime", "counters")
    }
    kernels = {folder / "kernels.o": folder / "source" / "counted_kernels.cu"}
    flags = [*host_library.COUNT, *host_library.include_flags()]
    host_library.run_ninja(folder, runtime, flags, name="runtime")
    library = folder / "libcounted_kernels.so"
    host_library.run_ninja(folder, kernels, [*flags, *host_library.COUNT_ACCESSES], library, [*kernels, *runtime])
    return ctypes.CDLL(str(library)), counted_pass.Code(library)


class Memory:
    """Of the small kernels."""

    def __init__(self, library: tuple[ctypes.CDLL, counted_pass.Code], file: Path) -> None:
        self.library, self.code = library
        self.file = file
        self.data = [torch.zeros(1 << 16) for _ in range(2)]

    def run(self, kernel: str, blocks: int = 1) -> counted_pass.Launch:
        addresses = [ctypes.c_void_p(data.data_ptr()) for data in self.data]
        assert self.library.run_kernel(kernel.encode(), *addresses, blocks) == 0
        return counted_pass.read_launch(self.file.read_text().splitlines()[-1], self.code)


@pytest.fixture
def memory(small, tmp_path, monkeypatch) -> Memory:
    monkeypatch.setenv("HOST_CUDA_COUNTERS", str(tmp_path / "counters"))
    return Memory(small, tmp_path / "counters")


COUNTS = {  # sectors and the fewest, wavefronts and the fewest, products, barriers; of loads and stores together
    "adjacent": (8, 8, 0, 0, 0, 0),
    "strided": (32 + 4, 8, 0, 0, 0, 0),
    "misaligned": (3 + 2, 4, 0, 0, 0, 0),
    "wide": (32, 32, 0, 0, 0, 0),
    "one_address": (2, 2, 0, 0, 0, 0),
    "branch_in_a_loop": (4 * 4 + 4, 4 * 3 + 4, 0, 0, 0, 0),
    "lengths_of_a_loop": (4 + 4 + 4, 4 + 2 + 4, 0, 0, 0, 0),
    "shared_row": (8, 8, 2, 2, 0, 1),
    "shared_column": (4, 4, 32, 1, 0, 0),
    "shared_8_bytes": (8, 8, 2, 2, 0, 0),
    "shared_16_bytes_apart": (16, 16, 8, 4, 0, 0),
    "matrices": (4, 4, 16, 4, 0, 0),
    "products": (6 * 4 + 4, 28, 0, 0, 3, 0),
    "copies": (8 + 4, 12, 4 + 1, 5, 0, 1),
}


@pytest.mark.parametrize("kernel", COUNTS)
def test_counts(memory, kernel):
    launch = memory.run(kernel)
    assert launch.kernel == kernel
    counts = (launch.sectors, launch.fewest_sectors, launch.wavefronts, launch.fewest_wavefronts)
    assert (*counts, launch.products, launch.barriers) == COUNTS[kernel]


def test_bytes_are_counted_once(memory):
    assert memory.run("adjacent").bytes == 2 * 128
    assert memory.run("many_blocks", blocks=100).bytes == 128 + 100 * 128
    assert memory.run("one_address").bytes == 2 * 4


def test_a_sample_of_blocks_stands_for_all(memory, monkeypatch):
    whole = memory.run("many_blocks", blocks=99)
    assert whole.sectors == 99 * 8
    assert memory.run("many_blocks", blocks=99) == whole  # not run again: the parameters are the same
    monkeypatch.setenv("HOST_CUDA_SAMPLE", "10")
    sample = memory.run("many_blocks", blocks=101)
    assert sample.sectors == pytest.approx(101 * 8)
    assert sample.bytes == 128 + 10 * 128  # of the blocks that ran


# A pass of s6 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Path:
    return host_library.build(counting=True)


def missed(library: Path) -> list[str]:
    """The bars that a pass of one image misses."""
    one = counted_pass.count(library, 1)
    return kernel_counters.missed_bars([kernel_counters.table_of(1, one, one, one)], 0)


@pytest.mark.full
def test_a_sample_of_blocks_stands_for_a_pass(library):
    """Of some images, so that most launches have more blocks than the sample."""
    code = counted_pass.Code(library)
    whole, sample = (counted_pass.count(library, 8, blocks, code) for blocks in (None, kernel_counters.SAMPLE))
    tables = [kernel_counters.table_of(8, counted, whole, whole) for counted in (whole, sample)]
    assert sum(launch.blocks > kernel_counters.SAMPLE for launch in whole.launches) > 50
    for name, kernel in tables[0].kernels.items():
        other = tables[1].kernels[name]
        for count in (
            "load_sectors",
            "store_sectors",
            "fewest_sectors",
            "wavefronts",
            "fewest_wavefronts",
            "products",
            "instructions",
        ):
            assert other.sum(count) == pytest.approx(kernel.sum(count), rel=0.05), (name, count)


@pytest.mark.full
def test_the_work_of_a_pass_grows_with_the_batch(library):
    """Whatever the launches are, each image has its own activations and rows of products."""
    code = counted_pass.Code(library)
    bytes, products = [], []
    for batch in (1, 2, 3):
        counted = counted_pass.count(library, batch, code=code)
        bytes.append([launch.bytes for launch in counted.launches])
        products.append(sum(launch.products for launch in counted.launches if "line_conv" in launch.kernel))
    one, two, three = bytes
    assert [c - b for b, c in zip(two, three, strict=True)] == [b - a for a, b in zip(one, two, strict=True)]
    assert products == [112 * 112 // 16 * 3 * 4 * batch for batch in (1, 2, 3)]  # steps, lines, outputs / 8


def test_more_activations_miss_a_bar():
    assert kernel_counters.missed_bars([], 13.9e6) == []
    assert kernel_counters.missed_bars([], 14.1e6) == ["14.10 MB of activations an image, at most 14.0"]


FAULTS = {  # file, source that is compiled with it, text, text with the fault, the bar that is missed
    "uncoalesced: a lane's channels are adjacent, those of its neighbour 40 bytes on": (
        "cuda/gate_rows.cuh",
        "gate",
        "(part * warp_size + static_cast<int>(threadIdx.x)) * gate_together",
        "(static_cast<int>(threadIdx.x) * parts + part) * gate_together",
        r"gate_forward_registers_kernel<__nv_bfloat16> asks for .* times the fewest load sectors",
    ),
    "bank conflict: the chunks of rows keep their places": (
        "cuda/packed_conv.cu",
        "packed_conv",
        "(chunk ^ (row / 2 % 4))",
        "chunk",
        r"MatrixRows> asks for .* times the fewest wavefronts",
    ),
}


@pytest.mark.full
def test_no_bar_is_missed(library):
    assert missed(library) == []


@pytest.mark.full
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_misses_a_bar(library, name, tmp_path):
    file, source, old, new, message = FAULTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(host_library.CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(old) == 1, f"{file} has changed: it has {text.count(old)} times, expected once: {old!r}"
    (csrc / file).write_text(text.replace(old, new))
    faulty = host_library.build(csrc, tmp_path / "build", csrc / "cuda" / f"{source}.cu", counting=True)
    found = missed(faulty)
    assert any(re.search(message, line) for line in found), found
