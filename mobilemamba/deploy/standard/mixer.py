"""MRFFI in standard operators."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.global_part import WaveletMixer
from ...models.mrffi import FoldedMRFFI, FoldedParts
from .layers import convolution, dense, unpacked
from .scan import recurrence

__all__ = ["PortableMRFFI", "SelectiveScan"]


class PortableMRFFI(nn.Module):
    """A folded :class:`MRFFI`. ``(B, C, H, W) -> (B, C, H, W)``; adds ``residual`` where given.

    Args:
        layer: where the values are from.
        basic: write softplus and LayerNorm as arithmetic.
    """

    def __init__(self, layer: FoldedMRFFI | FoldedParts, basic: bool) -> None:
        super().__init__()
        values: Any = _values(layer) if isinstance(layer, FoldedParts) else layer
        global_dim, local_dim, dim = values.out_bias.numel(), values.local_bias.numel(), values.proj_bias.numel()
        self.widths = (global_dim, local_dim, dim - global_dim - local_dim)
        if global_dim:
            self.selective = SelectiveScan(values, basic)
            # a model without a wavelet part is folded to one of zeros
            self.wavelet = HaarConvolution(values.wavelet_weight) if values.wavelet_weight.any() else None
        if local_dim:
            self.local = convolution(values.local_weight, values.local_bias, groups=local_dim)
            scale = values.local_scale[:, None, None, None]
            self.local_affine = convolution(scale, values.local_shift, groups=local_dim)
        proj: Tensor = values.proj_weight
        self.proj = convolution(unpacked(proj, dim, dim) if values.packed else proj, values.proj_bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        width, local, rest = self.widths
        parts: list[Tensor] = []
        if width:
            x_global = x[:, :width] if local or rest else x
            scanned = self.selective(x_global)
            parts.append(scanned if self.wavelet is None else scanned + self.wavelet(x_global))
        if local:
            x_local = x[:, width : width + local] if width or rest else x
            parts.append(self.local_affine(F.relu(self.local(x_local))))
        if rest:
            parts.append(x[:, width + local :] if width or local else x)
        y = self.proj(F.relu(torch.cat(parts, 1) if len(parts) > 1 else parts[0]))
        return y if residual is None else y + residual


def _values(layer: FoldedParts) -> SimpleNamespace:
    """The values of the parts by the names of :class:`FoldedMRFFI`, not packed."""
    parts: Any = layer
    if isinstance(parts.global_part, WaveletMixer):
        raise ValueError(f"mixer: a {type(parts.global_part.mixer).__name__} has no form in standard operators")
    proj: Any = dense(parts.proj, sum(parts.split))
    local = parts.local_part.folded(proj.weight)
    values = dict(zip(("local_weight", "local_bias", "local_scale", "local_shift"), local, strict=True))
    values |= {"proj_weight": proj.weight.flatten(1), "proj_bias": proj.bias}
    return SimpleNamespace(**values, out_bias=proj.bias[:0], packed=False)


class SelectiveScan(nn.Module):
    """SS2D: the scan in both directions with its projections and gate. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, layer: FoldedMRFFI, basic: bool) -> None:
        super().__init__()
        dim, inner = layer.out_bias.numel(), layer.conv_bias.numel()
        self.rank, self.d_state, self.basic, self.eps = layer.dt_weight.size(2), layer.A_log.size(2), basic, layer.eps
        in_weight: Tensor = layer.in_weight
        x_weight: Tensor = layer.x_weight
        out_weight: Tensor = layer.out_weight
        if layer.packed:
            in_weight, out_weight = unpacked(in_weight, 2 * inner, dim), unpacked(out_weight, dim, inner)
            x_weight = unpacked(x_weight, 2 * (self.rank + 2 * self.d_state), inner)
        self.inner = inner
        self.in_proj = convolution(in_weight, layer.in_bias)
        self.conv = convolution(layer.conv_weight, layer.conv_bias, groups=inner)
        self.x_proj = nn.Linear(inner, x_weight.size(0), bias=False)
        self.x_proj.weight = nn.Parameter(x_weight.detach().clone())
        self.dt_proj = nn.ModuleList(nn.Linear(self.rank, inner) for _ in range(2))
        for direction, linear in enumerate(self.dt_proj):
            linear.weight = nn.Parameter(layer.dt_weight[direction].contiguous())
            linear.bias = nn.Parameter(layer.dt_bias[direction].clone())
        rates = -torch.exp(layer.A_log.detach())  # (2, inner, N)
        for direction, n in product(range(2), range(self.d_state)):
            self.register_buffer(f"rate_{direction}_{n}", rates[direction, :, n].clone())
        self.register_buffer("skip", layer.D.detach().sum(0))
        self.norm = nn.LayerNorm(inner, layer.eps)
        self.norm.weight, self.norm.bias = (
            nn.Parameter(layer.norm_weight.clone()),
            nn.Parameter(layer.norm_bias.clone()),
        )
        self.register_buffer("mean", torch.full((1, inner), 1 / inner))
        self.out_proj = convolution(out_weight, layer.out_bias)

    skip: Tensor
    mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        projected = self.in_proj(x)
        u = F.silu(self.conv(projected[:, : self.inner])).permute(0, 2, 3, 1)  # (B, H, W, inner) until the norm
        gate = F.silu(projected[:, self.inner :])
        facts = self.x_proj(u)
        y = self.skip * u
        step = self.rank + 2 * self.d_state
        for direction, dt_proj in enumerate(self.dt_proj):
            first = direction * step
            delta = self._softplus(dt_proj(facts[..., first : first + self.rank]))
            weighted = delta * u
            for n in range(self.d_state):
                at = first + self.rank + n
                b, c = facts[..., at : at + 1], facts[..., at + self.d_state : at + self.d_state + 1]
                h = recurrence(torch.exp(delta * getattr(self, f"rate_{direction}_{n}")), weighted * b, direction == 1)
                y = y + h * c
        return self.out_proj(self._norm(y).permute(0, 3, 1, 2) * gate)

    def _softplus(self, x: Tensor) -> Tensor:
        if not self.basic:
            return F.softplus(x)
        return F.relu(x) + torch.log(torch.exp(-x.abs()) + 1.0)

    def _norm(self, y: Tensor) -> Tensor:
        if not self.basic:
            return self.norm(y)
        # XNNPACK has means over rows and columns only: a product with 1 / inner is the mean over the channels
        centred = y - F.linear(y, self.mean)
        scale = torch.rsqrt(F.linear(centred * centred, self.mean) + self.eps)
        return centred * scale * self.norm.weight + self.norm.bias


class HaarConvolution(nn.Module):
    """The depthwise convolution of the Haar sub-bands. ``(B, C, H, W) -> (B, C, H, W)``.

    The transform is sums and differences of neighbours; its factors of 1/2 are in the kernel.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        order = (0, 2, 1, 3)  # LL, HL, LH, HH: first the bands of the rows' sums
        bands = weight.detach()[:, order].transpose(0, 1).flatten(0, 1)[:, None] / 4
        self.conv = convolution(bands, groups=bands.size(0))

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        x = F.pad(x, (0, width % 2, 0, height % 2)) if width % 2 or height % 2 else x
        h, w = (height + 1) // 2, (width + 1) // 2
        pairs = x.reshape(-1, channels, 2 * h * w, 2)
        left, right = pairs[..., :1], pairs[..., 1:]
        rows = torch.cat([left + right, left - right], 1).reshape(-1, 2 * channels, h, 2 * w)
        top, bottom = rows[..., :w], rows[..., w:]
        bands = self.conv(torch.cat([top + bottom, top - bottom], 1))
        top, bottom = bands[:, : 2 * channels], bands[:, 2 * channels :]
        rows = torch.cat([top + bottom, top - bottom], 3).reshape(-1, 2 * channels, 2 * h * w, 1)
        left, right = rows[:, :channels], rows[:, channels:]
        image = torch.cat([left + right, left - right], 3).reshape(-1, channels, 2 * h, 2 * w)
        return image[:, :, :height, :width] if width % 2 or height % 2 else image
