"""The backbone without its head, as detectors and segmenters take it: images -> feature maps of some stages."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .backbone import MobileMamba
from .frozen import freeze_layers, freeze_statistics

__all__ = ["FeatureExtractor", "FeatureInfo"]


class FeatureInfo(list[dict[str, Any]]):
    """Facts about the feature maps, one dict a map, with timm's accessors.

    Each dict has ``num_chs`` (channels), ``reduction`` (stride against the image, in pixels), ``module`` (name of the
    module that ends the stage) and ``index`` (number of the stage, from 0). An ``idx`` is a position in this list, or
    several; None stands for all.
    """

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """The value of ``key``: of one map for an int, otherwise a list."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """The dicts, with all keys or with ``keys``: of one map for an int, otherwise a list."""
        if isinstance(idx, int):
            return {key: self[idx][key] for key in keys or self[idx]}
        return [self.get_dicts(keys, i) for i in (range(len(self)) if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)


class FeatureExtractor(nn.Module):
    """Images ``(B, in_chans, H, W)`` -> ``OrderedDict`` of the feature maps after some stages.

    The map ``"i"`` is that of ``stages[i]``: ``(B, out_channels[i], ceil(H / stride), ceil(W / stride))`` with the
    stride ``feature_info.reduction()[i]``. The published presets have strides of 16, 32 and 64 pixels. H and W may be
    any size from 1 on. This is what torchvision's detectors and segmenters expect of a backbone.

    - timm's list: ``maps(images)`` returns the same maps as a list; ``feature_info`` has timm's accessors.
    - torchvision's ``FeaturePyramidNetwork`` takes the output as it is. ``BackboneWithFPN`` takes :meth:`layers`.
    - docs/downstream.md shows encoders for segmentation_models_pytorch and for Hugging Face.

    Args:
        body: the network. Its layers are used, not copied; its head and the stages after the last one of ``stages`` are
            left out. It may be fused.
        stages: numbers of the stages whose maps are wanted, from 0, ascending; None for all.
        norm_eval: every BatchNorm uses its running statistics, also in training, and never updates them. Its weight and
            bias are still trained. Detectors are trained so: their batches are too small for statistics.
        frozen_stages: -1 trains everything, 0 freezes the stem (``patch_embed``), and k > 0 freezes the stem and the
            first k stages, as mmdetection's argument of that name. In frozen layers no parameter and no statistic
            changes, and there is no stochastic depth.

    Attributes:
        body: a :class:`MobileMamba` without a head, with the stages that are needed.
        out_channels: list of the channels of the maps.
        feature_info: a :class:`FeatureInfo`.

    Raises:
        ValueError: an argument is out of its range.

    Unlike torchvision's ``resnet_fpn_backbone``, nothing is frozen by default, and frozen norms are BatchNorms with the
    same names in the state dict.
    """

    def __init__(
        self,
        body: MobileMamba,
        stages: Sequence[int] | None = None,
        *,
        norm_eval: bool = False,
        frozen_stages: int = -1,
    ) -> None:
        super().__init__()
        count = len(body.stages)
        numbers = list(range(count)) if stages is None else list(checks.integers("stages", stages, least=0))
        if numbers != sorted(set(numbers)) or numbers[-1] >= count:
            raise ValueError(f"stages: expected ascending numbers of stages from 0 to {count - 1}, got {stages!r:.100}")
        norm_eval = checks.flag("norm_eval", norm_eval)
        frozen_stages = checks.integer("frozen_stages", frozen_stages, least=-1)
        if frozen_stages > count:
            raise ValueError(f"frozen_stages: expected at most {count}, the number of stages, got {frozen_stages}")
        self.stages = numbers  # in two steps: torch.jit.script warns of an annotated attribute of self
        self.body = _without_head(body, numbers[-1] + 1)
        self.feature_info = FeatureInfo({**self.body.feature_info[i], "index": i} for i in numbers)
        self.out_channels = [self.body.feature_info[i]["num_chs"] for i in numbers]
        if norm_eval:
            freeze_statistics(self.body)
        if frozen_stages >= 0:
            for part in (self.body.patch_embed, *list(self.body.stages)[:frozen_stages]):
                freeze_layers(part)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The feature maps of images ``(B, in_chans, H, W)`` as a list.

        Raises:
            ValueError: the shape or the type of the images does not fit.
        """
        maps = self.body.forward_stages(images)
        return [maps[i] for i in self.stages]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = OrderedDict()
        for i, x in enumerate(self.maps(images)):
            features[str(i)] = x
        return features

    @torch.jit.unused
    def layers(self) -> nn.Sequential:
        """The same layers in a row, ``stem``, ``stage0``, ``stage1``, ..., for ``IntermediateLayerGetter``::

            returned = {"stage0": "0", "stage1": "1", "stage2": "2"}
            BackboneWithFPN(features.layers(), returned, features.out_channels, 256)

        A fused network runs layer by layer there; it runs as one operator in this module.
        """
        stages = {f"stage{i}": stage for i, stage in enumerate(self.body.stages)}
        return nn.Sequential(OrderedDict(stem=self.body.patch_embed, **stages))

    @torch.jit.unused
    def fuse(self) -> "FeatureExtractor":
        """A copy for inference, as :meth:`MobileMamba.fuse` makes it: evaluation mode, every BatchNorm folded.

        Raises:
            ValueError: as :meth:`MobileMamba.fuse`.
        """
        return FeatureExtractor(self.body.fuse(), self.stages).eval()


def _without_head(model: MobileMamba, count: int) -> MobileMamba:
    """A model of the same layers with the first ``count`` stages and no head."""
    body = copy.copy(model)
    body._modules = {**model._modules, "stages": nn.ModuleList(list(model.stages)[:count]), "head": nn.Identity()}
    body.feature_info = model.feature_info[:count]
    body.num_features = body.feature_info[-1]["num_chs"]
    body.num_classes, body.distillation, body.fused_head = 0, False, False
    return body
