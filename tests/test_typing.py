"""The types of the public names, as ``mypy --strict`` sees them in the installed package."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mobilemamba

FILES = Path(__file__).with_name("typing")
PACKAGE = Path(mobilemamba.__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy: pip install mypy")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, set[tuple[int, str]]]:
    """What mypy finds in each file: lines and codes of errors."""
    folder = tmp_path_factory.mktemp("typing")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-pretty", "--show-error-codes"]
    command += ["--cache-dir", str(folder / "cache"), "--follow-imports=silent"]
    installed = PACKAGE.parent in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    # mypy does not see an editable installation, whose package is imported through a hook
    environment = {**os.environ, "MYPYPATH": "" if installed else str(PACKAGE.parent)}
    files = [str(FILES / name) for name in ("user.py", "wrong.py")]
    done = subprocess.run([*command, *files], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: dict[str, set[tuple[int, str]]] = {path: set() for path in files}
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r"(.+\.py):(\d+): error: .*  \[([\w-]+)\]", line):
            errors[match[1]].add((int(match[2]), match[3]))
        else:
            assert re.match(r".+\.py:\d+: note: |Found \d+ errors? in |Success: ", line), line
    return {Path(path).name: where for path, where in errors.items()}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_right_calls_have_no_error(found):
    assert found["user.py"] == set()


def test_wrong_calls_have_the_errors_that_they_name(found):
    lines = (FILES / "wrong.py").read_text().splitlines()
    expected = {(number, line.partition("# error: ")[2]) for number, line in enumerate(lines, 1) if "# error: " in line}
    assert len(expected) > 15
    assert found["wrong.py"] == expected
