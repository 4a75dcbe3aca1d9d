"""The library's checks at import, and what `mobilemamba info` is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobilemamba import _native
from mobilemamba.cli import info

CPU_BUILD = {"torch": "2.13.0+cpu", "torch_cuda": None, "cuda": None}
CUDA_BUILD = {"torch": "2.15.0+cu132", "torch_cuda": "13.2", "cuda": "13.0"}
CUDA_TORCH_CPU_BUILD = {"torch": "2.15.0+cu132", "torch_cuda": "13.2", "cuda": None}


def test_library_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"imported from .*, where the library is not built: run `pip install -e \.`"):
        _native.read_build(tmp_path / "_C.so")


def test_library_without_its_record(tmp_path: Path) -> None:
    (tmp_path / "_C.so").touch()
    with pytest.raises(ImportError, match="is not built"):
        _native.read_build(tmp_path / "_C.so")


@pytest.mark.parametrize(
    ("build", "version", "cuda"),
    [
        (CPU_BUILD, "2.13.0+cpu", None),
        (CPU_BUILD, "2.13.0", None),
        (CUDA_BUILD, "2.15.0+cu132", "13.2"),
        (CUDA_BUILD, "2.15.0+cu130", "13.0"),
        (CUDA_TORCH_CPU_BUILD, "2.15.0+cpu", None),
    ],
)
def test_matching_torch(build: dict, version: str, cuda: str | None) -> None:
    _native.check_match(build, version, cuda)


@pytest.mark.parametrize(
    ("build", "version", "cuda", "message"),
    [
        (CPU_BUILD, "2.15.0+cu132", "13.2", r"2\.13\.0\+cpu \(no CUDA\) and is running with torch 2\.15\.0\+cu132"),
        (CPU_BUILD, "2.13.1+cpu", None, r"running with torch 2\.13\.1\+cpu \(no CUDA\)"),
        (CUDA_BUILD, "2.15.0+cpu", None, r"\(CUDA 13\.2\) and is running with torch 2\.15\.0\+cpu \(no CUDA\)"),
        (
            CUDA_BUILD,
            "2.15.0+cu126",
            "12.6",
            r"\(CUDA 13\.2\) and is running with torch .* \(CUDA 12\.6\)",
        ),
    ],
)
def test_another_torch(build: dict, version: str, cuda: str | None, message: str) -> None:
    with pytest.raises(ImportError, match=message) as caught:
        _native.check_match(build, version, cuda)
    assert "pip install --force-reinstall --no-deps ." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_library_that_does_not_load(tmp_path: Path) -> None:
    record = dict(CPU_BUILD, torch=str(torch.__version__), torch_cuda=torch.version.cuda)
    (tmp_path / "_C.so").write_text("not a library")
    (tmp_path / "_build.json").write_text(json.dumps(record))
    with pytest.raises(ImportError, match="does not load with torch"):
        _native._load(tmp_path / "_C.so")


def test_library_needs_no_python() -> None:
    """The operators are for C++ programs too, so the library must not want symbols of an interpreter."""
    assert b"libtorch_python" not in _native.LIBRARY.read_bytes()


def test_import_is_quick(tmp_path: Path) -> None:
    """Beyond torch itself the import costs little (aim: under 0.1 s; the bound leaves room for a busy machine)."""
    code = "import torch, time; start = time.perf_counter(); import mobilemamba; print(time.perf_counter() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path)) for _ in range(2)]
    assert min(times) < 0.5


def test_info() -> None:
    facts = json.loads(json.dumps(info.collect()))
    assert facts["running"]["torch"] == str(torch.__version__)
    assert facts["built"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["backends"]["CUDA"].startswith("not built") != _native.has_cuda_kernels()
    text = info.format_text(facts)
    assert "weights cache: " in text
    assert "None" not in text
    for line in text.splitlines():
        assert line == line.rstrip()
