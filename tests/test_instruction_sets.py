"""The operator tests once more, with the CPU kernels of every instruction set that this machine has."""

import platform
import sys
from functools import cache

import processes
import pytest
import torch

import mobilemamba  # noqa: F401  (registers the operators)

FILES = ("operators", "packed_conv", "conv_norm", "ffn", "ffn_norm", "mrffi")
CAPABILITIES = {"default": "generic", "avx2": "avx2"}  # value of ATEN_CPU_CAPABILITY: the kernels that it chooses

pytestmark = pytest.mark.full


@cache
def kernels(capability: str) -> str:
    program = "import torch, mobilemamba; print(torch.ops.mobilemamba.cpu_kernels())"
    done = processes.run([sys.executable, "-c", program], {"ATEN_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operators_with_the_kernels_for(capability, file):
    if kernels(capability) != CAPABILITIES[capability]:
        assert platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
        pytest.skip(f"this machine has no {capability}")
    if CAPABILITIES[capability] == torch.ops.mobilemamba.cpu_kernels():
        pytest.skip("all other tests run on these kernels")
    processes.check(processes.run_tests((file,), full=True, environment={"ATEN_CPU_CAPABILITY": capability}))
