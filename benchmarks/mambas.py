"""What the other Mambas share: selective scans that run one way, on this package's operator, and what they cost.

Each of their sequences is scanned one way, and each has an input of its own. The operator scans one input both ways.
Its other way is idle here: its step size is zero, so it adds zero, but it takes its time. No pairing of their sequences
in one call avoids that. Running from the end is free, though: no sequence is flipped.

Tensors are ``(B, H, W, C)`` or ``(B, L, C)``, the layout that the scan is fast in.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemamba.ops import bidirectional_scan

__all__ = ["MACS", "ChannelGate", "Scans", "parameters"]

STATES = 16
IDLE = -1e4  # a bias whose softplus is exactly zero, in 16 bits too


def scan_flops(u: list[int], delta: list[int], A_log: list[int], *_: Any, out_shape: Any = None) -> int:
    """Of one way: dt from its rows, four products for each state, dt * u and D * u."""
    return 2 * math.prod(u) * (delta[2] + 4 * A_log[2] + 2)


#: For torch's flop counter, as its ``custom_mapping``: the scan without its idle way.
MACS = {torch.ops.mobilemamba.bidirectional_scan: scan_flops}


def parameters(network: nn.Module) -> int:
    """How many it has, without those of idle ways."""
    idle = sum(module.idle for module in network.modules() if isinstance(module, Scans))
    return sum(parameter.numel() for parameter in network.parameters()) - idle


class Scans(nn.Module):
    """Selective scans of several sequences, each one way: ``backward`` says which of them run from their end."""

    def __init__(self, dim: int, rank: int, backward: list[bool]) -> None:
        super().__init__()
        count = len(backward)
        self.splits = [rank, STATES, STATES]
        self.project = nn.Parameter((torch.rand(count, sum(self.splits), dim) * 2 - 1) / dim**0.5)
        # two ways of each sequence; no tensor has four dimensions, which channels-last would permute
        self.A_log = nn.Parameter(torch.zeros(2 * count, dim, STATES))
        self.D = nn.Parameter(torch.zeros(2 * count, dim))
        self.dt_weight = nn.Parameter(torch.zeros(2 * count, dim, rank))
        self.dt_bias = nn.Parameter(torch.full((2 * count, dim), IDLE))
        with torch.no_grad():
            for i in (2 * i + way for i, way in enumerate(backward)):
                self.A_log[i] = torch.arange(1.0, STATES + 1).log()
                self.D[i] = 1
                self.dt_weight[i].uniform_(-(rank**-0.5), rank**-0.5)
                dt = torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                self.dt_bias[i] = dt.expm1().log()  # softplus gives dt back

    @property
    def idle(self) -> int:
        return sum(tensor.numel() for tensor in (self.A_log, self.D, self.dt_weight, self.dt_bias)) // 2

    def forward(self, sequences: list[Tensor]) -> list[Tensor]:
        """Each ``(B, L, C) -> (B, L, C)``."""
        results = []
        for i, u in enumerate(sequences):
            rows = F.linear(u, self.project[i]).transpose(1, 2).unsqueeze(1).expand(-1, 2, -1, -1)
            delta, B, C = rows.split(self.splits, dim=2)
            ways = (tensor[2 * i : 2 * i + 2] for tensor in (self.A_log, self.D, self.dt_weight, self.dt_bias))
            A_log, D, dt_weight, dt_bias = ways
            y = bidirectional_scan(u.transpose(1, 2), delta, A_log, B, C, D, dt_weight, dt_bias)
            results.append(y.transpose(1, 2))
        return results


class ChannelGate(nn.Module):
    """Weights of the channels from the mean of the normalised pixels: ``(B, ..., C) -> (B, ..., C)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.weights = nn.Sequential(nn.Linear(dim, dim // 8), nn.GELU(), nn.Linear(dim // 8, dim), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        between = tuple(range(1, x.dim() - 1))
        return x * self.weights(self.norm(x).mean(between, keepdim=True))
