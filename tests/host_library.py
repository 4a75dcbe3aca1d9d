"""Builds the CUDA sources with the host compiler, for tests that run them on the CPU; see host_cuda/include.

As a pytest plugin (``-p host_library``) it loads the library that HOST_CUDA_LIBRARY names after the usual one. The CUDA
kernels then replace the CPU kernels, so that every test of CPU tensors tests them. Uninitialised memory is NaN. The
sanitizers watch the kernels and the stand-in for CUDA; the sources that call torch have none, which halves the time of
the build.
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
HOST_FLAGS = ["-O0"]
CAN_BUILD = platform.system() == "Linux" and platform.machine() == "x86_64" and shutil.which("g++") is not None
FOLDER = HERE.parent / "build" / f"host_cuda-torch-{torch.__version__}-{sys.implementation.cache_tag}"


def host_sources() -> list[Path]:
    """The sources that call torch, in the package's translation units."""
    sources = [path for path in native.sources(cuda=True) if re.match(r"csrc/(ops|cuda)/.*\.cpp$", path)]
    return [Path(unit) for unit in native.units(sources, FOLDER / "units")]


def build(csrc: Path = CSRC, folder: Path = FOLDER, only: Path | None = None) -> Path:
    """Builds the library from ``csrc`` in ``folder``, as far as it is not up to date, and returns its path.

    With ``only``, it builds just this source, and links it with the other objects of the unchanged library.
    Processes that build in the same folder take turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(rules(csrc, only))
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        done = subprocess.run(["ninja"], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stdout:
        raise RuntimeError(f"the host build of the CUDA sources failed:\n{done.stdout}{done.stderr}")
    return folder / "libhost_cuda.so"


def rules(csrc: Path, only: Path | None) -> str:
    """What ninja does; see ``build``."""
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels = [HERE / "host_cuda" / "runtime.cpp", *sorted((csrc / "cuda").glob("*.cu"))]
    # The kernels come first: of an inline function that several objects have, the linker takes the first.
    options = dict.fromkeys(kernels, KERNEL_FLAGS) | dict.fromkeys(host_sources(), HOST_FLAGS)
    objects = {source: f"{source.stem}-{source.suffix[1:]}.o" for source in options}
    compiled = {source: object for source, object in objects.items() if only in (None, source)}
    linked = [object if source in compiled else str(FOLDER / object) for source, object in objects.items()]
    flags = [*FLAGS, "-DMOBILEMAMBA_CUDA_ARCHS=sm_80,sm_90+PTX"]
    flags += ["-I", str(HERE / "host_cuda" / "include"), "-I", str(csrc)]
    flags += [flag for path in include_paths("cpu") for flag in ("-isystem", path)]
    link = ["-shared", *SANITIZE, *(f"-L{path}" for path in library_paths("cpu")), "-ltorch", "-ltorch_cpu", "-lc10"]
    lines = [
        f"rule compile\n command = g++ {' '.join(flags)} $options -MMD -MF $out.d -x c++ -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        f"rule link\n command = g++ $in {' '.join(link)} -o $out",
    ]
    for source, object in compiled.items():
        lines += [f"build {object}: compile {source}", f" options = {' '.join(options[source])}"]
    return "\n".join([*lines, f"build libhost_cuda.so: link {' '.join(linked)}\n"])


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
