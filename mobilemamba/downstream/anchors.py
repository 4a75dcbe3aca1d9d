"""Anchors as the published detectors place them, as torchvision's AnchorGenerator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

__all__ = ["GridAnchors", "pyramid_anchors", "ssd_anchors"]

RATIOS = (0.5, 1.0, 2.0)  # height over width


class GridAnchors(AnchorGenerator):
    """Anchors at the points ``(x * stride, y * stride)`` of each level, in the order y, x, anchor of the cell.

    Args:
        cells: for each level the anchors of the cell at (0, 0): ``(A, 4)``, x1, y1, x2, y2 in pixels.
        strides: of each level in pixels.

    Differs from torchvision's class: anchors are not rounded. The stride is given; for most images the quotient of the
    sizes of the image and the map differs from it. Anchors are float64: the IoU of a small box and the anchors around
    it differs by 3e-9 between ratios, and float32 would match by its rounding.
    """

    __annotations__ = {"cell_anchors": list[Tensor], "level_strides": list[int]}

    def __init__(self, cells: Sequence[Tensor], strides: Sequence[int]) -> None:
        super().__init__(sizes=((1,),) * len(cells), aspect_ratios=((1.0,),) * len(cells))
        self.cell_anchors = list(cells)
        self.level_strides = list(strides)

    def num_anchors_per_location(self) -> list[int]:
        return [len(cell) for cell in self.cell_anchors]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors ``(sum of A * H_i * W_i, 4)`` of the maps ``(B, C, H_i, W_i)``, once for each image."""
        if len(feature_maps) != len(self.cell_anchors):
            raise ValueError(f"expected feature maps of {len(self.cell_anchors)} levels, got {len(feature_maps)}")
        dtype, device = torch.float64, feature_maps[0].device
        levels: list[Tensor] = []
        for cell, stride, level in zip(self.cell_anchors, self.level_strides, feature_maps, strict=True):
            height, width = level.shape[-2:]
            x = torch.arange(width, dtype=dtype, device=device) * stride
            y = torch.arange(height, dtype=dtype, device=device) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            points = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            levels.append((points + cell.to(device, dtype)).reshape(-1, 4))
        anchors = torch.cat(levels)
        return [anchors for _ in image_list.image_sizes]


def _cell(side: float, ratios: Sequence[float], scales: Sequence[float], center: float) -> Tensor:
    """Anchors of width ``side * scale / sqrt(ratio)`` and height ``side * scale * sqrt(ratio)``; ratio outermost.

    Computed in float32 and in this order, so that the values are the published ones to the last bit.
    """
    root, scale = torch.tensor(ratios).sqrt(), torch.tensor(scales)
    w = (side * (1 / root)[:, None] * scale).flatten()
    h = (side * root[:, None] * scale).flatten()
    return torch.stack((center - 0.5 * w, center - 0.5 * h, center + 0.5 * w, center + 0.5 * h), dim=1)


def pyramid_anchors(strides: Sequence[int], scales: Sequence[float]) -> GridAnchors:
    """Anchors of size ``stride * scale`` and ratios 1:2, 1:1 and 2:1, centred on the points of the grid."""
    return GridAnchors([_cell(stride, RATIOS, scales, 0.0) for stride in strides], strides)


def ssd_anchors(strides: Sequence[int], sizes: Sequence[int]) -> GridAnchors:
    """Six anchors per cell, centred half a stride from the points of the grid.

    Args:
        strides: of each level.
        sizes: of each level's anchors, and one more; in pixels. The second anchor is the geometric mean of the level's
            size and the next one.
    """
    cells = []
    for stride, low, high in zip(strides, sizes[:-1], sizes[1:], strict=True):
        anchors = _cell(low, (1, 1 / 2, 2, 1 / 3, 3), (1.0, math.sqrt(high / low)), stride / 2)
        cells.append(anchors[[0, 1, 2, 4, 6, 8]])
    return GridAnchors(cells, strides)
