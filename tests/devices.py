"""What tests need to run on any device; see ``--device`` in conftest.py."""

import pytest
import torch
from torch import Tensor

DEVICE = torch.get_default_device()
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason=f"about the CPU kernels' threads and memory, not {DEVICE}")


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers on the device under test: the same ones on each, since the CPU draws them."""
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())
