"""MRFFI, the multi-receptive-field feature interaction: global, local and identity parts of the channels."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bidirectional_scan, depthwise_conv2d, haar_conv2d, mrffi
from . import checks
from .layers import ConvNorm, Folded, are_plain, in_order

__all__ = ["MRFFI", "SS2D", "HaarConv2d", "MultiKernelDepthwise", "WaveletMamba", "split_channels"]


def split_channels(dim: int, global_ratio: float, local_ratio: float) -> tuple[int, int, int]:
    """Widths of the (global, local, identity) parts of ``dim`` channels; they sum to ``dim``.

    The global part is ``global_ratio * dim`` to the nearest multiple of 16, a tie going up. The local part is
    ``local_ratio * dim``, or what the global part leaves where that is less; the identity part is the rest.
    """
    dim = checks.integer("dim", dim)
    global_ratio, local_ratio = checks.real("global_ratio", global_ratio), checks.real("local_ratio", local_ratio)
    global_dim = (int(global_ratio * dim) + 8) // 16 * 16
    if not 0 < global_dim <= dim:
        raise ValueError(
            f"global_ratio={global_ratio} of {dim} channels gives a global part of {global_dim} channels; "
            f"expected at least 16 and at most {dim}, in multiples of 16"
        )
    local_dim = min(int(local_ratio * dim), dim - global_dim)
    return global_dim, local_dim, dim - global_dim - local_dim


class SS2D(nn.Module):
    """Two-direction selective scan over the row-major pixel sequence, with its projections and gate.

    ``(B, C, H, W) -> (B, C, H, W)``. The inner width is ``ssm_ratio * dim``, the rank of the step size
    ``ceil(dim / 16)``, the state size ``d_state``.
    """

    def __init__(self, dim: int, ssm_ratio: float = 2.0, d_state: int = 1) -> None:
        super().__init__()
        self.inner = int(checks.real("ssm_ratio", ssm_ratio) * dim)
        if self.inner < 1:
            raise ValueError(f"ssm_ratio: expected at least one inner channel of {dim} channels, got {ssm_ratio}")
        d_state = checks.integer("d_state", d_state)
        self.rank, self.d_state = math.ceil(dim / 16), d_state
        self.in_proj = ConvNorm(dim, 2 * self.inner)
        self.conv = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.x_proj = nn.Parameter(torch.empty(2, self.rank + 2 * d_state, self.inner))
        self.dt_weight = nn.Parameter(0.1 * torch.rand(2, self.inner, self.rank))
        self.dt_bias = nn.Parameter(0.1 * torch.rand(2, self.inner))
        self.A_log = nn.Parameter(torch.zeros(2, self.inner, d_state))
        self.D = nn.Parameter(torch.ones(2, self.inner))
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
        projected = projected.reshape(batch, height * width, 2, self.rank + 2 * self.d_state).permute(0, 2, 3, 1)
        delta, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=2)
        y = bidirectional_scan(u.flatten(2), delta, self.A_log, B, C, self.D, self.dt_weight, self.dt_bias)
        y = self.norm(y.transpose(1, 2)) * F.silu(z.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).view(batch, self.inner, height, width)

    def _convolved(self, u: Tensor) -> Tensor:
        conv = self.conv
        if not torch.jit.is_scripting():
            if not are_plain(nn.Conv2d, conv):
                return F.silu(conv(u))
        return depthwise_conv2d(u, conv.weight, conv.bias, activation="silu")


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
    """The global part (WTE-Mamba): scaled SS2D plus the Haar convolution. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, dim: int, kernel: int, ssm_ratio: float = 2.0, d_state: int = 1) -> None:
        super().__init__()
        self.ss2d = SS2D(dim, ssm_ratio, d_state)
        self.base_scale: nn.Parameter | None = nn.Parameter(torch.ones(dim))
        self.wavelet = HaarConv2d(dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._trains_as_one(x):
                gated = self.ss2d._gated(x)
                return self.ss2d.out_proj._train_as_one(gated, self.wavelet(x), "none", self.base_scale)
        y = self.ss2d(x)
        if self.base_scale is not None:
            y = y * self.base_scale[:, None, None]
        return y + self.wavelet(x)

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
        self.base_scale = None
        return self


# after folding: where in a group bias, scale and shift are
FOLDED_GROUP = ((0, "bias"), (2, "weight"), (2, "bias"))


class MultiKernelDepthwise(nn.Module):
    """The local part (MK-DeConv): channel groups, each with a depthwise kernel of its own size.

    ``(B, C, H, W) -> (B, C, H, W)``. Per group: depthwise k x k, BN, ReLU, one weight per channel, BN. Channels are
    divided as evenly as possible, the first groups taking the remainder.
    """

    widths: list[int]  # torch.jit.script cannot tell the type of an empty list

    def __init__(self, dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        kernels = tuple(checks.odd("local_kernels", kernel) for kernel in checks.sequence("local_kernels", kernels))
        if 0 < dim < len(kernels):
            raise ValueError(f"{len(kernels)} local kernel sizes {kernels} need as many channels, got {dim}")
        groups = range(len(kernels)) if dim else ()
        self.widths = [dim // len(kernels) + (i < dim % len(kernels)) for i in groups]
        self.groups = nn.ModuleList(
            nn.Sequential(ConvNorm(c, c, k, groups=c), nn.ReLU(), ConvNorm(c, c, groups=c))
            for c, k in zip(self.widths, kernels, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        if len(self.groups) == 0:
            return x
        split = x.split(self.widths, dim=1)
        parts: list[Tensor] = []
        for i, group in enumerate(self.groups):
            if not torch.jit.is_scripting():
                if self._trains_as_one(group, split[i]):
                    parts.append(group[2](group[0]._train_as_one(split[i], None, "relu")))  # type: ignore[index]
                    continue
            parts.append(group(split[i]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    @torch.jit.unused
    def _trains_as_one(self, group: Any, x: Tensor) -> bool:
        """Whether the operator of the group's first convolution may apply the ReLU."""
        plain = are_plain(nn.Sequential, group) and are_plain(ConvNorm, group[0]) and are_plain(nn.ReLU, group[1])
        return plain and group[0]._trains_as_one(x)

    def folded(self, like: Tensor) -> list[nn.Parameter]:
        """Of folded groups: kernels, biases, scales and shifts, for all channels together.

        A smaller kernel in the middle of zeros is the same convolution, so all get the size of the largest.
        """
        if len(self.groups) == 0:
            return _parameters(like.new_empty(0, 1, 1, 1), *(like.new_empty(0) for _ in range(3)))
        groups: Any = self.groups
        size = max(group[0].weight.size(3) for group in groups)
        kernels = [F.pad(group[0].weight, [(size - group[0].weight.size(3)) // 2] * 4) for group in groups]
        biases, scales, shifts = ([getattr(group[i], name) for group in groups] for i, name in FOLDED_GROUP)
        return _parameters(torch.cat(kernels), torch.cat(biases), torch.cat(scales), torch.cat(shifts))


class MRFFI(nn.Module):
    """Multi-receptive-field feature interaction. ``(B, C, H, W) -> (B, C, H, W)``; adds ``residual`` where given.

    ``BN(1x1(ReLU(concat(global(x_G), local(x_P), x_I))))`` with the channels divided by :func:`split_channels`.

    Args:
        dim: channels C, at least 16 (the global part is a multiple of 16).
        global_ratio: share of the channels for the wavelet-enhanced scan.
        local_ratio: share of the channels for the depthwise kernels.
        wavelet_kernel: kernel size on the Haar sub-bands, odd.
        local_kernels: kernel sizes of the local part, one per channel group, odd.
        ssm_ratio: inner width of the scan over the width of the global part.
        d_state: state size N of the scan.

    Source: "MobileMamba" (arXiv 2411.15941), section 3.3.
    """

    def __init__(
        self,
        dim: int,
        global_ratio: float,
        local_ratio: float,
        wavelet_kernel: int,
        local_kernels: tuple[int, ...],
        ssm_ratio: float = 2.0,
        d_state: int = 1,
    ) -> None:
        super().__init__()
        dim = checks.integer("dim", dim)
        self.split = split_channels(dim, global_ratio, local_ratio)
        self.global_part = WaveletMamba(self.split[0], wavelet_kernel, ssm_ratio, d_state)
        self.local_part = MultiKernelDepthwise(self.split[1], local_kernels)
        self.proj = ConvNorm(dim, dim, norm_init=0.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x_global, x_local, x_identity = x.split(self.split, dim=1)
        mixed = torch.cat([self.global_part(x_global), self.local_part(x_local), x_identity], dim=1)
        return self.proj(mixed.relu_(), residual)

    def fold(self) -> nn.Module:
        return FoldedMRFFI(self)


class FoldedMRFFI(Folded):
    """An :class:`MRFFI` whose parts are folded, as one operator. ``(B, C, H, W) -> (B, C, H, W)``."""

    matrices = ("in_weight", "x_weight", "out_weight", "proj_weight")

    @torch.no_grad()
    def __init__(self, block: MRFFI) -> None:
        super().__init__()
        folded: Any = block  # its convolutions are folded layers by now
        ss2d, wavelet, proj = folded.global_part.ss2d, folded.global_part.wavelet, folded.proj
        self.eps = ss2d.norm.eps
        self.in_weight, self.in_bias = _parameters(ss2d.in_proj.weight.flatten(1), ss2d.in_proj.bias)
        self.conv_weight, self.conv_bias = in_order(ss2d.conv.weight, 1, 2, 3, 0), ss2d.conv.bias
        (self.x_weight,) = _parameters(ss2d.x_proj.flatten(0, 1))
        self.dt_weight, self.dt_bias = in_order(ss2d.dt_weight, 0, 2, 1), ss2d.dt_bias
        self.A_log, self.D = in_order(ss2d.A_log, 0, 2, 1), ss2d.D
        self.norm_weight, self.norm_bias = ss2d.norm.weight, ss2d.norm.bias
        self.out_weight, self.out_bias = _parameters(ss2d.out_proj.weight.flatten(1), ss2d.out_proj.bias)
        self.wavelet_weight = in_order(wavelet.weight.unflatten(0, (-1, 4)).squeeze(2), 1, 2, 3, 0)
        local_weight, self.local_bias, self.local_scale, self.local_shift = folded.local_part.folded(ss2d.conv.weight)
        self.local_weight = in_order(local_weight, 1, 2, 3, 0)
        self.proj_weight, self.proj_bias = _parameters(proj.weight.flatten(1), proj.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return mrffi(x, residual, self.weights(), self.eps)

    def weights(self) -> list[Tensor]:
        return [
            self.in_weight,
            self.in_bias,
            self.conv_weight,
            self.conv_bias,
            self.x_weight,
            self.dt_weight,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm_weight,
            self.norm_bias,
            self.out_weight,
            self.out_bias,
            self.wavelet_weight,
            self.local_weight,
            self.local_bias,
            self.local_scale,
            self.local_shift,
            self.proj_weight,
            self.proj_bias,
        ]


def _parameters(*tensors: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.detach().clone()) for tensor in tensors]
