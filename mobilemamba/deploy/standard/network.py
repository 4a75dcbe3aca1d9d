"""Makes the portable form of a whole model: each fused layer is replaced by one of standard operators."""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...downstream import Segmenter
from ...models import MobileMamba
from ...models.folded import DenseConv2d, DepthwiseConv2d, FoldedLinear, check_foldable
from ...models.global_part import HaarConv2d
from ...models.layers import FoldedFFN, FoldedPatchEmbedding, FoldedPatchMerging, FoldedSqueezeExcite
from ...models.mrffi import MRFFI, FoldedMRFFI, FoldedParts
from .layers import (
    PortableFFN,
    PortableLinear,
    PortableSqueezeExcite,
    dense,
    depthwise,
    patch_embedding,
    patch_merging,
)
from .mixer import PortableMRFFI

__all__ = ["FeatureMaps", "Logits", "SegmenterLogits", "portable"]

Model = TypeVar("Model", bound=nn.Module)


def portable(model: Model, *, basic: bool = False) -> Model:
    """A float32 copy of ``model`` on the CPU, for inference, in standard operators: the same outputs up to rounding.

    It works at every image size. The scan is unrolled in Python, so an exporter gets a graph without loops, for the
    size of its example. No tensor has more than five dimensions.

    Args:
        model: a :class:`MobileMamba`, a feature extractor or a segmenter of this package, fused or not. It stays as it
            is.
        basic: write softplus and LayerNorm as arithmetic, for compilers that do not have them (XNNPACK).

    Raises:
        ValueError: ``fuse`` refuses the model, or a layer has no form in standard operators; the message names it.
    """
    check_foldable(model)  # before the copy, which fails with torch's words on a pruned model
    fused = copy.deepcopy(model).float().cpu().fuse()  # type: ignore[operator]
    with torch.no_grad():
        return _replaced(fused, "", basic).eval().requires_grad_(False)


def _replaced(layer: nn.Module, name: str, basic: bool) -> Any:
    if isinstance(layer, (FoldedMRFFI, FoldedParts)):
        return PortableMRFFI(layer, basic)
    if (make := REPLACEMENTS.get(type(layer))) is not None:
        return make(layer)
    if isinstance(layer, (MRFFI, HaarConv2d, FoldedLinear)):
        raise ValueError(f"{name}: a {type(layer).__name__} in this place has no form in standard operators")
    if isinstance(layer, MobileMamba):
        layer.fused = layer.fused_head = False  # these stand for one operator for all layers
        if type(layer.head) is FoldedLinear:
            layer.head = PortableLinear(layer.head, layer.num_features)
    for child_name, child in layer.named_children():
        setattr(layer, child_name, _replaced(child, f"{name}.{child_name}".lstrip("."), basic))
    return layer


REPLACEMENTS: dict[type[nn.Module], Any] = {
    DenseConv2d: dense,
    DepthwiseConv2d: depthwise,
    FoldedFFN: PortableFFN,
    FoldedPatchEmbedding: patch_embedding,
    FoldedPatchMerging: patch_merging,
    FoldedSqueezeExcite: PortableSqueezeExcite,
}


class Logits(nn.Module):
    """Images ``(B, C, H, W)`` -> logits ``(B, num_classes)``, with the mean in the form that XNNPACK takes."""

    def __init__(self, network: MobileMamba) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.network.forward_stages(images)[-1].mean((2, 3), keepdim=True)
        return self.network.head(pooled.flatten(1))


class FeatureMaps(nn.Module):
    """Images ``(B, C, H, W)`` -> the maps after ``stages`` (numbers from 0), a tuple."""

    def __init__(self, network: MobileMamba, stages: Sequence[int]) -> None:
        super().__init__()
        self.network, self.stages = network, tuple(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.forward_stages(images)
        return tuple(maps[i] for i in self.stages)


class SegmenterLogits(nn.Module):
    """The logits of a segmenter as a tensor: images ``(B, C, H, W)`` -> ``(B, num_classes, H, W)``."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter.without_aux()

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter(images)["out"]
