"""Tensors and marks for tests that run on any device; see ``--device`` in conftest.py."""

import pytest
import torch
from torch import Tensor

DEVICE = torch.get_default_device()
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason=f"tests threads and memory on the CPU, not {DEVICE}")


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal elements on the device under test; drawn by the CPU, they are the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())
