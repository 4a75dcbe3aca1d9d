"""EfficientVMamba (arXiv 2403.09977), which timm does not have, as a sequence of operators with random weights.

Two stages of blocks with a scan of every second pixel, four sequences of a quarter of the pixels, beside a depthwise
convolution; then two stages of inverted residuals. Widths, depths and the order of pixels are those of its authors'
program and logs, which state 6.494, 11.274 and 33.717 M parameters. So has this.

Their 0.8, 1.3 and 4.0 GFLOPs are multiply-adds, for images of 224 x 224, but nine for each state and position of a
scan, where its definition has four: ``mambas.MACS`` gives 0.72, 1.22 and 3.81 G.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from mambas import ChannelGate, Scans
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["NETWORKS", "EfficientVMamba"]


class ConvNorm(nn.Sequential):
    """A convolution and BatchNorm; ``timm.utils.reparameterize_model`` finds ``fuse``."""

    def __init__(self, dim: int, out: int, kernel: int = 1, groups: int = 1, bias: bool = False) -> None:
        super().__init__(
            nn.Conv2d(dim, out, kernel, padding=kernel // 2, groups=groups, bias=bias), nn.BatchNorm2d(out)
        )

    def fuse(self) -> nn.Module:
        return fuse_conv_bn_eval(self[0], self[1])


class AtrousScan(nn.Module):
    """A gated selective scan in four sequences, each of every second pixel of every second row or column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.scans = Scans(inner, math.ceil(dim / 16), [False] * 4)
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = self.norm(self._scanned(u)) * F.silu(z)
        return self.out_proj(y)

    def _scanned(self, u: Tensor) -> Tensor:
        # rows, columns, rows, columns
        parts = [u[:, ::2, ::2], u[:, 1::2, ::2].transpose(1, 2), u[:, ::2, 1::2], u[:, 1::2, 1::2].transpose(1, 2)]
        scanned = self.scans([part.flatten(1, 2) for part in parts])
        a, b, c, d = (y.view(part.shape) for y, part in zip(scanned, parts, strict=True))
        even, odd = torch.stack([a, c], 3), torch.stack([b.transpose(1, 2), d.transpose(1, 2)], 3)
        return torch.stack([even, odd], 2).reshape(u.shape)  # (B, H/2, 2, W/2, 2, C)


class ScanBlock(nn.Module):
    """The scan and a convolution side by side, their channels weighted by the same layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.scan = AtrousScan(dim)
        self.conv = nn.Sequential(ConvNorm(dim, dim, 3, groups=dim, bias=True), nn.GELU(), nn.Conv2d(dim, dim, 1))
        self.gate = ChannelGate(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.gate(self.scan(y)) + self.gate(self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class InvertedResidual(nn.Module):
    """Expansion by four, a depthwise convolution, weights of the channels, projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner, squeezed = 4 * dim, dim // 2
        self.expand = nn.Sequential(ConvNorm(dim, inner), nn.ReLU(), ConvNorm(inner, inner, 3, groups=inner), nn.ReLU())
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, inner, 1)]
        self.weights = nn.Sequential(*squeeze, nn.Sigmoid())
        self.project = ConvNorm(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x.permute(0, 3, 1, 2))
        return x + self.project(y * self.weights(y)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Four pixels into one: ``(B, H, W, C) -> (B, H/2, W/2, 2 C)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        patches = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        return self.reduce(self.norm(patches.reshape(batch, height // 2, width // 2, 4 * channels)))


class EfficientVMamba(nn.Module):
    """``(B, 3, H, W) -> (B, 1000)``, sides multiples of 32; ``dim`` channels in the first of four stages."""

    def __init__(self, dim: int, depths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        layers: list[nn.Module] = [nn.LayerNorm(dim)]
        for i, depth in enumerate(depths):
            if i > 0:
                layers.append(PatchMerging(dim))
                dim *= 2
            block = ScanBlock if i < 2 else InvertedResidual
            layers += [block(dim) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(dim))
        self.head = nn.Linear(dim, 1000)

    def forward(self, images: Tensor) -> Tensor:
        if images.size(2) % 32 or images.size(3) % 32:
            raise ValueError(f"images: expected sides that are multiples of 32, got {tuple(images.shape)}")
        return self.head(self.layers(self.patches(images).permute(0, 2, 3, 1)).mean((1, 2)))


NETWORKS = {
    "efficientvmamba_t": partial(EfficientVMamba, 48, (2, 2, 4, 2)),
    "efficientvmamba_s": partial(EfficientVMamba, 64, (2, 2, 4, 2)),
    "efficientvmamba_b": partial(EfficientVMamba, 96, (2, 2, 9, 2)),
}
