"""torch.hub finds the models of hubconf.py, with the library and without it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mobilemamba

ROOT = Path(__file__).resolve().parents[1]
LOAD = "import torch; model = torch.hub.load({!r}, 'nano', source='local', pretrained=True); print(model.__module__)"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as torch.hub downloads it: sources without a library."""
    folder = tmp_path_factory.mktemp("hub") / "owner_mobilemamba_main"
    folder.mkdir()
    shutil.copy(ROOT / "hubconf.py", folder)
    shutil.copytree(ROOT / "mobilemamba", folder / "mobilemamba", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return folder


@torch.no_grad()
def test_models_of_the_installed_package(repository: Path) -> None:
    names = set(runpy.run_path(str(repository / "hubconf.py")))
    assert set(mobilemamba.list_models()) | {"create_model", "feature_extractor"} <= names
    x = torch.randn(1, 1, 28, 28)
    model = torch.hub.load(str(repository), "nano", source="local", pretrained=True).eval()
    assert type(model) is mobilemamba.MobileMamba
    assert torch.equal(model(x), mobilemamba.nano(pretrained=True).eval()(x))
    model = torch.hub.load(str(repository), "s6", source="local", num_classes=5, in_chans=1).eval()
    assert model(x).shape == (1, 5)
    assert str(repository) not in sys.path


def test_in_a_fresh_process_the_installed_package_comes_first(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(str(repository))], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mobilemamba.models.backbone"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The variables of an environment as this one, without mobilemamba: for ``python -S``."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in (Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")):
        for item in folder.iterdir():
            if "mobilemamba" not in item.name and not (site / item.name).exists():
                (site / item.name).symlink_to(item)
    return {**os.environ, "PYTHONPATH": str(site)}


def test_without_a_library_one_line_says_how_to_install_it(
    repository: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-S", "-c", LOAD.format(str(repository))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    *_, last = done.stderr.strip().splitlines()
    message = f"mobilemamba has no compiled library here: run `pip install {repository}` and start Python again"
    assert last == f"ImportError: {message}"
