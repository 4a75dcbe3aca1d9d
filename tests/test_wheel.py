"""What the built library links, and what is in the source archive."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from mobilemamba import _native

ROOT = Path(__file__).resolve().parents[1]
#: Torch's and the system's libraries. libomp is clang's OpenMP.
ALLOWED = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|c10|c10_cuda)\.so"
    r"|libcudart\.so\.\d+"
    r"|lib(gomp\.so\.1|omp\.so\.5|stdc\+\+\.so\.6|gcc_s\.so\.1|m\.so\.6|c\.so\.6|pthread\.so\.0|dl\.so\.2)"
    r"|ld-linux-[\w-]+\.so\.\d"
)
NOT_SHIPPED = {".clang-format", ".gitignore"}


def readelf(option: str, library: Path) -> str:
    program = shutil.which("readelf")
    if program is None:
        pytest.skip("no readelf (Debian: binutils)")
    command = [program, "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def python_symbols(library: Path) -> list[str]:
    """The functions and variables of Python that ``library`` takes from its process."""
    undefined = re.findall(r" UND (\w+)", readelf("--dyn-syms", library))
    assert undefined, "no undefined symbols: has the output of readelf changed?"
    return [name for name in undefined if re.match("_?Py", name)]


def test_links_only_torch_and_the_system() -> None:
    linked = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", _native.LIBRARY))
    assert {"libtorch_cpu.so", "libc10.so"} <= set(linked)
    assert [name for name in linked if not ALLOWED.fullmatch(name)] == []
    assert any("cudart" in name for name in linked) == _native.has_cuda_kernels()


def test_has_no_search_path() -> None:
    """A path of the machine that built it would follow the wheel to other machines."""
    assert not re.search(r"\((RPATH|RUNPATH)\)", readelf("--dynamic", _native.LIBRARY))


def test_calls_nothing_of_python() -> None:
    """So one wheel fits every version of Python."""
    assert python_symbols(_native.LIBRARY) == []


def test_finds_calls_of_python() -> None:
    assert "PyErr_SetString" in python_symbols(Path(torch.__file__).with_name("lib") / "libtorch_python.so")


def test_allowed_excludes_what_torch_does_not_bring() -> None:
    for name in ("libtorch_python.so", "libpython3.11.so.1.0", "libcublas.so.13", "libopenblas.so.0"):
        assert not ALLOWED.fullmatch(name)


def test_build_requirements_are_named_in_the_documents() -> None:
    text = (ROOT / "docs/wheels.md").read_text()
    for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libstdc++.so.6", "libgcc_s.so.1"):
        assert f"`{name}`" in text
        assert ALLOWED.fullmatch(name)


@pytest.mark.full
def test_source_archive_has_every_file(tmp_path: Path) -> None:
    """Made from a copy of the tracked files, without a torch in sight."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    copy = tmp_path / "checkout"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import mobilemamba_backend, mobilemamba_build; "
        "mobilemamba_build.torch_version = lambda: None; print(mobilemamba_backend.build_sdist(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in tracked if name not in members and not name.startswith((".ci/", ".github/"))}
    assert missing <= NOT_SHIPPED
    assert not any(name.endswith((".so", ".pyc")) for name in members)
