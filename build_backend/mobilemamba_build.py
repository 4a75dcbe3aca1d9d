"""Builds the native library from csrc/ with the installed torch, and writes a record of the build beside it."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from mobilemamba_toolkit import Plan, arch_name, gencode, make_plan
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

TORCH_MINIMUM = "2.11"
COMPILER_MINIMUM = {"GCC": 11, "clang": 14}  # the oldest that the kernels are tested with; CMake reads this line
ROOT = Path(__file__).parent.parent.resolve()
# No -march: kernels choose their instruction set at run time. at::parallel_for is serial without -fopenmp.
# -g0: Python's own flags may ask for debug information, tens of megabytes of it.
CXX_FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-g0", "-fvisibility=hidden", "-fopenmp"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden"]


def torch_version() -> str | None:
    """Version of the torch that the build can import, local part included; None without one."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch_version(version: str) -> None:
    """Refuse a torch that is too old to build against."""

    def release(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", text)[:2])

    if release(version) < release(TORCH_MINIMUM):
        raise SystemExit(
            f"mobilemamba: the environment has torch {version}; expected {TORCH_MINIMUM} or later. "
            "Upgrade it (pip install --upgrade torch), then install again"
        )


def check_compiler(command: str) -> None:
    """Refuse a C++ compiler, as $CXX gives it, that is missing, too old, or without C++20 or OpenMP."""
    words = shlex.split(command) or [""]
    if shutil.which(words[0]) is None:
        raise SystemExit(
            f"mobilemamba: no C++ compiler {words[0]!r}; install one (apt install g++), or set CXX to another"
        )
    macros = dict(re.findall(r"^#define (\w+) (.*)$", _preprocess(*words, "-dM").stdout, re.M))
    name, macro = ("clang", "__clang_major__") if "__clang__" in macros else ("GCC", "__GNUC__")
    expected = " or ".join(f"{family} {version}" for family, version in COMPILER_MINIMUM.items())
    if macro not in macros:
        raise SystemExit(
            f"mobilemamba: {command!r} is not a C++ compiler that is known here; expected {expected} or later"
        )
    if int(macros[macro]) < COMPILER_MINIMUM[name]:
        raise SystemExit(
            f"mobilemamba: the C++ compiler {command!r} is {name} {macros[macro]}; expected {expected} or later: "
            "install one (apt install g++-11) and set CXX to it"
        )
    if _preprocess(*words, "-std=c++20").returncode != 0:
        raise SystemExit(
            f"mobilemamba: the C++ compiler {command!r} does not accept -std=c++20; set CXX to one that does"
        )
    if _preprocess(*words, "-fopenmp", "-include", "omp.h").returncode != 0:
        raise SystemExit(
            f"mobilemamba: the C++ compiler {command!r} has no OpenMP; install it (apt install libomp-dev for clang)"
        )


def _preprocess(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, "-E", "-x", "c++", os.devnull], capture_output=True, text=True)


def without_wrapper(command: str) -> str:
    """``command`` without ccache or sccache before it: torch puts them there itself, and takes $CXX as one word."""
    words = shlex.split(command)
    return words[1] if len(words) == 2 and words[0] in ("ccache", "sccache") else command


def without_search_path(command: list[str], ldflags: str = "") -> list[str]:
    """A link command without the search path that some Pythons have for their modules, such as pyenv's 3.13.

    It is a folder of the machine that builds, and the library is no module. What the user's ``LDFLAGS`` ask for stays.
    """
    asked = shlex.split(ldflags)
    return [word for word in command if word in asked or not word.startswith("-Wl,-rpath")]


def torch_requirement() -> str:
    """The torch that the wheel requires: the release it is built against (== disregards a local part like +cpu)."""
    version = torch_version()
    return f"torch>={TORCH_MINIMUM}" if version is None else f"torch=={version.partition('+')[0]}"


def build_base() -> str:
    """A build folder for each torch and Python, so that environments sharing a checkout never mix their objects."""
    return str(Path("build") / f"torch-{torch_version()}-{sys.implementation.cache_tag}")


def sources(cuda: bool) -> list[str]:
    """Every source below csrc/, relative to the root; csrc/cuda/ for CUDA only."""
    csrc = ROOT / "csrc"
    found = [path for path in csrc.rglob("*.cpp") if cuda or csrc / "cuda" not in path.parents]
    found += (csrc / "cuda").rglob("*.cu") if cuda else []
    return sorted(str(path.relative_to(ROOT)) for path in found)


def units(sources: list[str], folder: Path) -> list[str]:
    """The translation units: one for the .cpp files of each folder, which it includes; it is written to ``folder``.

    torch's headers take more time than most of these sources, and are read once for each unit. isa_*.cpp stay alone:
    each chooses the instruction set of all that it includes.
    """
    together: dict[str, list[Path]] = {}
    alone = []
    for path in map(Path, sources):
        if path.suffix == ".cpp" and not path.name.startswith("isa_"):
            together.setdefault(path.parent.name, []).append(path)
        else:
            alone.append(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    for name, paths in together.items():
        unit = folder / f"{name}.cpp"
        text = "".join(f'#include "{path.relative_to("csrc")}"\n' for path in paths)
        if not unit.exists() or unit.read_text() != text:  # an unchanged unit is not compiled again
            unit.write_text(text)
    return [*(str(folder / f"{name}.cpp") for name in together), *alone]


def git_commit() -> str | None:
    """Commit of the checkout, followed by -dirty if files differ; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class CleanBuild(build):
    """build, into an empty folder: modules of an earlier build are removed. Objects are kept in another folder."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PlainWheel(bdist_wheel):
    """bdist_wheel whose tag names the system alone: the library calls no function of Python's, so it fits them all."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def missing_torch() -> SystemExit:
    """The refusal to build without a torch. It names the option for front ends that hide the torch of the target."""
    return SystemExit(
        f"mobilemamba: no torch to build against in {sys.prefix}: install torch, setuptools>=77 and ninja into your "
        "environment, and build there with --no-build-isolation (uv) or --no-isolation (python -m build)"
    )


class MissingTorch(build_ext):
    """build_ext without a torch: it fails when it runs, because an sdist needs no torch."""

    def run(self) -> None:
        raise missing_torch()


def build_ext_class() -> type[build_ext]:
    """The build_ext command, which extends torch's."""
    version = torch_version()
    if version is None:
        return MissingTorch
    check_torch_version(version)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # ninja's
    import torch

    plan = make_plan(torch.version.cuda, os.environ)
    if plan.toolkit is not None:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)  # read when the next line is run
    from torch.utils.cpp_extension import BuildExtension, include_paths, is_ninja_available, library_paths

    class BuildNative(BuildExtension):
        """Compiles csrc/ with ninja into _C.so, a plain library: loading it registers the operators."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(Path(build_base()) / "objects")  # kept, also by an editable install

        def build_extensions(self) -> None:
            for name in ("linker_so", "linker_so_cxx"):
                command = without_search_path(getattr(self.compiler, name), os.environ.get("LDFLAGS", ""))
                setattr(self.compiler, name, command)
            super().build_extensions()

        def get_ext_filename(self, name: str) -> str:
            """Without the Python version in the name, because the library is no Python module."""
            return str(Path(*name.split(".")).with_suffix(".so"))

        def run(self) -> None:
            print(f"mobilemamba: building for torch {torch.__version__}, {plan}", flush=True)
            if not is_ninja_available():
                raise SystemExit("mobilemamba: no ninja to build with; install it (pip install ninja)")
            check_compiler(os.environ.get("CXX", "c++"))
            if "CXX" in os.environ and hasattr(torch.utils.cpp_extension, "_wrap_compiler"):
                os.environ["CXX"] = without_wrapper(os.environ["CXX"])
            (library,) = self.extensions
            describe(library, plan, self.distribution.get_version(), include_paths("cpu"), library_paths("cpu"))
            super().run()
            path = Path(self.get_ext_fullpath(library.name)).with_suffix(".json")
            path.write_text(json.dumps(self.record(), indent=2) + "\n")

        def record(self) -> dict[str, object]:
            """What must be known before the library is loaded, and what its compiler does not know."""
            cuda = plan.toolkit is not None
            return {
                "version": self.distribution.get_version(),
                "commit": git_commit(),
                "torch": str(torch.__version__),
                "torch_cuda": torch.version.cuda,
                "cuda": plan.toolkit.version if plan.toolkit else None,
                "why": str(plan),
                "cxx_flags": CXX_FLAGS,
                "nvcc_flags": [*NVCC_FLAGS, *gencode(plan.archs)] if cuda else [],
            }

    return BuildNative


def describe(library: object, plan: Plan, version: str, include_dirs: list[str], library_dirs: list[str]) -> None:
    """Fill in the Extension: sources, flags and libraries for this plan. Torch's headers are system headers."""
    cuda = plan.toolkit is not None
    archs = ",".join(map(arch_name, plan.archs))
    define = [f"-DMOBILEMAMBA_VERSION={version}"]
    define += ["-DMOBILEMAMBA_CUDA", f"-DMOBILEMAMBA_CUDA_ARCHS={archs}"] if cuda else []
    headers = [*include_dirs, *(plan.toolkit.include_dirs if plan.toolkit else ())]
    library.sources = units(sources(cuda), Path(build_base()) / "units")
    library.include_dirs = [str(ROOT / "csrc")]
    library.extra_compile_args = {
        "cxx": [*CXX_FLAGS, *define, *(flag for path in headers for flag in ("-isystem", path))],
        "nvcc": [*NVCC_FLAGS, *gencode(plan.archs)],  # no torch headers: .cu files are free of torch
    }
    library.library_dirs = [*library_dirs, *(plan.toolkit.library_dirs if plan.toolkit else ())]
    library.libraries = ["torch", "torch_cpu", "c10", *(["torch_cuda", "c10_cuda"] if cuda else [])]
    library.extra_link_args = ["-fopenmp"]
    if plan.toolkit is not None:  # the runtime by its SONAME, which is the one that torch has loaded already
        library.extra_link_args.append(f"-l:libcudart.so.{plan.toolkit.version.split('.')[0]}")
