"""MobileMamba (CVPR 2025) as a C++/CUDA extension of PyTorch: operators, modules, presets, weights, training."""

from . import flops, ops  # noqa: F401  (flops registers its formulas)
from .model import MobileMamba
from .mrffi import MRFFI
from .ops import bidirectional_scan, depthwise_conv2d, haar_conv2d
from .presets import PRESETS
from .zoo import b1, b2, b4, create_model, list_models, nano, s6, t2, t4

__version__ = "0.1.0"

__all__ = [
    "MRFFI",
    "PRESETS",
    "MobileMamba",
    "b1",
    "b2",
    "b4",
    "bidirectional_scan",
    "create_model",
    "depthwise_conv2d",
    "haar_conv2d",
    "list_models",
    "nano",
    "ops",
    "s6",
    "t2",
    "t4",
]
