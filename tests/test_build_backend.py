"""The decisions of the build: torch of the target environment, CUDA or not, archs, errors. Nothing is compiled here."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def write_compiler(folder: Path, macros: str, refused_option: str = "none") -> Path:
    """A program that preprocesses like a compiler with these macros, and compiles nothing."""
    compiler = folder / "some-compiler"
    refusal = f'*" {refused_option} "*) exit 1 ;;\n'
    compiler.write_text(f'#!/bin/sh\ncase " $* " in\n{refusal}*" -dM "*) printf \'{macros}\' ;;\nesac\n')
    compiler.chmod(0o755)
    return compiler


def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler 'no-such-c\\+\\+'; install one"):
        build.check_compiler("no-such-c++ -pipe")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler ''"):
        build.check_compiler(" ")
    with pytest.raises(
        SystemExit, match="is not a C\\+\\+ compiler that is known here; expected GCC 11 or clang 14 or later"
    ):
        build.check_compiler(f"'{sys.executable}' -O2")


@pytest.mark.parametrize(
    ("macros", "found"),
    [
        (r"#define __GNUC__ 10\n", "GCC 10"),
        (r"#define __GNUC__ 4\n#define __clang__ 1\n#define __clang_major__ 13\n", "clang 13"),
    ],
)
def test_an_old_compiler_is_refused(tmp_path: Path, macros: str, found: str) -> None:
    compiler = write_compiler(tmp_path, macros)
    with pytest.raises(
        SystemExit, match=f"{compiler.name}' is {found}; expected GCC 11 or clang 14 or later"
    ) as caught:
        build.check_compiler(str(compiler))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [("-std=c++20", r"does not accept -std=c\+\+20; set CXX to one"), ("-fopenmp", "has no OpenMP; install it")],
)
def test_a_compiler_without_an_option_is_refused(tmp_path: Path, option: str, message: str) -> None:
    compiler = write_compiler(tmp_path, r"#define __GNUC__ 11\n", option)
    with pytest.raises(SystemExit, match=message):
        build.check_compiler(str(compiler))


@pytest.mark.parametrize(
    "macros", [r"#define __GNUC__ 11\n", r"#define __GNUC__ 4\n#define __clang__ 1\n#define __clang_major__ 14\n"]
)
def test_the_oldest_compilers_are_accepted(tmp_path: Path, macros: str) -> None:
    build.check_compiler(f"{write_compiler(tmp_path, macros)} -pipe")


@pytest.mark.parametrize(
    ("command", "expected"), [("ccache g++", "g++"), ("sccache clang++-14", "clang++-14"), ("g++ -m64", "g++ -m64")]
)
def test_compiler_without_wrapper(command: str, expected: str) -> None:
    assert build.without_wrapper(command) == expected


def cmake_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Runs CMake commands on the functions that CMakeLists.txt shares with pip's build."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    path = folder / "script.cmake"
    path.write_text(f"cmake_policy(VERSION 3.23)\ninclude({BACKEND.parent}/cmake/MobileMambaBuild.cmake)\n{script}\n")
    return subprocess.run([cmake, "-P", str(path)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("compiler", "version", "accepted"),
    [("GNU", "10.9", False), ("GNU", "11.1", True), ("Clang", "13.0.1", False), ("Clang", "14.0.0", True)],
)
def test_cmake_refuses_the_same_compilers(tmp_path: Path, compiler: str, version: str, accepted: bool) -> None:
    settings = f"set(CMAKE_CXX_COMPILER_ID {compiler})\nset(CMAKE_CXX_COMPILER_VERSION {version})\n"
    done = cmake_script(tmp_path, f"{settings}mobilemamba_check_compiler()")
    assert (done.returncode == 0) == accepted, done.stderr
    if not accepted:
        assert f"is {compiler} {version}; expected GCC 11 or clang 14 or later" in " ".join(done.stderr.split())


@pytest.mark.parametrize("known", [CUDA_13.archs, ("5.0", "5.2", "7.0", "7.5", "8.0", "9.0")])
def test_cmake_has_the_same_default_archs(tmp_path: Path, known: tuple[str, ...]) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch.replace('.', '')}\n" for arch in known))
    nvcc.chmod(0o755)
    script = f'mobilemamba_default_archs({nvcc} archs)\nmobilemamba_arch_names("${{archs}}" names)\n'
    done = cmake_script(tmp_path, script + 'message(STATUS "${archs} ${names}")')
    archs = toolkit.choose_archs("", toolkit.Toolkit(Path("/cuda"), "13.0", known, (), ()))
    numbers = [arch.removesuffix("+PTX").replace(".", "") for arch in archs]
    expected = ";".join([*(f"{number}-real" for number in numbers[:-1]), numbers[-1]])
    assert done.stdout == f"-- {expected} {','.join(map(toolkit.arch_name, archs))}\n", done.stderr


def test_cmake_without_a_default_arch(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_50\n")
    nvcc.chmod(0o755)
    done = cmake_script(tmp_path, f"mobilemamba_default_archs({nvcc} archs)")
    assert done.returncode != 0
    assert "set CMAKE_CUDA_ARCHITECTURES" in " ".join(done.stderr.split())


def test_default_archs_end_with_ptx() -> None:
    archs = toolkit.choose_archs("", CUDA_13)
    assert archs == ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")


def test_default_archs_of_an_older_toolkit() -> None:
    """CUDA 12 knows archs that are too old for the kernels."""
    older = toolkit.Toolkit(Path("/cuda"), "12.0", ("5.0", "7.0", "7.5", "8.0", "9.0"), (), ())
    assert toolkit.choose_archs("", older) == ("7.5", "8.0", "9.0+PTX")


def test_no_default_arch() -> None:
    with pytest.raises(SystemExit, match=r"nvcc 9\.0 compiles for none of 7\.5 .*; set TORCH_CUDA_ARCH_LIST"):
        toolkit.choose_archs("", toolkit.Toolkit(Path("/cuda"), "9.0", ("5.0", "6.0"), (), ()))


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


def test_pip_is_asked_for_a_torch_if_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "target_torch", lambda: None)
    monkeypatch.setenv("PIP_BUILD_TRACKER", "/tmp/tracker")
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]
    assert backend.get_requires_for_build_editable() == ["torch>=2.11"]
    assert backend.get_requires_for_build_sdist() == []


def test_other_front_ends_must_not_isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their build environment is not the target's, whose torch the library must be built against."""
    monkeypatch.setattr(backend, "target_torch", lambda: None)
    monkeypatch.delenv("PIP_BUILD_TRACKER", raising=False)
    with pytest.raises(
        SystemExit, match=r"--no-build-isolation \(uv\) or --no-isolation \(python -m build\)"
    ) as caught:
        backend.get_requires_for_build_wheel()
    assert "\n" not in str(caught.value)
    assert backend.get_requires_for_build_sdist() == []


def test_metadata_without_torch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would require any torch, which front ends download before they build."""
    monkeypatch.setattr(backend, "target_torch", lambda: None)
    monkeypatch.setattr(backend, "torch_version", lambda: None)
    for hook in (backend.prepare_metadata_for_build_wheel, backend.prepare_metadata_for_build_editable):
        with pytest.raises(
            SystemExit, match=r"no torch to build against in .*: install torch, setuptools>=77 and ninja"
        ):
            hook(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_setuptools_is_missing() -> None:
    """A build without isolation, in an environment that has never built anything."""
    code = f"import sys; sys.path.insert(0, {str(BACKEND)!r}); import mobilemamba_backend"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"mobilemamba: no setuptools to build with in .*: install torch, setuptools>=77 and ninja there\n", done.stderr
    )


def test_pip_says_that_it_builds(tmp_path: Path) -> None:
    """The rule above stands on this: pip sets the variable while a backend runs."""
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tmp_path / "backend.py").write_text(
        "import os\nopen('variables', 'w').write(' '.join(os.environ))\nraise SystemExit('seen')\n"
    )
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--disable-pip-version-check", "."]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert set((tmp_path / "variables").read_text().split()) & set(backend._PIP_VARIABLES)


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


def test_the_library_gets_no_search_path_from_python() -> None:
    command = ["g++", "-shared", "-L/opt/python/lib", "-Wl,-rpath,/opt/python/lib", "-Wl,-rpath,/opt/mine"]
    assert build.without_search_path(command) == command[:3]
    assert build.without_search_path(command, "-O1 -Wl,-rpath,/opt/mine") == [*command[:3], command[4]]


def test_sources_are_the_folders() -> None:
    cpu, cuda = set(build.sources(cuda=False)), set(build.sources(cuda=True))
    assert {"csrc/library.cpp", "csrc/facts.cpp"} < cpu
    assert not any(path.startswith("csrc/cuda/") for path in cpu)
    assert cpu < cuda
    assert {path.rpartition(".")[2] for path in cuda - cpu} == {"cpp", "cu"}
    assert all(path.startswith("csrc/cuda/") for path in cuda - cpu)


def test_a_unit_for_each_folder(tmp_path: Path) -> None:
    sources = ["csrc/cpu/ffn.cpp", "csrc/cpu/isa_avx2.cpp", "csrc/cpu/mrffi.cpp", "csrc/cuda/gate.cu", "csrc/meta.cpp"]
    cpu, top = tmp_path / "cpu.cpp", tmp_path / "csrc.cpp"
    assert build.units(sources, tmp_path) == [str(cpu), str(top), "csrc/cpu/isa_avx2.cpp", "csrc/cuda/gate.cu"]
    assert cpu.read_text() == '#include "cpu/ffn.cpp"\n#include "cpu/mrffi.cpp"\n'
    assert top.read_text() == '#include "meta.cpp"\n'


def test_only_a_changed_unit_is_written(tmp_path: Path) -> None:
    build.units(["csrc/cpu/ffn.cpp", "csrc/meta.cpp"], tmp_path)
    for unit in tmp_path.iterdir():
        os.utime(unit, (1, 1))
    build.units(["csrc/cpu/ffn.cpp", "csrc/cpu/mrffi.cpp", "csrc/meta.cpp"], tmp_path)
    assert (tmp_path / "csrc.cpp").stat().st_mtime == 1
    assert (tmp_path / "cpu.cpp").stat().st_mtime > 1


def test_cmake_has_the_same_units(tmp_path: Path) -> None:
    lines = [
        f'mobilemamba_unit({BACKEND.parent}/{source} unit)\nmessage(STATUS "{source} ${{unit}}")'
        for source in build.sources(cuda=True)
    ]
    done = cmake_script(tmp_path, "\n".join(lines))
    alone = build.units(build.sources(cuda=True), tmp_path / "units")
    expected = [
        f"-- {source} {'' if source in alone else Path(source).parent.name}" for source in build.sources(cuda=True)
    ]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_flags_are_for_any_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str) -> None:
    """The sources choose instruction sets themselves; ``pip install .`` needs no flag, whatever the processor."""
    monkeypatch.chdir(tmp_path)  # describe() writes units
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("sysconfig.get_platform", lambda: f"linux-{machine}")
    library = SimpleNamespace()
    build.describe(library, toolkit.make_plan(None, {}), "0.1.0", ["/torch/include"], ["/torch/lib"])
    assert library.extra_compile_args["cxx"] == [
        *build.CXX_FLAGS,
        "-DMOBILEMAMBA_VERSION=0.1.0",
        *("-isystem", "/torch/include"),
    ]
    assert not [flag for flag in build.CXX_FLAGS if flag.startswith("-m")]
    assert {"csrc/cpu/isa_generic.cpp", "csrc/cpu/isa_avx2.cpp"} < set(library.sources)  # on every processor
    for path in ("CMakeLists.txt", "cmake/MobileMambaBuild.cmake"):
        assert not re.search(r"\s-m\w+|CMAKE_SYSTEM_PROCESSOR", (BACKEND.parent / path).read_text())


def test_other_processors_compile_the_generic_kernels_only() -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = BACKEND.parent / "csrc" / "cpu"
    for path in sorted(folder.glob("isa_*.cpp")):
        if path.name != "isa_generic.cpp":
            command = [compiler, "-std=c++20", "-E", "-P", "-U__x86_64__", f"-I{folder.parent}", str(path)]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "", path


def test_cmake_globs_the_same_folders() -> None:
    """Both builds take every source of a folder."""
    cmake = (BACKEND.parent / "CMakeLists.txt").read_text()
    rules = dict(re.findall(r"^file\(GLOB_RECURSE (\w+) CONFIGURE_DEPENDS (.*)\)$", cmake, re.M))
    found = {name: {str(p) for rule in rules[name].split() for p in expand(rule)} for name in rules}
    assert re.findall(r"^list\(REMOVE_ITEM sources (.*)\)$", cmake, re.M) == ["${cuda_sources}"]
    assert found["sources"] - found["cuda_sources"] == set(build.sources(cuda=False))
    assert found["sources"] | found["cuda_sources"] == set(build.sources(cuda=True))


def expand(rule: str) -> list[Path]:
    """The files of a CMake GLOB_RECURSE expression, relative to the checkout."""
    folder, _, pattern = rule.rpartition("/")
    return [path.relative_to(BACKEND.parent) for path in (BACKEND.parent / folder).rglob(pattern)]
