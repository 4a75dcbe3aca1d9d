"""PEP 517 backend: setuptools, building against the torch of the environment that the wheel is installed into.

Build isolation hides that torch, and a library that was built against another torch does not load. pip runs the build
with the interpreter of the target environment, so these hooks ask that interpreter for its torch. If there is none,
they ask pip to install one for the build, and the wheel then requires that one.

Other front ends (uv, ``python -m build``) make an environment of their own for the build and tell nothing of the
target. A torch installed there could be another one than the target's, so the build is refused before the download.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

if importlib.util.find_spec("setuptools") is None:  # in a build without isolation
    raise SystemExit(
        f"mobilemamba: no setuptools to build with in {sys.prefix}: install torch, setuptools>=77 and ninja there"
    )

from mobilemamba_build import TORCH_MINIMUM, check_torch_version, missing_torch, torch_version
from setuptools import build_meta

Settings = dict[str, Any] | None

_PIP_VARIABLES = ("PIP_BUILD_TRACKER", "PIP_REQ_TRACKER")  # pip sets one of them during a build; the second before 22.1
_PROBE = """
import importlib.metadata, importlib.util, json, os, sys
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    print(json.dumps(None))
else:
    version = importlib.metadata.version("torch")
    print(json.dumps([version, [os.path.dirname(os.path.dirname(spec.origin)), *sys.path[1:]]]))
"""


def target_torch(python: str = sys.executable) -> tuple[str, list[str]] | None:
    """Version and module search path of the torch that ``python`` sees without build isolation; None without one."""
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"}  # what the front end sets to isolate the build
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    probe = subprocess.run([python, "-c", _PROBE], env=environment, cwd=os.sep, capture_output=True, text=True)
    if probe.returncode != 0:
        raise SystemExit(f"mobilemamba: {python} failed when asked for its torch:\n{probe.stderr.strip()}")
    found = json.loads(probe.stdout)
    return None if found is None else (found[0], found[1])


def _torch_to_ask_for() -> list[str]:
    found = target_torch()
    if found is not None:
        check_torch_version(found[0])
        return []
    if not any(name in os.environ for name in _PIP_VARIABLES):
        raise missing_torch()
    return [f"torch>={TORCH_MINIMUM}"]


def _make_torch_importable() -> None:
    """Without a torch, refuse already when asked for metadata: a front end downloads the requirements next."""
    found = target_torch()
    if found is not None:  # after the build's own packages, which keep their precedence
        sys.path.extend(path for path in found[1] if path and path not in sys.path)
        importlib.invalidate_caches()
    if torch_version() is None:
        raise missing_torch()


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _torch_to_ask_for()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _torch_to_ask_for()


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _make_torch_importable()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _make_torch_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return build_meta.build_sdist(sdist_directory, config_settings)
