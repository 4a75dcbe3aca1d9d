"""Detectors and segmenters on the backbone, with the published wiring."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .checkpoint import DownstreamCheckpoint, open_model, read_checkpoint, save_model
from .detectors import mask_rcnn, retinanet, ssdlite
from .necks import FeaturePyramid
from .published import load_published
from .segmentation import Segmenter, deeplabv3, pspnet, segmentation_loss, semantic_fpn

__all__ = [
    "KINDS",
    "DownstreamCheckpoint",
    "FeaturePyramid",
    "Segmenter",
    "create_model",
    "deeplabv3",
    "load_published",
    "mask_rcnn",
    "open_model",
    "pspnet",
    "read_checkpoint",
    "retinanet",
    "save_model",
    "segmentation_loss",
    "semantic_fpn",
    "ssdlite",
]

#: The task and the function of each kind of model.
KINDS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "mask_rcnn": ("detect", mask_rcnn),
    "retinanet": ("detect", retinanet),
    "ssdlite": ("detect", ssdlite),
    "semantic_fpn": ("segment", semantic_fpn),
    "deeplabv3": ("segment", deeplabv3),
    "pspnet": ("segment", pspnet),
}


def create_model(kind: str, backbone: Any = "b1", num_classes: int | None = None, **options: Any) -> nn.Module:
    """The model of ``kind``, a key of :data:`KINDS`, as its function makes it.

    Args:
        kind: name of the function.
        backbone, num_classes, options: the function's arguments. ``num_classes=None`` takes the function's default.

    Raises:
        ValueError: ``kind`` is unknown, or as the function raises it.
        ImportError: a detector needs torchvision.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if num_classes is not None:
        options["num_classes"] = num_classes
    return KINDS[kind][1](backbone, **options)
