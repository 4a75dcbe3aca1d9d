"""The decisions of the build: torch of the target environment, CUDA or not, archs, errors. Nothing is compiled here."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

BACKEND = Path(__file__).parent.parent / "build_backend"
if not BACKEND.is_dir():
    pytest.skip("not in a checkout: no build_backend/", allow_module_level=True)
sys.path.insert(0, str(BACKEND))

import mobilemamba_backend as backend  # noqa: E402
import mobilemamba_build as build  # noqa: E402
import mobilemamba_toolkit as toolkit  # noqa: E402

CUDA_13 = toolkit.Toolkit(
    home=Path("/cuda"),
    version="13.0",
    archs=("7.5", "8.0", "8.6", "8.7", "8.8", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"),
    include_dirs=("/cuda/include",),
    library_dirs=("/cuda/lib64",),
)

NVCC = r"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--list-gpu-arch) printf 'compute_75\ncompute_90\ncompute_120\ncompute_103\n' ;;
--dryrun) printf '#$ TOP=/opt/cuda/bin/..\n#$ INCLUDES="-I/opt/inc"  \n#$ LIBRARIES=  "-L/opt/a" "-L/opt/b"\n' >&2 ;;
esac
"""


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """A folder with an nvcc that answers like the real one and compiles nothing."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler 'no-such-c\\+\\+'; install one"):
        build.check_compiler("no-such-c++ -pipe")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler ''"):
        build.check_compiler(" ")
    build.check_compiler(f"'{sys.executable}' -O2")  # any program that there is


def test_default_archs_end_with_ptx() -> None:
    archs = toolkit.choose_archs("", CUDA_13)
    assert archs == ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")


@pytest.mark.parametrize(
    ("known", "expected"), [(("7.5", "8.0", "9.0"), ("7.5", "8.0", "9.0+PTX")), (("5.0", "6.0"), ("6.0+PTX",))]
)
def test_default_archs_of_other_toolkits(known: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert toolkit.choose_archs("", toolkit.Toolkit(Path("/cuda"), "11.8", known, (), ())) == expected


@pytest.mark.parametrize("requested", ["8.0;9.0a;12.0+PTX", "8.0 9.0a 12.0+PTX", "8.0, 9.0a, 12.0+PTX;"])
def test_requested_archs(requested: str) -> None:
    archs = toolkit.choose_archs(requested, CUDA_13)
    assert archs == ("8.0", "9.0a", "12.0+PTX")
    assert toolkit.gencode(archs) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize("requested", ["Hopper", "sm_90", "9", "8.0;;9.0x"])
def test_malformed_arch(requested: str) -> None:
    with pytest.raises(SystemExit, match=r"expected compute capabilities such as 8\.0;9\.0\+PTX"):
        toolkit.choose_archs(requested, CUDA_13)


def test_arch_too_old() -> None:
    with pytest.raises(SystemExit, match=r"has 6\.1; expected 7\.0 \(Volta\) or later"):
        toolkit.choose_archs("6.1", CUDA_13)


def test_arch_unknown_to_the_toolkit() -> None:
    with pytest.raises(SystemExit, match=r"has 7\.0, and nvcc 13\.0 compiles for 7\.5 8\.0"):
        toolkit.choose_archs("7.0", CUDA_13)


def test_nvcc_describes_its_toolkit(cuda_home: Path) -> None:
    found = toolkit.ask_nvcc(cuda_home / "bin" / "nvcc")
    assert found.version == "13.0"
    assert found.archs == ("7.5", "9.0", "10.3", "12.0")
    assert found.home == Path("/opt/cuda")
    assert found.include_dirs == ("/opt/inc",)
    assert found.library_dirs == ("/opt/a", "/opt/b")


def test_something_else_called_nvcc(cuda_home: Path) -> None:
    (cuda_home / "bin" / "nvcc").write_text("#!/bin/sh\n")
    with pytest.raises(SystemExit, match="does not say its version"):
        toolkit.ask_nvcc(cuda_home / "bin" / "nvcc")


@pytest.mark.parametrize(
    ("torch_cuda", "environ", "line"),
    [
        (None, {}, "CPU only (torch has no CUDA)"),
        ("13.2", {"FORCE_CUDA": "0"}, "CPU only (FORCE_CUDA=0)"),
        ("13.2", {"CUDA_HOME": "/none"}, "CPU only (torch has CUDA 13.2, but no nvcc in CUDA_HOME /none)"),
    ],
)
def test_cpu_only(torch_cuda: str | None, environ: dict[str, str], line: str) -> None:
    plan = toolkit.make_plan(torch_cuda, environ)
    assert plan.toolkit is None
    assert str(plan) == line


@pytest.mark.parametrize("force", [{}, {"FORCE_CUDA": "1"}])
def test_cuda(cuda_home: Path, force: dict[str, str]) -> None:
    """A toolkit of another minor version than torch's CUDA is fine."""
    environ = {"CUDA_HOME": str(cuda_home), **force}
    assert str(toolkit.make_plan("13.2", environ)) == "CUDA 13.0 for sm_75 sm_90 sm_120+PTX (default archs)"
    environ["TORCH_CUDA_ARCH_LIST"] = "9.0"
    assert str(toolkit.make_plan("13.2", environ)) == "CUDA 13.0 for sm_90 (TORCH_CUDA_ARCH_LIST)"


def test_nvcc_on_path(cuda_home: Path) -> None:
    assert toolkit.find_nvcc({"PATH": str(cuda_home / "bin")}) == cuda_home / "bin" / "nvcc"
    assert toolkit.find_nvcc({"PATH": str(cuda_home / "bin"), "CUDA_HOME": "/none"}) is None


@pytest.mark.parametrize(
    ("torch_cuda", "environ", "message"),
    [
        (None, {"FORCE_CUDA": "1"}, "FORCE_CUDA=1, but the installed torch has no CUDA"),
        ("13.2", {"FORCE_CUDA": "1", "CUDA_HOME": "/none"}, "FORCE_CUDA=1, but no nvcc in CUDA_HOME /none"),
        ("13.2", {"FORCE_CUDA": "yes"}, "FORCE_CUDA is 'yes'; expected 0, 1"),
    ],
)
def test_refusals(torch_cuda: str | None, environ: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        toolkit.make_plan(torch_cuda, environ)


def test_another_major_version_of_cuda(cuda_home: Path) -> None:
    with pytest.raises(SystemExit, match=r"nvcc is of CUDA 13\.0 and torch of CUDA 12\.8"):
        toolkit.make_plan("12.8", {"CUDA_HOME": str(cuda_home)})


def test_target_torch_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also from within a build isolation, which points PYTHONPATH elsewhere; and then no torch is asked for."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = backend.target_torch()
    assert found is not None
    version, paths = found
    assert version == importlib.metadata.version("torch")
    assert (Path(paths[0]) / "torch").is_dir()
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []


def test_torch_is_asked_for_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "target_torch", lambda: None)
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]
    assert backend.get_requires_for_build_sdist() == []


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "target_torch", lambda: ("2.9.1+cu128", []))
    with pytest.raises(SystemExit, match=r"has torch 2\.9\.1\+cu128; expected 2\.11 or later"):
        backend.get_requires_for_build_wheel()


@pytest.mark.parametrize(
    ("version", "requirement"),
    [("2.13.0+cpu", "torch==2.13.0"), ("2.16.0.dev20261001+cu132", "torch==2.16.0.dev20261001"), (None, "torch>=2.11")],
)
def test_requirement_pins_the_torch_built_against(
    monkeypatch: pytest.MonkeyPatch, version: str | None, requirement: str
) -> None:
    monkeypatch.setattr(build, "torch_version", lambda: version)
    assert build.torch_requirement() == requirement


def test_sources_are_the_folders() -> None:
    cpu, cuda = set(build.sources(cuda=False)), set(build.sources(cuda=True))
    assert "csrc/library.cpp" in cpu
    assert not any(path.startswith("csrc/cuda/") for path in cpu)
    assert cpu < cuda
    assert {path.rpartition(".")[2] for path in cuda - cpu} == {"cpp", "cu"}
    assert all(path.startswith("csrc/cuda/") for path in cuda - cpu)


def test_cmake_globs_the_same_folders() -> None:
    """Both builds take every source of a folder; here are the two rules, side by side."""
    cmake = (BACKEND.parent / "CMakeLists.txt").read_text()
    rules = dict(re.findall(r"^file\(GLOB_RECURSE (\w+) CONFIGURE_DEPENDS (.*)\)$", cmake, re.M))
    found = {name: {str(p) for rule in rules[name].split() for p in expand(rule)} for name in rules}
    assert found["sources"] - found["cuda_sources"] == set(build.sources(cuda=False))
    assert found["sources"] | found["cuda_sources"] == set(build.sources(cuda=True))


def expand(rule: str) -> list[Path]:
    """The files of a CMake GLOB_RECURSE expression, relative to the checkout."""
    folder, _, pattern = rule.rpartition("/")
    return [path.relative_to(BACKEND.parent) for path in (BACKEND.parent / folder).rglob(pattern)]
