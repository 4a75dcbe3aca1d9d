"""LocalVim (arXiv 2403.09338), which timm does not have, as a sequence of operators with random weights.

20 blocks at 1/16 of the sides, each with four scans: of the pixels by rows, by columns or by windows, from their start
or from their end. Each scan has a causal convolution, projections and a state matrix of its own. Widths, the scans of
each block and the rest are those of its authors' program (their first version, without a class token).

Their 8 and 28 M parameters are 7.99 and 27.78 M here. Their 1.5 and 4.8 GFLOPs are multiply-adds, for images of
224 x 224, but with the convolution and the projections of one scan of the four, and five for each state and position,
where the scan's definition has four: ``mambas.MACS`` gives 1.66 and 5.35 G.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from mambas import ChannelGate, Scans
from torch import Tensor, nn

__all__ = ["NETWORKS", "LocalVim"]

SIDE = 14  # of the map; the embedding of positions is of this size
TAPS = 4

#: The scans of each block of -T: by rows (h), columns (v) or windows of 2 or 7, and from the end with a minus sign.
SEARCHED = (
    "h -v 7 -7",
    "-h -2 7 -7",
    "h -h v 7",
    "h -h v -v",
    "h -h v -v",
    "h -h v -v",
    "-h v -v 7",
    "-h v -v -2",
    "h -h v -v",
    "h -h v -v",
    "h v -v 2",
    "h v -v -2",
    "h -h -v 7",
    "-h v -v 2",
    "h -h v -v",
    "h v 2 -2",
    "v -v 2 7",
    "h -h v 2",
    "h -h -2 7",
    "v -v 2 -2",
)
FIXED = ("h -h 2 -2",) * 20  # of -S


def order_of(name: str) -> Tensor:
    """Row-major places in the order that a scan takes them in, ``(SIDE * SIDE,)``."""
    places = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    if name == "h":
        return places.flatten()
    if name == "v":
        return places.T.flatten()
    window = int(name)
    return places.view(SIDE // window, window, SIDE // window, window).transpose(1, 2).flatten()


class MultiScan(nn.Module):
    """Four gated selective scans of a map in row-major order, ``(B, L, C) -> (B, L, C)``, weighted and summed."""

    def __init__(self, dim: int, scans: str) -> None:
        super().__init__()
        inner = 2 * dim
        names = scans.split()
        self.orders = [name.removeprefix("-") for name in names]
        self.backward = [name.startswith("-") for name in names]
        for name in sorted(set(self.orders) - {"h"}):
            self.register_buffer(f"order_{name}", order_of(name), persistent=False)
            self.register_buffer(f"inverse_{name}", order_of(name).argsort(), persistent=False)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.convs = nn.ModuleList(
            nn.Conv2d(inner, inner, (1, TAPS), padding=(0, TAPS - 1), groups=inner) for _ in names
        )
        self.scans = Scans(inner, math.ceil(dim / 16), self.backward)
        self.gate = ChannelGate(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        passed = F.silu(z)
        ordered = {name: self._taken(u, "order", name) for name in dict.fromkeys(self.orders)}
        sequences = [self._convolved(ordered[name], i) for i, name in enumerate(self.orders)]
        scanned = self.scans(sequences)
        weighted = [
            self.gate(self._taken(y, "inverse", name) * passed) for y, name in zip(scanned, self.orders, strict=True)
        ]
        return self.out_proj(weighted[0] + weighted[1] + weighted[2] + weighted[3])

    def _taken(self, x: Tensor, which: str, name: str) -> Tensor:
        return x if name == "h" else x.index_select(1, getattr(self, f"{which}_{name}"))

    def _convolved(self, x: Tensor, i: int) -> Tensor:
        """Of each place and the three that the scan took before it."""
        length = x.size(1)
        y = self.convs[i](x.transpose(1, 2).unsqueeze(2)).squeeze(2)
        y = y[..., -length:] if self.backward[i] else y[..., :length]
        return F.silu(y).transpose(1, 2)


class Rotation(nn.Module):
    """Pairs of channels rotated by angles of the place, ``(B, L, C)``: rows in the first half, columns in the second.

    It is linear, so the sum of a block's output and its residual is rotated where the authors rotate both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        pairs = dim // 4
        angles = torch.outer(torch.arange(float(SIDE)), 1e4 ** -(torch.arange(pairs) / pairs))
        rows, columns = angles[:, None].expand(-1, SIDE, -1), angles[None].expand(SIDE, -1, -1)
        both = torch.cat([rows, columns], -1).flatten(0, 1)
        self.register_buffer("cos", both.cos(), persistent=False)
        self.register_buffer("sin", both.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1).flatten(-2)


class LocalVim(nn.Module):
    """``(B, 3, 224, 224) -> (B, 1000)``."""

    def __init__(self, dim: int, scans: tuple[str, ...]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, stride=16)
        self.positions = nn.Parameter(0.02 * torch.randn(SIDE * SIDE, dim))
        self.rotation = Rotation(dim)
        self.blocks = nn.ModuleList(nn.Sequential(nn.RMSNorm(dim, eps=1e-5), MultiScan(dim, names)) for names in scans)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, 1000)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (16 * SIDE, 16 * SIDE):
            raise ValueError(f"images: expected sides of {16 * SIDE}, got {tuple(images.shape)}")
        x = self.patches(images).permute(0, 2, 3, 1).flatten(1, 2) + self.positions
        for block in self.blocks:
            x = self.rotation(x)
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


NETWORKS = {
    "localvim_t": partial(LocalVim, 192, SEARCHED),
    "localvim_s": partial(LocalVim, 384, FIXED),
}
