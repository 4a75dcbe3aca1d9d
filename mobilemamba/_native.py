"""Loads the native library once, after checking that it was built for the running torch."""

import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["BUILD", "LIBRARY", "has_cuda_kernels"]

LIBRARY = Path(__file__).with_name("_C.so")  # no Python module: every Python version loads it


def read_build(library: Path) -> dict[str, Any]:
    """The record that the build wrote beside ``library``: what it was built for."""
    record = library.with_suffix(".json")
    if not (library.is_file() and record.is_file()):
        raise ImportError(
            f"mobilemamba is imported from {library.parent}, where the library is not built: "
            "run `pip install -e .` in the checkout; or, after `pip install .`, start Python outside the checkout"
        )
    return json.loads(record.read_text())


def check_match(build: dict[str, Any], torch_version: str, torch_cuda: str | None) -> None:
    """Refuse a library that was built against another torch release or, with CUDA kernels, another major CUDA."""

    def identity(version: str, cuda: str | None) -> tuple[str, str | None]:
        kernels = build["cuda"] is not None  # without CUDA kernels the library links only what every torch has
        return version.partition("+")[0], cuda.partition(".")[0] if kernels and cuda else None

    if identity(build["torch"], build["torch_cuda"]) != identity(torch_version, torch_cuda):
        raise ImportError(
            f"mobilemamba was built against torch {_name(build['torch'], build['torch_cuda'])} and is running with "
            f"torch {_name(torch_version, torch_cuda)}: rebuild it with `pip install --force-reinstall --no-deps .` "
            "from the checkout"
        )


def _name(version: str, cuda: str | None) -> str:
    return f"{version} (CUDA {cuda})" if cuda else f"{version} (no CUDA)"


def check_copies(build: dict[str, Any]) -> None:
    """Refuse to load beside operators of another version, which a C++ library registered in this process."""
    if not hasattr(torch.ops.mobilemamba, "version"):
        return
    loaded = torch.ops.mobilemamba.version()
    if loaded != build["version"]:
        raise ImportError(
            f"mobilemamba {build['version']} cannot be imported into a process that has loaded the C++ library "
            f"libmobilemamba {loaded}: use the same version of both"
        )


def _load() -> dict[str, Any]:
    build = read_build(LIBRARY)
    check_match(build, torch.__version__, torch.version.cuda)
    check_copies(build)
    try:
        torch.ops.load_library(LIBRARY)  # registers the operators
    except OSError as error:
        raise ImportError(
            f"mobilemamba was built against torch {build['torch']} and does not load with torch {torch.__version__} "
            f"({error.__cause__ or error}): rebuild it with `pip install --force-reinstall --no-deps .` from the "
            "checkout"
        ) from error
    return build


BUILD: dict[str, Any] = _load()


def has_cuda_kernels() -> bool:
    """Whether the library was built with CUDA kernels. They may be there without a GPU."""
    return BUILD["cuda"] is not None
