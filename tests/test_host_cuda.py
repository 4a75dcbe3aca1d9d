"""The CUDA kernels without a GPU: the host compiler builds their sources, and the operator tests run them on the CPU.

AddressSanitizer and UBSan watch every access, the threads of a block run in random order, and unwritten memory is NaN.
Planted bugs show what this finds. By default the threads run in one order, with two types of elements; ``--full`` adds
the other types and tests, orders, sizes of the grid and of shared memory, and the planted bugs.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import host_library
import processes
import pytest

pytestmark = pytest.mark.skipif(not host_library.CAN_BUILD, reason="needs g++ on x86-64 Linux")


@pytest.fixture(scope="module")
def library() -> Path:
    return host_library.build()


@pytest.fixture
def full(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.option.full


def run_tests(
    library: Path, name: str, which: str, full: bool = False, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Those tests of ``test_NAME.py`` that the expression ``which`` selects, on ``library``.

    Layers are one kernel wherever that can run: the tests' sizes are below those of real calls.
    """
    environment = host_library.environment(library, **settings) | {"MOBILEMAMBA_CUDA_FORM": "kernel"}
    return processes.run_tests(
        (name,), "-x", "-s", "-p", "host_library", "-k", which, full=full, environment=environment
    )


VALUES = "in_float64 or in_lower_precision or random_shapes"
ONE_TYPE = "(in_float64 or (in_lower_precision and float32))"  # float64 has other kernels than the other types
ORDERS = [  # seed of the order of threads, blocks of a grid, bytes of shared memory, tests
    (0, 3, 227 * 1024, f"scan and {ONE_TYPE}"),
    (0, 3, 227 * 1024, f"(haar or depthwise) and {ONE_TYPE}"),
    *(
        pytest.param(*order, marks=pytest.mark.full)
        for order in (
            (0, 3, 227 * 1024, "scan"),
            (0, 3, 227 * 1024, "haar"),
            (0, 3, 227 * 1024, "depthwise"),
            (0, 3, 227 * 1024, "not scan and not haar and not depthwise"),
            (1, 1, 64 * 1024, VALUES),
            (2, 1000, 99 * 1024, VALUES),
        )
    ),
]


@pytest.mark.parametrize(("seed", "blocks", "shared_limit", "which"), ORDERS)
def test_operators(library, seed, blocks, shared_limit, which, full):
    if full and ONE_TYPE in which:
        pytest.skip("a run of all types includes this one")
    settings = {"seed": seed, "blocks": blocks, "shared_limit": shared_limit}
    processes.check(run_tests(library, "operators", which, full, **settings))


def test_packed_conv(library, full):
    some = "bfloat16 and (in_lower_precision or few_channels or infinity)"
    all = "in_float64 or in_lower_precision or few_channels or infinity or gradcheck or refuses"
    processes.check(run_tests(library, "packed_conv", all if full else f"{some} and not many_outputs", full))


def test_ffn(library, full):
    some = "bfloat16 and (in_lower_precision or infinity)"
    all = "in_lower_precision or infinity or random_shapes or any_strides or as_residual"
    processes.check(run_tests(library, "ffn", all if full else some, full))


@pytest.mark.full
@pytest.mark.parametrize(("shared_limit", "seed", "blocks"), [(163, 1, 1), (99, 2, 1000)])
def test_ffn_with_less_shared_memory(library, shared_limit, seed, blocks):
    """Tiles of fewer rows and slices of fewer inputs, as other GPUs have them."""
    settings = {"shared_limit": shared_limit * 1024, "seed": seed, "blocks": blocks}
    processes.check(run_tests(library, "ffn", "float16 and (in_lower_precision or infinity)", **settings))


def test_mrffi(library, full):
    processes.check(run_tests(library, "mrffi", "in_lower_precision" if full else "wide and bfloat16", full))


@pytest.mark.full
@pytest.mark.parametrize("name", ["ffn", "mrffi", "conv_norm", "ffn_norm"])
def test_layers(library, name, full):
    processes.check(run_tests(library, name, "in_float64 or in_lower_precision or any_strides or refuses", full))


ERRORS = {  # of a launch
    **dict.fromkeys(
        (98, 209, 222),  # no kernel for the arch, in CUDA's three ways
        "the GPU has compute capability 12.1, and the library was built for sm_80,sm_90+PTX; rebuild it with "
        "TORCH_CUDA_ARCH_LIST=12.1 FORCE_CUDA=1 pip install",
    ),
    1: "CUDA error 1",
}


def test_errors_of_a_launch(library):
    program = f"""
import os
import host_library
host_library.pytest_configure()
import torch
from mobilemamba import ops

for error in {list(ERRORS)}:
    os.environ["HOST_CUDA_ERROR"] = str(error)
    try:
        ops.haar_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(4, 1, 3, 3))
    except RuntimeError as caught:
        print(error, str(caught).replace("\\n", " "))
"""
    done = processes.run([sys.executable, "-c", program], host_library.environment(library))
    processes.check(done)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(error) for error in ERRORS]
    for line, message in zip(lines, ERRORS.values(), strict=True):
        assert message in line


def test_a_kernel_asks_for_shared_memory_once(library):
    program = """
import ctypes
import os
import host_library
host_library.pytest_configure()
import torch
from mobilemamba import ops

calls = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["HOST_CUDA_LIBRARY"]), "host_cuda_attributes_set")
for _ in range(3):
    ops.haar_conv2d(torch.zeros(1, 64, 40, 40), torch.zeros(256, 1, 7, 7))
    print(calls.value)
"""
    done = processes.run([sys.executable, "-c", program], host_library.environment(library))
    processes.check(done)
    assert done.stdout.split() == ["1", "1", "1"]


VIEWS = "as_strided contiguous empty empty_strided expand flatten movedim narrow permute select slice to transpose view"


def test_launches(library):
    """In bfloat16: those of a fused s6 with torch's, and those of layers at batch 256, which are fewer."""
    program = f"""
import ctypes
import os
import host_library
host_library.pytest_configure()
import torch
import mobilemamba
from mobilemamba import ops

torch.utils.deterministic.fill_uninitialized_memory = False
launches = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["HOST_CUDA_LIBRARY"]), "host_cuda_launches")
views = {{"aten::" + name for name in "{VIEWS}".split()}}  # they launch nothing themselves

def is_torchs_launch(event):
    parent = event.cpu_parent
    while parent is not None and not (parent.name.startswith("aten::") and parent.name not in views):
        parent = parent.cpu_parent
    return event.name.startswith("aten::") and event.name not in views and parent is None

def count(function, *arguments):
    before = launches.value
    with torch.profiler.profile() as profile:
        function(*arguments)
    return launches.value - before + sum(map(is_torchs_launch, profile.events()))

def image(batch, channels, side):
    return torch.zeros(batch, side, side, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)

model = mobilemamba.s6().eval().fuse().bfloat16().requires_grad_(False)
print("s6", count(model, torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)))
for stage, side, channels in zip(model.stages, (14, 7, 4), (192, 384, 448), strict=True):
    block, x = stage.blocks[0], image(256, channels, side)
    print("ffn", count(block.ffn0, x), "mrffi", count(block.mixer, x, x))
"""
    done = processes.run([sys.executable, "-c", program], host_library.environment(library, only_count=1))
    processes.check(done)
    assert done.stdout.splitlines() == ["s6 114", "ffn 1 mrffi 7", "ffn 1 mrffi 7", "ffn 2 mrffi 7"]


# Planted bugs --------------------------------------------------------------------------------------------------------

MUTATIONS = {  # file, source that is compiled with it, text, text with the bug, tests, pattern of the failing output
    "off by one: a chunk adds its own state to its carry": (
        "cuda/scan_forward.cu",
        "scan_forward",
        "for (int w = 0; w < warp; ++w)",
        "for (int w = 0; w <= warp; ++w)",
        "scan_in_float64",
        "E +assert",
    ),
    "off by one: the last position is not written": (
        "cuda/scan.cuh",
        "scan_forward",
        "if (active && t < length) *to = narrow<T>(x[t]);",
        "if (active && t < length - 1) *to = narrow<T>(x[t]);",
        "scan_in_float64",
        "E +assert",
    ),
    "missing block barrier: a chunk reads before all have written": (
        "cuda/scan_forward.cu",
        "scan_forward",
        "        __syncthreads();\n        if (pass == Pass::collect) {",
        "        if (pass == Pass::collect) {",
        "scan_in_float64",
        "E +assert",
    ),
    "missing block barrier: a chunk writes while others still read": (
        "cuda/scan_backward.cu",
        "scan_backward",
        "    __syncthreads();  // all warps have read the previous state's values\n",
        "",
        "scan_in_float64",
        "E +assert",
    ),
    "missing warp barrier: a lane reads rows before they are staged": (
        "cuda/scan.cuh",
        "scan_backward",
        "        to[t] = t < length ? widen(*from) : Acc(0);\n    }\n    __syncwarp();\n",
        "        to[t] = t < length ? widen(*from) : Acc(0);\n    }\n",
        "scan_in_float64",
        "E +assert",
    ),
    "missing block barrier: a tile overwrites the previous one": (
        "cuda/plane.cuh",
        "haar",
        "    __syncthreads();  // all threads have read the previous tile\n",
        "",
        "haar_in_lower_precision",
        "E +assert",
    ),
    "read beyond the end of a tensor": (
        "cuda/scan.cuh",
        "scan_forward",
        "x[t] = active && t < length ? widen(*from) : Acc(0);",
        "x[t] = active && t <= length ? widen(*from) : Acc(0);",
        "scan_in_float64",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "write beyond the end of shared memory": (
        "cuda/plane.cuh",
        "haar",
        "for (int i = threadIdx.y; i < height * width; i += blockDim.y) {\n      Acc value",
        "for (int i = threadIdx.y; i <= height * width; i += blockDim.y) {\n      Acc value",
        "haar_in_lower_precision",
        "AddressSanitizer: use-after-poison",
    ),
    "a barrier that not all threads reach": (
        "cuda/plane.cuh",
        "haar",
        "    __syncthreads();\n  }\n\n  /// A staged element of the plane's row",
        "    if (threadIdx.y > 0) __syncthreads();\n  }\n\n  /// A staged element of the plane's row",
        "haar_in_lower_precision",
        "host_cuda: ",
    ),
    "0 times infinity: a strip's columns beyond the row count for the gradient of the weight": (
        "cuda/depthwise.cu",
        "depthwise",
        "if (x + column >= width) continue;",
        "",
        "infinity_at_the_right_border",
        "E +assert",
    ),
    "wrong fragment: a lane takes another lane's words of the weight": (
        "cuda/packed_conv.cu",
        "packed_conv",
        "((half * 4 + group / 2) ^ (quad * 2))",
        "((half * 4 + group / 2) ^ quad)",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "missing wait: a slice is read before its copies have ended": (
        "cuda/packed_conv.cu",
        "packed_conv",
        "      wait_for_copies<stages - 2>();\n",
        "",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "missing block barrier: a copy overwrites the slice that other warps still read": (
        "cuda/packed_conv.cu",
        "packed_conv",
        "      __syncthreads();  // this slice is there, and all warps",
        "      // this slice is there, and all warps",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "wrong tile: a step over the end of a line of tiles leaves the columns": (
        "cuda/packed_conv.cu",
        "packed_conv",
        "across -= static_cast<int>(launch.columns), ++down;",
        "++down;",
        "in_lower_precision and bfloat16",
        "E +assert|AddressSanitizer",
    ),
    "wrong fragment: a lane takes another lane's words of the weight of the feed-forward layer": (
        "cuda/ffn_forward.cu",
        "ffn_forward",
        "place_of(warp_across % 2 * 4 + group / 2, quad)",
        "place_of(warp_across % 2 * 4 + group / 2, quad + 1)",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "wrong fragment: a lane writes its hidden activations to another lane's rows": (
        "cuda/ffn_forward.cu",
        "ffn_forward",
        "(warp_row + i / 2 * 8 + quad * 2 + i % 2) * hidden_pitch",
        "(warp_row + i / 2 * 8 + quad + i % 2 * 4) * hidden_pitch",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "missing wait: a slice of a feed-forward layer is read before its copies have ended": (
        "cuda/ffn_forward.cu",
        "ffn_forward",
        "      wait_for_copies<ffn_stages - 2>();\n",
        "",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "missing block barrier: hidden activations are read before all warps have written theirs": (
        "cuda/ffn_forward.cu",
        "ffn_forward",
        "      __syncthreads();  // this slice is there, and all warps",
        "      // this slice is there, and all warps",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "missing block barrier: the next tile overwrites the input that other warps still add": (
        "cuda/ffn_forward.cu",
        "ffn_forward",
        "    __syncthreads();  // all warps have read the previous tile\n",
        "",
        "in_lower_precision and bfloat16",
        "E +assert",
    ),
    "missing block barrier: gated rows are read before all warps have written theirs": (
        "cuda/row_tile.cuh",
        "gate_product",
        "      __syncthreads();  // this slice and the tile are there",
        "      // this slice and the tile are there",
        "wide_in_lower_precision and bfloat16",
        "E +assert",
    ),
    "wrong row: a lane begins with another row's sums": (
        "cuda/row_tile.cuh",
        "gate_product",
        "sum[block][i / 2][j * 2 + i % 2] = widen(pair[i][block].value[j]);",
        "sum[block][i / 2][j + i % 2 * 2] = widen(pair[i][block].value[j]);",
        "wide_in_lower_precision and bfloat16",
        "E +assert",
    ),
    "wrong border: a strip reads the image before its own": (
        "cuda/conv_product.cu",
        "conv_product",
        "strip.y = (first_y_ + line) % height_;",
        "strip.y = first_y_ + line;",
        "wide_in_lower_precision and bfloat16",
        "E +assert",
    ),
    "off by one: the last strip of a tile has a column less": (
        "cuda/conv_product.cu",
        "conv_product",
        "in_tile = rows_ - strip.row, left",
        "in_tile = rows_ - strip.row - 1, left",
        "wide_in_lower_precision and bfloat16",
        "E +assert",
    ),
    "off by one: channels beyond the last one count for the variance": (
        "cuda/gate_rows.cuh",
        "gate_product",
        "channel_of(part) < channels ? widen(y.value[j]) - mean_[i] : 0.0f",
        "widen(y.value[j]) - mean_[i]",
        "wide_in_lower_precision and bfloat16",
        "E +assert",
    ),
    "infinity times zero: hidden channels beyond the last one count": (
        "cuda/ffn_forward.cu",
        "ffn_forward",
        "narrow<T>(j < left ? value : 0.0f)",
        "narrow<T>(j < left + part ? value : 0.0f)",
        "infinity and bfloat16",
        "E +assert",
    ),
    "read beyond the end of a line": (
        "cuda/line_conv.cu",
        "line_conv",
        "column + pixel[i] < width)",
        "column + pixel[i] <= width)",
        "of_few_channels and bfloat16",
        "AddressSanitizer: heap-buffer-overflow|E +assert",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(library, name, tmp_path):
    file, source, old, new, tests, sign = MUTATIONS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(host_library.CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(old) == 1, f"{file} has changed: it has {text.count(old)} times, expected once: {old!r}"
    (csrc / file).write_text(text.replace(old, new))
    mutant = host_library.build(csrc, tmp_path / "build", csrc / "cuda" / f"{source}.cu")
    tests_of = {"packed_conv": "packed_conv", "line_conv": "packed_conv", "ffn_forward": "ffn"}
    tests_of |= {"conv_product": "mrffi", "gate_product": "mrffi"}
    done = run_tests(mutant, tests_of.get(source, "operators"), tests, blocks=1)
    assert done.returncode != 0, f"{name}: not found\n{done.stdout[-2000:]}"
    assert re.search(sign, done.stdout + done.stderr), done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"test_(\w+_)?(in|of)_", done.stdout + done.stderr)
