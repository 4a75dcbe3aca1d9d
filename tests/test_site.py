"""The documents as a site: its pictures are the ones that the command draws, and Sphinx builds it without a warning."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_pictures_are_drawn_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_network.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "tools/draw_network.py"), run_name="__main__")
    for name in ("network.svg", "mrffi.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()


def test_every_page_is_in_the_site() -> None:
    start = (ROOT / "docs/reference/index.md").read_text()
    for page in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/reference").glob("*.md"), *ROOT.glob("*.md")):
        name = os.path.relpath(page.with_suffix(""), ROOT / "docs/reference")
        assert name == "index" or re.search(rf"^(README <)?{re.escape(name)}>?$", start, re.M), name


@pytest.mark.full
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("the extra docs is not installed")
    program = Path(sys.executable).with_name("sphinx-build")  # unlike `python -m sphinx` it imports what is installed
    command = [str(program), "-W", "-q", "-d", str(tmp_path / "trees"), "-c", "docs", ".", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "docs/reference/index.html" in (tmp_path / "site/index.html").read_text()
    pages = tmp_path / "site/docs"
    assert 'src="../_images/network.svg"' in (pages / "how-it-works.html").read_text()
    operators = (pages / "reference/operators.html").read_text()
    assert 'id="mobilemamba.ops.bidirectional_scan"' in operators
    assert 'class="reference internal" href="#mobilemamba.ops.pack_conv2d_weight"' in operators  # from a role
    weights = (pages / "reference/weights.html").read_text()
    assert 'href="models.html#mobilemamba.MobileMamba"' in weights  # from a role of another room
    for page in (pages / "reference").glob("*.html"):
        assert not re.search(r":(class|data|func|meth|attr|mod):", page.read_text()), page
