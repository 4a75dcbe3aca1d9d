"""Detectors and segmenters on the backbone, with the published wiring."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .checkpoint import DownstreamCheckpoint, open_model, read_checkpoint, save_model
from .detectors import mask_rcnn, retinanet, ssdlite
from .necks import FeaturePyramid
from .published import load_published

__all__ = [
    "KINDS",
    "DownstreamCheckpoint",
    "FeaturePyramid",
    "create_model",
    "load_published",
    "mask_rcnn",
    "open_model",
    "read_checkpoint",
    "retinanet",
    "save_model",
    "ssdlite",
]
