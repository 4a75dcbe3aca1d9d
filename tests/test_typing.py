"""The types of the public names, as ``mypy --strict`` sees them in the installed package."""

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


def errors_in(folder: Path, *names: str) -> list[set[tuple[int, str]]]:
    """The errors that mypy finds in files of tests/typing: for each file the lines and the codes."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-pretty", "--show-error-codes"]
    command += ["--cache-dir", str(folder / "cache"), "--follow-imports=silent"]
    installed = PACKAGE.parent in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    # mypy does not see an editable installation: it is imported through a hook
    environment = {**os.environ, "MYPYPATH": "" if installed else str(PACKAGE.parent)}
    files = [str(FILES / name) for name in names]
    done = subprocess.run([*command, *files], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: dict[str, set[tuple[int, str]]] = {path: set() for path in files}
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r"(.+\.py):(\d+): error: .*  \[([\w-]+)\]", line):
            errors[match[1]].add((int(match[2]), match[3]))
        else:
            assert re.match(r".+\.py:\d+: note: |Found \d+ errors? in |Success: ", line), line
    return list(errors.values())


def test_calls_of_a_user(tmp_path):
    """Right calls have no error, wrong ones have the errors that their comments name."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install '.[lint]'")
    assert (PACKAGE / "py.typed").is_file()
    lines = (FILES / "wrong.py").read_text().splitlines()
    expected = {(number, line.partition("# error: ")[2]) for number, line in enumerate(lines, 1) if "# error: " in line}
    assert len(expected) > 15
    assert errors_in(tmp_path, "user.py", "wrong.py") == [set(), expected]
