"""Runs some of the tests in a process of their own, with other settings, libraries or kernels than this process has."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CONFIGURATION = TESTS.parent / "pyproject.toml"


def run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Outside the checkout, and with nothing that pytest or pytest-xdist left in the environment for its children."""
    clean = {name: value for name, value in {**os.environ, **environment}.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, env=clean, capture_output=True, text=True, cwd=os.sep)


def run_tests(
    names: tuple[str, ...], *options: str, full: bool, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """The tests of the files ``test_NAME.py``; ``full`` as in ``--full``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(CONFIGURATION.parent), "-c", str(CONFIGURATION), *options, *(["--full"] * full)]
    return run([*command, *(str(TESTS / f"test_{name}.py") for name in names)], environment)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
