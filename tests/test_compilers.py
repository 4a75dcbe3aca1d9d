"""The library built with the oldest compilers that are supported, and the operator tests with its kernels.

The kernels are compiled as in a release, and the other sources, which mostly call torch, with less optimisation.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

import mobilemamba

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

import mobilemamba_build as native  # noqa: E402

COMPILERS = ("g++-11", "clang++-14")  # the oldest of each family
FOLDER = ROOT / native.build_base() / "compilers"
TESTS = ("test_operators.py", "test_packed_conv.py", "test_ffn.py", "test_mrffi.py")
VALUES = "in_float64 or in_lower_precision or random_shapes"
KERNELS = sorted(
    set((ROOT / "csrc" / "cpu").glob("isa_*.cpp")) - {ROOT / "csrc" / "cpu" / "isa_dotprod.cpp"}
)  # aarch64's

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64: elsewhere there is one instruction set"),
]


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def build(compiler: str, folder: Path) -> Path:
    """The library built by ``compiler``; what is up to date in ``folder`` is not built again."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*native.CXX_FLAGS, f"-DMOBILEMAMBA_VERSION={mobilemamba.__version__}", "-fPIC", f"-I{ROOT / 'csrc'}"]
    flags += [flag for path in include_paths("cpu") for flag in ("-isystem", path)]
    sources = [ROOT / source for source in native.units(native.sources(cuda=False), folder / "units")]
    objects = {source: f"{source.stem}.o" for source in sources}
    link = ["-shared", "-fopenmp", *(f"-L{path}" for path in library_paths("cpu")), "-ltorch", "-ltorch_cpu", "-lc10"]
    compile = f"command = {compiler} {' '.join(flags)} -MMD -MF $out.d $options -c $in -o $out"
    rules = [
        f"rule compile\n {compile}\n depfile = $out.d\n deps = gcc",
        f"rule link\n command = {compiler} $in {' '.join(link)} -o $out",
        *(
            f"build {object}: compile {source}" + "\n options = -O1" * (source not in KERNELS)
            for source, object in objects.items()
        ),
        f"build _C.so: link {' '.join(objects.values())}",
    ]
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    output = run(["ninja"], cwd=folder, env={**os.environ, "PATH": path})
    assert "warning:" not in output, output
    return folder / "_C.so"


def package(library: Path, folder: Path) -> None:
    """Puts a copy of the installed package with ``library`` as its _C into ``folder``."""
    installed = Path(mobilemamba.__file__).parent
    copy = folder / "mobilemamba"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(installed, copy, ignore=shutil.ignore_patterns(library.name, "__pycache__"))
    shutil.copy(library, copy)
    record = copy / "_C.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "cuda": None}))


def check_symbols(object: Path, isa: str) -> None:
    """Every symbol belongs to the namespace of its instruction set, so that the linker cannot confuse two of them."""
    symbols = run(["nm", "--defined-only", "--extern-only", "--format=just-symbols", str(object)]).split()
    own = f"11mobilemamba3cpu{len(isa)}{isa}"
    assert any(own in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if own not in symbol and not symbol.startswith("DW.ref.")] == []


@pytest.mark.parametrize("compiler", COMPILERS)
def test_operators_built_with(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    folder = FOLDER / compiler
    package(build(compiler, folder), folder)
    for source in KERNELS:
        check_symbols(folder / f"{source.stem}.o", source.stem.removeprefix("isa_"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    command += ["-c", str(ROOT / "pyproject.toml"), "-k", VALUES, *(str(ROOT / "tests" / name) for name in TESTS)]
    facts = "import torch, mobilemamba as m; print(m.__file__, torch.ops.mobilemamba.build_facts()['compiler'])"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    where, found = run([sys.executable, "-c", facts], env=environment, cwd=os.sep).split(maxsplit=1)
    assert Path(where).is_relative_to(folder)
    assert ("Clang 14." if "clang" in compiler else "GCC 11.") in found  # Debian says "Debian Clang 14.0.6"
    for capability in ("avx2", "default"):  # of these kernels the machine's best, and those for any machine
        run(command, env={**environment, "ATEN_CPU_CAPABILITY": capability}, cwd=os.sep)


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_the_linker_sees_no_function_of_two_instruction_sets(source, tmp_path):
    """Without optimisation, too, which inlines only what must be inlined."""
    run(["c++", "-std=c++20", "-O0", "-fPIC", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", "kernels.o"], cwd=tmp_path)
    check_symbols(tmp_path / "kernels.o", source.stem.removeprefix("isa_"))
