"""The small layers that the network is built from: convolution with BatchNorm, FFN, patch merging, drop path."""

import torch
from torch import Tensor, nn

__all__ = ["FFN", "ConvNorm", "DropPath", "PatchMerging", "ResidualDepthwise", "SqueezeExcite", "fold_batchnorm"]


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm under ``module``, in place where possible; returns the module to use instead.

    A layer takes part by defining ``fold()``, which is called after its children were folded.
    """
    for name, child in module.named_children():
        setattr(module, name, fold_batchnorm(child))
    fold = getattr(module, "fold", None)
    return fold() if fold is not None else module


class ConvNorm(nn.Module):
    """Bias-free "same" convolution followed by BatchNorm. ``(B, C_in, H, W) -> (B, C_out, H', W')``.

    Args:
        norm_init: initial weight of the BatchNorm; 0 for the one that ends a residual branch.
    """

    def __init__(
        self, in_chans: int, out_chans: int, kernel: int = 1, stride: int = 1, groups: int = 1, norm_init: float = 1.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_chans)
        nn.init.constant_(self.norm.weight, norm_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The same function of an input as one convolution with bias (inference statistics)."""
        conv, norm = self.conv, self.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            groups=conv.groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        folded.weight.copy_(conv.weight * scale[:, None, None, None])
        folded.bias.copy_(norm.bias - norm.running_mean * scale)
        return folded


class ResidualDepthwise(ConvNorm):
    """``x + BN(depthwise 3x3(x))``. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel=3, groups=dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        folded = super().fold()
        folded.weight[:, 0, 1, 1] += 1  # the residual is one more weight on the centre tap
        return folded


class FFN(nn.Module):
    """``x + BN(1x1(ReLU(BN(1x1(x)))))`` with a hidden width of ``2 * dim``. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = ConvNorm(dim, 2 * dim)
        self.project = ConvNorm(2 * dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.expand(x).relu())


class SqueezeExcite(nn.Module):
    """Channel gate from the global mean. ``(B, C, H, W) -> (B, C, H, W)``; ``C/4`` hidden channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, dim // 4, 1)
        self.expand = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid()


class PatchMerging(nn.Module):
    """Halves the resolution and changes the width. ``(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.expand = ConvNorm(dim, hidden)
        self.depthwise = ConvNorm(hidden, hidden, kernel=3, stride=2, groups=hidden)
        self.squeeze_excite = SqueezeExcite(hidden)
        self.project = ConvNorm(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x).relu()).relu()
        return self.project(self.squeeze_excite(x))


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes whole samples with probability ``rate`` and scales the rest up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty([x.size(0)] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
