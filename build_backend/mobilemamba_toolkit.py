"""Decides whether CUDA is built, with which toolkit and for which archs. Imports no torch and needs no GPU."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Built by default: each that the toolkit knows, and PTX of the last of them. CMake reads this line.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, as its nvcc describes it. nvcc itself may be a wrapper in another folder."""

    home: Path
    version: str  # 13.0
    archs: tuple[str, ...]  # 7.5, 8.0, ...: all that it compiles for
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What the build is for, and why."""

    toolkit: Toolkit | None  # None: CPU only
    archs: tuple[str, ...]  # 9.0, 12.0+PTX
    reason: str

    def __str__(self) -> str:
        if self.toolkit is None:
            return f"CPU only ({self.reason})"
        return f"CUDA {self.toolkit.version} for {' '.join(map(arch_name, self.archs))} ({self.reason})"


def arch_name(arch: str) -> str:
    """sm_90 for 9.0, sm_120+PTX for 12.0+PTX."""
    return "sm_" + arch.replace(".", "")


def gencode(archs: tuple[str, ...]) -> list[str]:
    """The nvcc flags that compile for these archs."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def choose_archs(requested: str, toolkit: Toolkit) -> tuple[str, ...]:
    """The archs of TORCH_CUDA_ARCH_LIST (separated by semicolons, commas or spaces), or the default list if empty."""
    archs = tuple(re.split(r"[;,\s]+", requested.strip(";, \t")))
    if archs == ("",):
        known = [arch for arch in DEFAULT_ARCHS if arch in toolkit.archs]
        if not known:
            raise SystemExit(
                f"mobilemamba: nvcc {toolkit.version} compiles for none of {' '.join(DEFAULT_ARCHS)}; "
                "set TORCH_CUDA_ARCH_LIST"
            )
        return (*known[:-1], known[-1] + "+PTX")
    for arch in archs:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if match is None:
            raise SystemExit(
                f"mobilemamba: TORCH_CUDA_ARCH_LIST has {arch!r}; expected compute capabilities such as 8.0;9.0+PTX"
            )
        if float(match[1]) < 7:
            raise SystemExit(f"mobilemamba: TORCH_CUDA_ARCH_LIST has {arch}; expected 7.0 (Volta) or later")
        if match[1] not in toolkit.archs:
            raise SystemExit(
                f"mobilemamba: TORCH_CUDA_ARCH_LIST has {arch}, and nvcc {toolkit.version} "
                f"compiles for {' '.join(toolkit.archs)} only"
            )
    return archs


def find_nvcc(environ: Mapping[str, str]) -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH if set, else the one on PATH, else /usr/local/cuda's."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    on_path = None if home else shutil.which("nvcc", path=environ.get("PATH"))
    nvcc = Path(on_path) if on_path else Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return nvcc if os.access(nvcc, os.X_OK) else None


def ask_nvcc(nvcc: Path) -> Toolkit:
    """The toolkit that ``nvcc`` belongs to, from its own output."""

    def output(*arguments: str) -> str:
        done = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"mobilemamba: {nvcc} {' '.join(arguments)} failed:\n{done.stderr.strip()}")
        return done.stdout + done.stderr

    version = re.search(r"release (\d+\.\d+)", output("--version"))
    archs = sorted({(int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)\b", output("--list-gpu-arch"))})
    dryrun = output("--dryrun", "-x", "cu", "-c", os.devnull)
    settings = dict(re.findall(r"^#\$ (TOP|INCLUDES|LIBRARIES)=(.*)$", dryrun, re.M))
    home = Path(settings.get("TOP", nvcc.parent.parent)).resolve()
    if version is None or not archs:
        raise SystemExit(f"mobilemamba: {nvcc} does not say its version and archs; is it NVIDIA's compiler?")
    return Toolkit(
        home=home,
        version=version[1],
        archs=tuple(f"{major}.{minor}" for major, minor in archs),
        include_dirs=tuple(re.findall(r'-I([^"]+)"', settings.get("INCLUDES", ""))) or (f"{home}/include",),
        library_dirs=tuple(re.findall(r'-L([^"]+)"', settings.get("LIBRARIES", ""))) or (f"{home}/lib64",),
    )


def make_plan(torch_cuda: str | None, environ: Mapping[str, str]) -> Plan:
    """Whether to build CUDA: FORCE_CUDA decides if set; otherwise CUDA is built if torch has it and nvcc is found.

    Args:
        torch_cuda: ``torch.version.cuda``, None for a CPU build of torch.
        environ: FORCE_CUDA, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUDA_PATH and PATH are read.

    Raises:
        SystemExit: CUDA was asked for but something is missing, or toolkit and torch differ in the major CUDA version.
    """
    force = environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        raise SystemExit(f"mobilemamba: FORCE_CUDA is {force!r}; expected 0, 1, or unset to build CUDA where possible")
    if force == "0":
        return Plan(None, (), "FORCE_CUDA=0")
    if torch_cuda is None:
        if force:
            raise SystemExit("mobilemamba: FORCE_CUDA=1, but the installed torch has no CUDA; install a CUDA torch")
        return Plan(None, (), "torch has no CUDA")
    nvcc = find_nvcc(environ)
    if nvcc is None:
        home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
        missing = f"no nvcc in CUDA_HOME {home}" if home else "no nvcc on PATH or in CUDA_HOME"
        if force:
            raise SystemExit(f"mobilemamba: FORCE_CUDA=1, but {missing}; install a CUDA {torch_cuda} toolkit")
        return Plan(None, (), f"torch has CUDA {torch_cuda}, but {missing}")
    toolkit = ask_nvcc(nvcc)
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise SystemExit(
            f"mobilemamba: nvcc is of CUDA {toolkit.version} and torch of CUDA {torch_cuda}; expected the same major "
            "version: set CUDA_HOME to a matching toolkit, or FORCE_CUDA=0 to build for the CPU only"
        )
    archs = choose_archs(environ.get("TORCH_CUDA_ARCH_LIST", ""), toolkit)
    return Plan(toolkit, archs, "TORCH_CUDA_ARCH_LIST" if environ.get("TORCH_CUDA_ARCH_LIST") else "default archs")
