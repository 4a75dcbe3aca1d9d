"""Published detectors and segmenters: their state dicts by this package's names, every key accounted for."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models import FeatureExtractor
from ..weights import published
from ..weights.checkpoint import differences
from ..weights.formats import load_torch

__all__ = ["convert", "load_published", "rename"]

Rules = tuple[tuple[str, str], ...]

#: The feature pyramid. ``extra_fpn_convs`` are counted from the finest level; :func:`rename` turns them round.
PYRAMID: Rules = (
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.neck.lateral.\1."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", r"backbone.neck.output.\1."),
    (r"^neck\.fpn_convs\.3\.conv\.", r"backbone.neck.coarser.0."),
    (r"^neck\.extra_trans_convs\.(\d+)\.conv\.", r"backbone.neck.upsample.\1."),
    (r"^neck\.extra_fpn_convs\.(\d+)\.conv\.", r"backbone.neck.finer_output.\1."),
)

#: By the class of the model: all rules are applied to a key, in this order.
RULES: dict[str, Rules] = {
    "MaskRCNN": (
        *PYRAMID,
        (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
        (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
        (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
        (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
        (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
        (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
        (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
        (r"^roi_head\.mask_head\.convs\.(\d+)\.conv\.", r"roi_heads.mask_head.\1.0."),
        (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.upsample."),
        (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.logits."),
    ),
    "RetinaNet": (
        *PYRAMID,
        (r"^bbox_head\.cls_convs\.(\d+)\.conv\.", r"head.classification_head.conv.\1.0."),
        (r"^bbox_head\.reg_convs\.(\d+)\.conv\.", r"head.regression_head.conv.\1.0."),
        (r"^bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
        (r"^bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
    ),
    "SSDLite": (
        (r"^neck\.extra_layers\.(\d+)\.0\.", r"backbone.neck.levels.\1.0."),
        (r"^neck\.extra_layers\.(\d+)\.1\.depthwise_conv\.", r"backbone.neck.levels.\1.1."),
        (r"^neck\.extra_layers\.(\d+)\.1\.pointwise_conv\.", r"backbone.neck.levels.\1.2."),
        (r"^bbox_head\.cls_convs\.", "head.classification_head.module_list."),
        (r"^bbox_head\.reg_convs\.", "head.regression_head.module_list."),
        (r"\.conv\.", ".0."),
        (r"\.bn\.", ".1."),
    ),
    "Segmenter": (
        *PYRAMID,
        (r"^auxiliary_head\.(?:convs\.0\.)?", "aux_classifier."),
        (r"^decode_head\.", "classifier."),
        (r"\.conv_seg\.", ".classify.1."),
        (r"^aux_classifier\.(conv|bn)\.", r"aux_classifier.conv.\1."),
        (r"\.image_pool\.1\.", ".pooled."),
        (r"\.aspp_modules\.", ".branches."),
        (r"\.psp_modules\.(\d+)\.1\.", r".grids.\1."),
        (r"\.scale_heads\.", ".levels."),
        (r"^((?:aux_)?classifier\..*)\.conv\.weight$", r"\1.0.weight"),
        (r"^((?:aux_)?classifier\..*)\.bn\.", r"\1.1."),
    ),
}

#: Parameters whose rows are classes with the background, which the published models count last and torchvision first.
CLASSES = r"(box_predictor\.cls_score|classification_head\.module_list\.\d+\.1)\.(weight|bias)$"


def load_published(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """Copy a published detector's or segmenter's weights into ``model``, or raise and copy nothing.

    Args:
        model: a model of :func:`create_model`, not fused, with as many classes as the file: the published detectors
            have ``num_classes=81``, the published segmenters 150.
        source: file of mmdetection or mmsegmentation, or its state dict. Keys ``backbone.*`` are those of the published
            classifiers. Stages that the model leaves out, and the classifier's head, are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or a key or a shape does not fit; one line names them.
    """
    state_dict, where = _read(source)
    rules = RULES.get(type(model).__name__)
    if rules is None:
        raise ValueError(f"model: expected one of {', '.join(RULES)}, got {type(model).__name__}")
    try:
        given = convert(model, state_dict)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    if found := differences(model.state_dict(), given):
        raise ValueError(f"{where}the weights do not fit the model; {found}")
    model.load_state_dict(given)


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The state dict of ``source``, and how messages begin."""
    where, content = "", source
    if not isinstance(source, Mapping):
        path = Path(source)
        where = f"{path}: "
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint file")
        try:
            content = load_torch(path)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{where}expected a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}, where


def convert(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published ``state_dict`` by the names of ``model``, and in its order of the classes.

    Raises:
        ValueError: as :func:`mobilemamba.weights.published.convert`, or two keys name the same parameter.
    """
    prefix = "backbone."
    extractor, features = next((name, m) for name, m in model.named_modules() if isinstance(m, FeatureExtractor))
    absent = tuple(f"stages.{i}." for i in range(len(features.body.stages), 3))
    backbone = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    converted = {
        f"{extractor}.body.{key}": value
        for key, value in published.convert(backbone).items()
        if not key.startswith(("head.", *absent))
    }
    for key, value in state_dict.items():
        if not key.startswith(prefix):
            name = rename(model, key)
            if name in converted:
                raise ValueError(f"{key}: a second key for the parameter {name}")
            converted[name] = _background_first(model, name, value)
    return converted


def rename(model: Any, key: str) -> str:
    """The name in ``model`` of the published ``key`` of a neck or a head. An unknown key stays, and fits no model."""
    for pattern, replacement in RULES[type(model).__name__]:
        key = re.sub(pattern, replacement, key)
    if match := re.match(r"(backbone\.neck\.finer_output\.)(\d+)(.*)", key):
        key = f"{match[1]}{len(model.backbone.neck.upsample) - 1 - int(match[2])}{match[3]}"
    return key


def _background_first(model: Any, name: str, value: Tensor) -> Tensor:
    if not re.search(CLASSES, name):
        return value
    classes = model.transform.num_classes
    if len(value) % classes:
        return value  # another number of classes, which fits no model
    return value.reshape(-1, classes, *value.shape[1:]).roll(1, 1).reshape(value.shape)
