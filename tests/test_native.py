"""The library's checks at import, two copies of it in one process, and the facts of `mobilemamba info`."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mobilemamba
from mobilemamba import _native
from mobilemamba.cli import info

PLATFORM = sysconfig.get_platform().replace("-", "_")  # linux_x86_64
CPU_BUILD = {"torch": "2.13.0+cpu", "torch_cuda": None, "cuda": None}
CUDA_BUILD = {"torch": "2.15.0+cu132", "torch_cuda": "13.2", "cuda": "13.0"}
CUDA_TORCH_CPU_BUILD = {"torch": "2.15.0+cu132", "torch_cuda": "13.2", "cuda": None}


def test_library_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"imported from .*, where the library is not built: run `pip install -e \.`"):
        _native.read_build(tmp_path / _native.LIBRARY.name)


def test_library_without_its_record(tmp_path: Path) -> None:
    library = tmp_path / _native.LIBRARY.name
    library.touch()
    with pytest.raises(ImportError, match="is not built"):
        _native.read_build(library)


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


def python(folder: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh process, outside the checkout."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_library_that_does_not_load(tmp_path: Path) -> None:
    package = tmp_path / "mobilemamba"
    shutil.copytree(_native.LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "*.pt", "__pycache__"))
    (package / _native.LIBRARY.name).write_text("not a library")
    done = python(tmp_path, "import mobilemamba")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"ImportError: mobilemamba was built against torch .* does not load with torch .* rebuild .*", message
    )


def test_library_needs_no_libtorch_python() -> None:
    assert b"libtorch_python" not in _native.LIBRARY.read_bytes()


def test_package_requires_what_the_library_needs() -> None:
    """The tag says Linux, for every Python; the metadata says the release of torch."""
    found = importlib.metadata.distributions(name="mobilemamba")  # a checkout on the path may have an egg-info too
    distribution = next(distribution for distribution in found if distribution.read_text("WHEEL"))
    assert re.findall("^Tag: (.*)$", distribution.read_text("WHEEL") or "", re.M) == [f"py3-none-{PLATFORM}"]
    needed = [requirement for requirement in distribution.requires or [] if "extra ==" not in requirement]
    assert sorted(needed) == ["numpy", "pillow", f"torch=={torch.__version__.partition('+')[0]}"]


def test_build_facts() -> None:
    facts = torch.ops.mobilemamba.build_facts()
    assert facts["version"] == mobilemamba.__version__ == _native.BUILD["version"] == torch.ops.mobilemamba.version()
    assert facts["torch"] == _native.BUILD["torch"].partition("+")[0]
    assert facts.get("cuda") == _native.BUILD["cuda"]
    assert ("archs" in facts) == _native.has_cuda_kernels()
    assert all(re.fullmatch(r"sm_\d+[af]?(\+PTX)?", arch) for arch in facts.get("archs", "sm_90").split(","))
    assert re.search(r"(GCC|Clang) \d+\.\d+", facts["compiler"])
    assert torch.ops.mobilemamba.cpu_kernels() in ("generic", "avx2", "avx512")


# Sums the gradient of an operator: kernels for autograd and for the CPU are called.
GRADIENT = """
u = torch.linspace(-1, 1, 96).view(1, 6, 4, 4).requires_grad_()
torch.ops.mobilemamba.haar_conv2d(u, torch.linspace(0, 1, 216).view(24, 1, 3, 3)).square().sum().backward()
total = u.grad.double().sum().item()
"""
PYTHON = "import mobilemamba\n"
CPP = (
    "import ctypes, sys, torch\nctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)\n"  # global, as if a program links it
)


@pytest.mark.parametrize("order", [PYTHON + CPP, CPP + PYTHON], ids=["Python first", "C++ first"])
def test_two_copies_in_one_process(tmp_path: Path, order: str) -> None:
    """The second copy works through the operators of the first."""
    copy = shutil.copy(_native.LIBRARY, tmp_path / "libmobilemamba.so")
    alone = {"torch": torch}
    exec(GRADIENT, alone)
    done = python(tmp_path, f"{order}{GRADIENT}print(torch.ops.mobilemamba.version(), total)", copy)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{mobilemamba.__version__} {alone['total']}\n", "")


# Operators of another version, as far as the library can tell.
ANOTHER = """
import torch, sys
torch.library.define("mobilemamba::version", "() -> str")
torch.library.impl("mobilemamba::version", "CompositeExplicitAutograd", lambda: "9.8.7")
"""


def test_python_refuses_operators_of_another_version(tmp_path: Path) -> None:
    done = python(tmp_path, ANOTHER + PYTHON)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: mobilemamba {mobilemamba.__version__} cannot be imported into a process that has loaded the C++ "
        "library libmobilemamba 9.8.7: use the same version of both"
    )


def test_cpp_names_operators_of_another_version(tmp_path: Path) -> None:
    copy = shutil.copy(_native.LIBRARY, tmp_path / "libmobilemamba.so")
    code = ANOTHER + "torch.ops.load_library(sys.argv[1])\nprint(hasattr(torch.ops.mobilemamba, 'ffn'))"
    done = python(tmp_path, code, copy)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert (
        f"libmobilemamba {mobilemamba.__version__} does not register its operators: those of mobilemamba 9.8.7" in line
    )


def test_import_is_quick(tmp_path: Path) -> None:
    """Beyond torch itself the import costs little: 0.03 s of a processor of 2024; a busy or older one takes longer."""
    code = (
        "import sys, time, torch\n"
        f"sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False\n"
        "start = time.process_time(); import mobilemamba; print(time.process_time() - start)"
    )
    _compiles, *times = [float(subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path)) for _ in range(4)]
    assert min(times) < 0.2


def test_import_brings_only_this_package(tmp_path: Path) -> None:
    """No extra is imported, nor anything else outside of Python that torch has not imported."""
    code = (
        "import sys, torch; before = set(sys.modules); import mobilemamba\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    new = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).split()
    assert set(new) - sys.stdlib_module_names <= {"mobilemamba", "torch"}


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
