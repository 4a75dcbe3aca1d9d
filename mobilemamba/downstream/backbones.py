"""The backbone of a detector or segmenter, from the arguments of the public functions."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..models import FeatureExtractor
from ..zoo import feature_extractor
from .necks import FeaturePyramid, WithNeck

__all__ = ["Backbone", "Pretrained", "level_sides", "make_backbone", "with_pyramid"]

Backbone = str | FeatureExtractor
Pretrained = bool | str | os.PathLike[str]


def make_backbone(
    backbone: Any, pretrained: Pretrained, options: Mapping[str, Any] | None, stages: int, **defaults: Any
) -> FeatureExtractor:
    """The feature extractor that an argument ``backbone`` stands for.

    Args:
        backbone: name of a preset, or the extractor itself.
        pretrained, options: of :func:`mobilemamba.feature_extractor`, for a name. ``defaults`` fill in ``options``.
        stages: number of feature maps that are needed.

    Raises:
        ValueError: an argument is out of its range.
        TypeError, OSError: as :func:`mobilemamba.feature_extractor`.
    """
    if isinstance(backbone, str):
        given = {"stages": tuple(range(stages)), **defaults, **(options or {})}
        backbone = feature_extractor(backbone, pretrained, **given)
    elif not isinstance(backbone, FeatureExtractor):
        raise ValueError(
            f"backbone: expected the name of a preset or a FeatureExtractor, got {type(backbone).__name__}"
        )
    elif pretrained or options:
        raise ValueError("pretrained_backbone and backbone_options go with the name of a preset, not with a module")
    if len(backbone.out_channels) != stages:
        raise ValueError(f"backbone: expected feature maps of {stages} stages, got {len(backbone.out_channels)}")
    return backbone


def with_pyramid(body: FeatureExtractor, finest: int, coarser: bool, channels: int) -> WithNeck:
    """``body`` with a pyramid from the stride ``finest`` on, or from its own if that is coarser by no power of two."""
    strides = list(body.feature_info.reduction())
    if strides != [strides[0] * 2**i for i in range(len(strides))]:
        raise ValueError(f"backbone: expected strides that double from stage to stage, got {strides}")
    finer = 0
    while strides[0] > finest:
        if strides[0] % 2:
            raise ValueError(f"backbone: expected a first stride that is a power of two, got {strides[0] * 2**finer}")
        strides.insert(0, strides[0] // 2)
        finer += 1
    if coarser:
        strides.append(2 * strides[-1])
    neck = FeaturePyramid(body.out_channels, channels, finer=finer, coarser=coarser)
    return WithNeck(body, neck, neck.out_channels, strides)


def level_sides(size: int, reduction: Sequence[int], levels: int) -> list[int]:
    """The sides of the feature maps of a square image: of the stages, and of levels that halve the last one."""
    sides = [-(-size // stride) for stride in reduction]
    while len(sides) < levels:
        sides.append((sides[-1] + 1) // 2)
    return sides
