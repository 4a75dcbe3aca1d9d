"""The CUDA kernels without a GPU: their sources, built by the host compiler, take the operator tests on the CPU.

With AddressSanitizer and UBSan, threads in random order, and NaN in memory that nothing was written to. That this finds
what it should is tested by planting bugs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import host_library
import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not host_library.CAN_BUILD, reason="needs g++ on x86-64 Linux")


@pytest.fixture(scope="module")
def library() -> Path:
    return host_library.build()


def run_tests(library: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """The operator tests in a process of its own, on ``library``."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "host_library", "-p", "no:cacheprovider"]
    environment = host_library.environment(library, **settings)
    environment["PYTHONPATH"] = str(ROOT / "tests")
    return subprocess.run(
        [*command, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=os.sep,
    )


OPERATORS = str(ROOT / "tests" / "test_operators.py")
VALUES = "in_float64 or in_lower_precision or random_shapes"


@pytest.mark.parametrize(
    ("seed", "blocks", "shared_limit", "which"),
    [
        (0, 3, 227 * 1024, ""),
        (1, 1, 64 * 1024, VALUES),
        (2, 1000, 99 * 1024, VALUES),
    ],
)
def test_operators(library, seed, blocks, shared_limit, which):
    """In several orders of the threads, sizes of the grid and amounts of shared memory."""
    done = run_tests(library, OPERATORS, "-k", which, seed=seed, blocks=blocks, shared_limit=shared_limit)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_packed_conv(library):
    tests = str(ROOT / "tests" / "test_packed_conv.py")
    done = run_tests(library, tests, "-k", "in_float64 or in_lower_precision or gradcheck or refuses")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


@pytest.mark.parametrize("name", ["ffn", "mrffi"])
def test_folded_layers(library, name):
    tests = str(ROOT / "tests" / f"test_{name}.py")
    done = run_tests(library, tests, "-k", "in_float64 or in_lower_precision or any_strides or refuses")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def run_program(library: Path, program: str, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = host_library.environment(library, **settings)
    environment["PYTHONPATH"] = str(ROOT / "tests")
    program = f"import host_library; host_library.pytest_configure(); import torch, mobilemamba.ops as ops; {program}"
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=os.sep)


@pytest.mark.parametrize("error", [98, 209, 222])  # no kernel for the arch, in CUDA's three ways
def test_a_device_of_another_arch(library, error):
    done = run_program(library, "ops.haar_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(4, 1, 3, 3))", error=error)
    expected = "the GPU has compute capability 6.1, and the library was built for sm_80,sm_90+PTX; rebuild it with "
    assert expected + "TORCH_CUDA_ARCH_LIST=6.1 FORCE_CUDA=1 pip install" in done.stderr


def test_any_other_error_of_a_launch(library):
    done = run_program(library, "ops.haar_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(4, 1, 3, 3))", error=1)
    assert "CUDA error 1" in done.stderr


# Planted bugs --------------------------------------------------------------------------------------------------------

MUTATIONS = {  # file, what stands there once, what is put there, tests that run, how it must show (a pattern)
    "off by one: a chunk takes its own state as coming in": (
        "cuda/scan_forward.cu",
        "for (int w = 0; w < warp; ++w)",
        "for (int w = 0; w <= warp; ++w)",
        "scan_in_float64",
        "E +assert",
    ),
    "off by one: the last position is not written": (
        "cuda/scan.cuh",
        "if (active && t < length) to[t * p.channels]",
        "if (active && t < length - 1) to[t * p.channels]",
        "scan_in_float64",
        "E +assert",
    ),
    "missing barrier of a block: chunks read before all have written": (
        "cuda/scan_forward.cu",
        "        __syncthreads();\n        if (pass == Pass::collect) {",
        "        if (pass == Pass::collect) {",
        "scan_in_float64",
        "E +assert",
    ),
    "missing barrier of a block: chunks write while others still read": (
        "cuda/scan_backward.cu",
        "    __syncthreads();  // all warps have read the previous state's values\n",
        "",
        "scan_in_float64",
        "E +assert",
    ),
    "missing barrier of a warp: rows are read before they are staged": (
        "cuda/scan.cuh",
        "      stage(p.delta, direction, first, count, 0);\n      __syncwarp();\n",
        "      stage(p.delta, direction, first, count, 0);\n",
        "scan_in_float64",
        "E +assert",
    ),
    "missing barrier of a block: a tile is staged over the one before": (
        "cuda/plane.cuh",
        "    __syncthreads();  // all threads have read the previous tile\n",
        "",
        "haar_in_lower_precision",
        "E +assert",
    ),
    "read beyond the end of a tensor": (
        "cuda/scan.cuh",
        "x[t] = active && t < length ? widen(from[t * position_stride]) : Acc(0);",
        "x[t] = active && t <= length ? widen(from[t * position_stride]) : Acc(0);",
        "scan_in_float64",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "write beyond the end of shared memory": (
        "cuda/plane.cuh",
        "for (int i = threadIdx.y; i < height * width; i += blockDim.y) {\n      Acc value",
        "for (int i = threadIdx.y; i <= height * width; i += blockDim.y) {\n      Acc value",
        "haar_in_lower_precision",
        "AddressSanitizer: use-after-poison",
    ),
    "a barrier that not all threads reach": (
        "cuda/plane.cuh",
        "    __syncthreads();\n  }\n\n  /// A staged element of the plane's row",
        "    if (threadIdx.y > 0) __syncthreads();\n  }\n\n  /// A staged element of the plane's row",
        "haar_in_lower_precision",
        "host_cuda: ",
    ),
}
REBUILT = {  # sources to build again for a changed file
    "cuda/scan.cuh": ["scan_forward", "scan_backward"],
    "cuda/plane.cuh": ["haar"],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(library, name, tmp_path):
    file, old, new, tests, sign = MUTATIONS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(host_library.CSRC, csrc)
    source = (csrc / file).read_text()
    assert source.count(old) == 1, f"{file} has changed: {old!r} stands there {source.count(old)} times"
    (csrc / file).write_text(source.replace(old, new))
    rebuilt = REBUILT.get(file, [Path(file).stem])
    mutant = host_library.build(csrc, tmp_path / "build", [csrc / "cuda" / f"{stem}.cu" for stem in rebuilt])
    done = run_tests(mutant, OPERATORS, "-k", tests, blocks=1)
    assert done.returncode != 0, f"{name}: not found\n{done.stdout[-2000:]}"
    assert re.search(sign, done.stdout + done.stderr), done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"test_\w+_in_", done.stdout + done.stderr)
