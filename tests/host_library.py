"""Builds the CUDA sources with the host compiler, for tests that run them on the CPU; see host_cuda/include.

As a pytest plugin (``-p host_library``) it loads the library that HOST_CUDA_LIBRARY names after the usual one. The CUDA
kernels then replace the CPU kernels, so that every test of CPU tensors tests them. Uninitialised memory is NaN. The
sanitizers watch the kernels and the stand-in for CUDA; the sources that call torch have none, which halves the time of
the build.

``build(counting=True)`` is another library: it counts what the kernels ask of the memory, for tools/kernel_counters.py.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent.resolve()
CSRC = HERE.parent / "csrc"
sys.path.insert(0, str(HERE.parent / "build_backend"))

import mobilemamba_build as native  # noqa: E402

FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
KERNEL_FLAGS = ["-O1", "-g1", *SANITIZE]
# For the library that counts accesses: calls at each access and basic block, accesses as wide as in the source, and
# blocks in its order. Loops are unrolled where the source says so.
COUNT = ["-O2", "-g1", "-DHOST_CUDA_COUNTERS"]
COUNT_ACCESSES = [
    "-fsanitize=thread",
    "-fsanitize-coverage=trace-pc",
    "-fno-tree-vectorize",
    "-fno-tree-sra",
    "-fno-store-merging",
    "-fno-expensive-optimizations",
    "-fno-tree-loop-distribute-patterns",
    "-fno-reorder-blocks",
    "-fno-reorder-blocks-and-partition",
    "-fno-crossjumping",
    "-fno-thread-jumps",
    "-fno-tree-tail-merge",
    "-fno-optimize-sibling-calls",
    "-maccumulate-outgoing-args",
    "-fno-math-errno",
]
HOST_FLAGS = ["-O0"]
CAN_BUILD = platform.system() == "Linux" and platform.machine() == "x86_64" and shutil.which("g++") is not None
BUILD = HERE.parent / "build"
FOLDER = BUILD / f"host_cuda-torch-{torch.__version__}-{sys.implementation.cache_tag}"
COUNTING_FOLDER = BUILD / "host_cuda-counters"
KERNELS_FOLDER = BUILD / "host_cuda-kernels"  # they include nothing of torch: builds for several versions share them


def host_sources() -> list[Path]:
    """The sources that call torch, in the package's translation units."""
    sources = [path for path in native.sources(cuda=True) if re.match(r"csrc/(ops|cuda)/.*\.cpp$", path)]
    return [Path(unit) for unit in native.units(sources, FOLDER / "units")]


def build(csrc: Path = CSRC, folder: Path = FOLDER, only: Path | None = None, counting: bool = False) -> Path:
    """Builds the library from ``csrc`` in ``folder``, as far as it is not up to date, and returns its path.

    With ``only``, a kernel's source, it builds just that, and links it with the objects of the unchanged library.
    Processes that build in the same folder take turns. With ``counting`` the kernels count their accesses instead of
    being watched by the sanitizers; see host_cuda/counters.h.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    if counting:
        unrolled = (COUNTING_FOLDER if only is None else folder) / "csrc"
        copy_unrolled(csrc, unrolled)
        only = only and unrolled / only.relative_to(csrc)
        csrc = unrolled
    include = include_flags(csrc)
    runtime = sorted((HERE / "host_cuda").glob("*.cpp" if counting else "runtime.cpp"))
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    kernels_folder = COUNTING_FOLDER if counting else KERNELS_FOLDER
    runtime_flags = COUNT if counting else KERNEL_FLAGS
    kernel_flags = [*COUNT, *COUNT_ACCESSES] if counting else KERNEL_FLAGS
    objects = {source.name: kernels_folder / f"{source.name}.o" for source in (*runtime, *kernels)}
    if only is None:
        run_ninja(kernels_folder, {objects[s.name]: s for s in runtime}, [*runtime_flags, *include], name="runtime")
        run_ninja(kernels_folder, {objects[s.name]: s for s in kernels}, [*kernel_flags, *include])
    else:
        objects[only.name] = folder / f"{only.name}.o"
        run_ninja(folder, {objects[only.name]: only}, [*kernel_flags, *include])
    hosts = {FOLDER / f"{source.name}.o": source for source in host_sources()}
    torch_headers = [flag for path in include_paths("cpu") for flag in ("-isystem", path)]
    flags = [*HOST_FLAGS, "-DHOST_CUDA", "-DMOBILEMAMBA_CUDA_ARCHS=sm_80,sm_90+PTX", *include_flags(), *torch_headers]
    # The kernels come first: of an inline function that several objects have, the linker takes the first.
    link = [
        *objects.values(),
        *hosts,
        *([] if counting else SANITIZE),
        *(f"-L{path}" for path in library_paths("cpu")),
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    library = folder / ("libcounting_cuda.so" if counting else "libhost_cuda.so")
    run_ninja(folder, hosts if only is None else {}, flags, library, link)
    return library


def include_flags(csrc: Path = CSRC) -> list[str]:
    return [f"-I{HERE / 'host_cuda' / 'include'}", f"-I{csrc}"]


def copy_unrolled(folder: Path, to: Path, pattern: str = "**/*.*") -> None:
    """Copies sources with their pragmas for loops as g++ knows them. Files that stay the same are not written."""
    for source in folder.glob(pattern):
        text = source.read_text()
        text = re.sub(r"#pragma unroll( \d+)?$", lambda m: f"#pragma GCC unroll{m[1] or ' 128'}", text, flags=re.M)
        copy = to / source.relative_to(folder)
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)


def run_ninja(
    folder: Path,
    objects: dict[Path, Path],
    flags: list[str],
    library: Path | None = None,
    link: Sequence[object] = (),
    name: str = "kernels",
) -> None:
    """Compiles the sources of ``objects`` with ``flags``, and links ``library`` where it is given."""
    lines = [
        f"rule compile\n command = g++ {' '.join([*FLAGS, *flags])} -MMD -MF $out.d -x c++ -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        *(f"build {object}: compile {source}" for object, source in objects.items()),
    ]
    if library:
        inputs = [str(part) for part in link if isinstance(part, Path)]
        options = " ".join(part for part in link if isinstance(part, str))
        lines.append(f"rule link\n command = g++ $in -shared {options} -o $out")
        lines.append(f"build {library}: link {' '.join(inputs)}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rules = folder / f"{library.stem if library else name}.ninja"
        rules.write_text("\n".join(lines) + "\n")
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        command = ["ninja", "-f", rules.name]
        done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stdout:
        raise RuntimeError(f"the host build of the CUDA sources failed:\n{done.stdout}{done.stderr}")


def environment(library: Path, **settings: object) -> dict[str, str]:
    """Variables for a process that tests ``library``: sanitizers are preloaded, HOST_CUDA_* is as ``settings`` say."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(HERE),  # where the plugin is
        "OMP_NUM_THREADS": "1",
        "HOST_CUDA_LIBRARY": str(library),
        **{f"HOST_CUDA_{name.upper()}": str(value) for name, value in settings.items()},
    }


def pytest_configure() -> None:
    import mobilemamba  # noqa: F401  (the usual library first)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: the CPU kernels are overridden
        torch.ops.load_library(os.environ["HOST_CUDA_LIBRARY"])
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
