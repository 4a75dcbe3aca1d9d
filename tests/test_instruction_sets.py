"""The operator tests again, with the CPU kernels of every instruction set that this machine can run."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = ("test_operators.py", "test_packed_conv.py", "test_ffn.py", "test_mrffi.py")
CAPABILITIES = {"default": "generic", "avx2": "avx2"}  # what ATEN_CPU_CAPABILITY says, and the kernels it should give


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operators_with_the_kernels_for(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    program = "from mobilemamba import _C; print(_C.cpu_kernels())"
    chosen = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=os.sep
    )
    assert chosen.returncode == 0, chosen.stderr
    if chosen.stdout.strip() != CAPABILITIES[capability]:
        assert platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() == "DEFAULT", chosen.stdout
        pytest.skip(f"this machine has no {capability}")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(root)]
    tests = subprocess.run(
        [*command, "-c", str(root / "pyproject.toml"), *(str(Path(__file__).with_name(name)) for name in FILES)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=os.sep,
    )
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-2000:]
