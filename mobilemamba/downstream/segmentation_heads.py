"""The published segmentation heads in plain PyTorch: feature maps -> logits at the resolution of one of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DeepLabV3Head", "FCNHead", "PSPHead", "SemanticFPNHead", "resize"]


def resize(x: Tensor, like: Tensor) -> Tensor:
    """``x``, ``(B, C, H, W)``, at the height and width of ``like``: bilinear, corners not aligned."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def conv_norm(in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """A "same" convolution without bias, BatchNorm and ReLU; Kaiming-normal weights (fan out)."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def pixel_classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout of whole channels and a 1x1 convolution to the classes, with normal weights (0.01)."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


class SemanticFPNHead(nn.Module):
    """Levels of a pyramid, finest first -> logits ``(B, num_classes, H_0, W_0)``.

    Level i has max(i, 1) 3x3 convolutions, each with twice the resolution after it from level 1 on. All levels are
    resized to the first one and summed.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for i, width in enumerate(in_channels):
            level: list[nn.Module] = []
            for _ in range(max(i, 1)):
                level.append(conv_norm(width, channels, 3))
                width = channels
                if i:
                    level.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.levels.append(nn.Sequential(*level))
        self.classify = pixel_classifier(channels, num_classes, dropout)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        inputs = list(maps.values())
        total = self.levels[0](inputs[0])
        for i, level in enumerate(self.levels):
            if i > 0:
                total = total + resize(level(inputs[i]), total)
        return self.classify(total)


class DeepLabV3Head(nn.Module):
    """Atrous spatial pyramid pooling on the last feature map -> logits ``(B, num_classes, H, W)``.

    Branches: the global mean, a 1x1 convolution, and dilated 3x3 convolutions; then a 3x3 convolution on all of them.
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, dropout: float, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.pooled = conv_norm(in_channels, channels)
        self.branches = nn.ModuleList(
            [conv_norm(in_channels, channels), *(conv_norm(in_channels, channels, 3, rate) for rate in dilations)]
        )
        self.bottleneck = conv_norm((len(self.branches) + 1) * channels, channels, 3)
        self.classify = pixel_classifier(channels, num_classes, dropout)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        x = list(maps.values())[-1]
        parts = [resize(self.pooled(x.mean((2, 3), keepdim=True)), x)]
        for branch in self.branches:
            parts.append(branch(x))
        return self.classify(self.bottleneck(torch.cat(parts, 1)))


class PSPHead(nn.Module):
    """Pyramid pooling of the last feature map -> logits ``(B, num_classes, H, W)``.

    The map is averaged over grids of ``bins`` x ``bins`` cells; each grid passes a 1x1 convolution and is resized to
    the map. A 3x3 convolution takes the map and all grids.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = list(bins)
        self.grids = nn.ModuleList([conv_norm(in_channels, channels) for _ in bins])
        self.bottleneck = conv_norm(in_channels + len(bins) * channels, channels, 3)
        self.classify = pixel_classifier(channels, num_classes, dropout)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        x = list(maps.values())[-1]
        parts = [x]
        for i, grid in enumerate(self.grids):
            parts.append(resize(grid(cell_means(x, self.bins[i])), x))
        return self.classify(self.bottleneck(torch.cat(parts, 1)))


class FCNHead(nn.Module):
    """The auxiliary head: a 3x3 convolution on the last feature map but one -> logits ``(B, num_classes, H, W)``."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = conv_norm(in_channels, channels, 3)
        self.classify = pixel_classifier(channels, num_classes, dropout)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return self.classify(self.conv(list(maps.values())[-2]))


def cell_means(x: Tensor, bins: int) -> Tensor:
    """``F.adaptive_avg_pool2d(x, bins)``, as matrix products: torch.export and ONNX have it for fixed sizes only."""
    if bins == 1:
        return x.mean((2, 3), keepdim=True)
    rows, columns = averaging(x.size(2), bins, x), averaging(x.size(3), bins, x)
    return F.linear(F.linear(x, columns).transpose(2, 3), rows).transpose(2, 3)


def averaging(length: int, bins: int, like: Tensor) -> Tensor:
    """``(bins, length)``: row i averages the positions from floor(i length / bins) to ceil((i + 1) length / bins)."""
    position, cell = torch.arange(length, device=like.device), torch.arange(bins, device=like.device)[:, None]
    inside = (position >= cell * length // bins) & (position < ((cell + 1) * length + bins - 1) // bins)
    weight = inside.to(like.dtype)
    return weight / weight.sum(1, keepdim=True)
