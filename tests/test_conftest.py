"""The suite's own options, in a small checkout: which tests run, in how many processes, on which package."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = """
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

def test_the_installed_package_is_found():
    print("package:", find_spec("mobilemamba").origin)

def test_threads():
    print("threads:", os.environ.get("OMP_NUM_THREADS"))

@pytest.mark.full
def test_long():
    pass
"""
SEVERAL = min(len(os.sched_getaffinity(0)), 8)
needs_processes = pytest.mark.skipif(
    SEVERAL == 1 or find_spec("xdist") is None, reason="needs pytest-xdist and two processors"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With sources that were not built, as after ``git clone``."""
    (tmp_path / "mobilemamba").mkdir()
    (tmp_path / "mobilemamba" / "__init__.py").touch()
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\naddopts = "-rP"\n')
    return tmp_path


def run(checkout: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OMP_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_m_pytest_in_the_checkout_tests_the_installed_package(checkout):
    spec = find_spec("mobilemamba")
    assert spec is not None
    assert f"package: {spec.origin}\n" in run(checkout, "tests/test_it.py")


def test_full(checkout):
    for arguments, last_line in (((), "2 passed, 1 deselected"), (("--full",), "3 passed")):
        assert last_line in run(checkout, *arguments, "tests/test_it.py").splitlines()[-1]


@needs_processes
def test_processes_share_a_run_of_everything(checkout):
    printed = run(checkout)
    assert f"in {SEVERAL} process(es)" in printed
    assert "[gw0]" in printed
    assert "threads: 1\n" in printed
    assert "2 passed, 1 deselected" in printed.splitlines()[-1]  # as in one process


@pytest.mark.parametrize(
    "arguments", [("tests/test_it.py",), ("-k", "threads"), ("-p", "no:xdist"), ("-n0",), ("--pdb",), ("-s",)], ids=str
)
def test_one_process(checkout, arguments):
    if arguments == ("-n0",) and find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    printed = run(checkout, *arguments)
    assert "in 1 process(es)" in printed
    assert "[gw0]" not in printed
    assert "threads: None\n" in printed
