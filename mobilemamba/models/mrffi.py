"""MRFFI, the multi-receptive-field feature interaction: global, local and identity parts of the channels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mrffi
from . import checks
from .folded import Folded, are_plain, in_order
from .global_part import WaveletMamba, WaveletMixer
from .layers import ConvNorm
from .mixers import Mixer, make_mixer

__all__ = ["MRFFI", "FoldedMRFFI", "FoldedParts", "MultiKernelDepthwise", "split_channels"]


def split_channels(dim: int, global_ratio: float, local_ratio: float) -> tuple[int, int, int]:
    """Widths of the (global, local, identity) parts of ``dim`` channels; they sum to ``dim``.

    The global part is ``global_ratio * dim`` to the nearest multiple of 16, a tie going up. The local part is
    ``local_ratio * dim``, or what the global part leaves where that is less; the identity part is the rest. A
    ``global_ratio`` of 0 leaves the global part out.
    """
    dim = checks.integer("dim", dim)
    global_ratio, local_ratio = checks.real("global_ratio", global_ratio), checks.real("local_ratio", local_ratio)
    global_dim = (int(global_ratio * dim) + 8) // 16 * 16
    if not (0 < global_dim <= dim or global_ratio == 0):
        raise ValueError(
            f"global_ratio={global_ratio} of {dim} channels gives a global part of {global_dim} channels; "
            f"expected at least 16 and at most {dim}, in multiples of 16, or a ratio of 0"
        )
    local_dim = min(int(local_ratio * dim), dim - global_dim)
    return global_dim, local_dim, dim - global_dim - local_dim


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
        weights = [group[0].weight for group in groups]
        # a kernel of size 1 was folded to a factor for each channel
        weights = [weight if weight.dim() == 4 else weight[:, None, None, None] for weight in weights]
        size = max(weight.size(3) for weight in weights)
        kernels = [F.pad(weight, [(size - weight.size(3)) // 2] * 4) for weight in weights]
        biases, scales, shifts = ([getattr(group[i], name) for group in groups] for i, name in FOLDED_GROUP)
        return _parameters(torch.cat(kernels), torch.cat(biases), torch.cat(scales), torch.cat(shifts))


class MRFFI(nn.Module):
    """Multi-receptive-field feature interaction. ``(B, C, H, W) -> (B, C, H, W)``; adds ``residual`` where given.

    ``BN(1x1(ReLU(concat(global(x_G), local(x_P), x_I))))`` with the channels divided by :func:`split_channels`.

    Args:
        dim: channels C, at least 16 if there is a global part (it is a multiple of 16).
        global_ratio: share of the channels for the wavelet-enhanced scan; 0 for none.
        local_ratio: share of the channels for the depthwise kernels; 0 for none, 1 for all that the global part leaves.
        wavelet_kernel: kernel size on the Haar sub-bands, odd; 0 for no wavelet part.
        local_kernels: kernel sizes of the local part, one per channel group, odd.
        ssm_ratio: inner width of the scan over the width of the global part.
        d_state: state size N of the scan.
        directions: of the scan; 1 for the one from the first pixel to the last one alone.
        mixer: as for :class:`MobileMamba`.

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
        directions: int = 2,
        mixer: Mixer = "mamba",
    ) -> None:
        super().__init__()
        dim = checks.integer("dim", dim)
        self.split = split_channels(dim, global_ratio, local_ratio)
        global_part: nn.Module = nn.Identity()
        width = self.split[0]
        if width and mixer == "mamba":
            global_part = WaveletMamba(width, wavelet_kernel, ssm_ratio, d_state, directions)
        elif width:
            global_part = WaveletMixer(make_mixer(mixer, width), width, wavelet_kernel)
        self.global_part = global_part  # in two steps: torch.jit.script warns of an annotated attribute of self
        self.local_part = MultiKernelDepthwise(self.split[1], local_kernels)
        self.proj = ConvNorm(dim, dim, norm_init=0.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x_global, x_local, x_identity = x.split(self.split, dim=1)
        mixed = torch.cat([self.global_part(x_global), self.local_part(x_local), x_identity], dim=1)
        return self.proj(mixed.relu_(), residual)

    def fold(self) -> nn.Module:
        """One operator; the folded parts where there is no scan."""
        return FoldedMRFFI(self) if isinstance(self.global_part, WaveletMamba) else FoldedParts(self)


class FoldedParts(nn.Module):
    """An :class:`MRFFI` without a scan, with folded layers. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, block: MRFFI) -> None:
        super().__init__()
        self.split = block.split
        self.global_part, self.local_part, self.proj = block.global_part, block.local_part, block.proj

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x_global, x_local, x_identity = x.split(self.split, dim=1)
        mixed = torch.cat([self.global_part(x_global), self.local_part(x_local), x_identity], dim=1)
        y = self.proj(mixed.relu_())
        return y if residual is None else y + residual


class FoldedMRFFI(Folded):
    """An :class:`MRFFI` whose parts are folded, as one operator. ``(B, C, H, W) -> (B, C, H, W)``."""

    matrices = ("in_weight", "x_weight", "out_weight", "proj_weight")
    sources = {  # noqa: RUF012
        "in_weight": "global_part.ss2d.in_proj",
        "out_weight": "global_part.ss2d.out_proj",
        "proj_weight": "proj",
    }

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
