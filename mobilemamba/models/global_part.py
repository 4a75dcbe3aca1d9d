"""The global part of MRFFI: the selective scan over the pixels, or another mixer, and the Haar convolution."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bidirectional_scan, depthwise_conv2d, haar_conv2d
from . import checks
from .folded import are_plain
from .layers import ConvNorm

__all__ = ["SS2D", "HaarConv2d", "WaveletMamba", "WaveletMixer"]


class SS2D(nn.Module):
    """Two-direction selective scan over the row-major pixel sequence, with its projections and gate.

    ``(B, C, H, W) -> (B, C, H, W)``. The inner width is ``ssm_ratio * dim``, the rank of the step size
    ``ceil(dim / 16)``, the state size ``d_state``. With ``directions=1`` it scans from the first pixel to the last one
    only: the operator has two directions, and the second one gets parameters of zero, so its part of the sum is zero.
    """

    def __init__(self, dim: int, ssm_ratio: float = 2.0, d_state: int = 1, directions: int = 2) -> None:
        super().__init__()
        self.inner = int(checks.real("ssm_ratio", ssm_ratio) * dim)
        if self.inner < 1:
            raise ValueError(f"ssm_ratio: expected at least one inner channel of {dim} channels, got {ssm_ratio}")
        d_state = checks.integer("d_state", d_state)
        if directions not in (1, 2):
            raise ValueError(f"directions: expected 1 or 2, got {directions!r:.100}")
        self.rank, self.d_state, self.directions = math.ceil(dim / 16), d_state, int(directions)
        self.in_proj = ConvNorm(dim, 2 * self.inner)
        self.conv = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.x_proj = nn.Parameter(torch.empty(directions, self.rank + 2 * d_state, self.inner))
        self.dt_weight = nn.Parameter(0.1 * torch.rand(directions, self.inner, self.rank))
        self.dt_bias = nn.Parameter(0.1 * torch.rand(directions, self.inner))
        self.A_log = nn.Parameter(torch.zeros(directions, self.inner, d_state))
        self.D = nn.Parameter(torch.ones(directions, self.inner))
        self.norm = nn.LayerNorm(self.inner)
        self.out_proj = ConvNorm(self.inner, dim)
        nn.init.uniform_(self.x_proj, -(self.inner**-0.5), self.inner**-0.5)  # nn.Linear's default

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self._gated(x))

    def _gated(self, x: Tensor) -> Tensor:
        """All but the last projection: ``(B, C, H, W) -> (B, inner, H, W)``."""
        batch, _, height, width = x.shape
        u, z = self.in_proj(x).split(self.inner, dim=1)
        u = self._convolved(u)
        projected = F.linear(u.permute(0, 2, 3, 1), self.x_proj.flatten(0, 1))
        rows = self.rank + 2 * self.d_state
        projected = projected.reshape(batch, height * width, self.directions, rows).permute(0, 2, 3, 1)
        A_log: Tensor = self.A_log
        D: Tensor = self.D
        dt_weight: Tensor = self.dt_weight
        dt_bias: Tensor = self.dt_bias
        if self.directions == 1:
            A_log, D, dt_weight, dt_bias = _with_idle(A_log), _with_idle(D), _with_idle(dt_weight), _with_idle(dt_bias)
            projected = torch.cat([projected, torch.zeros_like(projected)], 1)
        delta, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=2)
        y = bidirectional_scan(u.flatten(2), delta, A_log, B, C, D, dt_weight, dt_bias)
        y = self.norm(y.transpose(1, 2)) * F.silu(z.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).view(batch, self.inner, height, width)

    def _convolved(self, u: Tensor) -> Tensor:
        conv = self.conv
        if not torch.jit.is_scripting():
            if not are_plain(nn.Conv2d, conv):
                return F.silu(conv(u))
        return depthwise_conv2d(u, conv.weight, conv.bias, activation="silu")

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The same function with two directions, as the operator of all parts has them."""
        if self.directions == 1:
            for name in ("x_proj", "dt_weight", "dt_bias", "A_log", "D"):
                setattr(self, name, nn.Parameter(_with_idle(getattr(self, name))))
            self.directions = 2
        return self


def _with_idle(parameter: Tensor) -> Tensor:
    """The parameter of one direction, and zeros for the other one."""
    return torch.cat([parameter, torch.zeros_like(parameter)])


class HaarConv2d(nn.Module):
    """Depthwise convolution of the Haar sub-bands with a learned scale. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        kernel = checks.odd("wavelet_kernel", kernel)
        self.weight = nn.Parameter(torch.empty(4 * dim, 1, kernel, kernel))
        self.scale: nn.Parameter | None = nn.Parameter(torch.full((4 * dim,), 0.1))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # nn.Conv2d's default

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.scale is not None:
            weight = weight * self.scale[:, None, None, None]
        return haar_conv2d(x, weight)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        if self.scale is None:
            return self
        self.weight = nn.Parameter(self.weight * self.scale[:, None, None, None])
        self.scale = None
        return self


class WaveletMamba(nn.Module):
    """The global part (WTE-Mamba): scaled SS2D plus the Haar convolution. ``(B, C, H, W) -> (B, C, H, W)``.

    With ``kernel=0`` there is no Haar convolution. Folding then makes one of size 1 with weights of zero, because the
    operator of all parts has one: it is faster so than layer by layer.
    """

    def __init__(self, dim: int, kernel: int, ssm_ratio: float = 2.0, d_state: int = 1, directions: int = 2) -> None:
        super().__init__()
        self.ss2d = SS2D(dim, ssm_ratio, d_state, directions)
        self.base_scale: nn.Parameter | None = nn.Parameter(torch.ones(dim))
        wavelet = HaarConv2d(dim, kernel) if kernel else None
        self.wavelet = wavelet  # in two steps: torch.jit.script takes the type of the value

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._trains_as_one(x):
                gated, wavelet = self.ss2d._gated(x), None if self.wavelet is None else self.wavelet(x)
                return self.ss2d.out_proj._train_as_one(gated, wavelet, "none", self.base_scale)
        y = self.ss2d(x)
        if self.base_scale is not None:
            y = y * self.base_scale[:, None, None]
        if self.wavelet is not None:
            y = y + self.wavelet(x)
        return y

    @torch.jit.unused
    def _trains_as_one(self, x: Tensor) -> bool:
        """Whether the operator of the last projection may apply the scale and add the wavelet part."""
        ss2d = self.ss2d
        return are_plain(SS2D, ss2d) and are_plain(ConvNorm, ss2d.out_proj) and ss2d.out_proj._trains_as_one(x)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        if self.base_scale is None:
            return self
        out_proj: Any = self.ss2d.out_proj  # folded already: a matrix product with bias
        out_proj.weight *= self.base_scale[:, None, None, None]
        out_proj.bias *= self.base_scale
        if self.wavelet is None:
            wavelet = HaarConv2d(self.base_scale.numel(), 1).to(self.base_scale)
            nn.init.zeros_(wavelet.weight)
            wavelet.fold()
            self.wavelet = wavelet
        self.base_scale = None
        return self


class WaveletMixer(nn.Module):
    """The global part with another mixer than SS2D. ``(B, C, H, W) -> (B, C, H, W)``.

    Args:
        mixer: ``(B, C, H, W) -> (B, C, H, W)``.
        dim, kernel: as for :class:`WaveletMamba`.
    """

    unfolded = ("mixer",)  #: ``fuse()`` calls it as it is; layers of this package in it are folded

    def __init__(self, mixer: nn.Module, dim: int, kernel: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.base_scale = nn.Parameter(torch.ones(dim))
        wavelet = HaarConv2d(dim, kernel) if kernel else None
        self.wavelet = wavelet  # in two steps: torch.jit.script takes the type of the value

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x) * self.base_scale[:, None, None]
        if self.wavelet is not None:
            y = y + self.wavelet(x)
        return y
