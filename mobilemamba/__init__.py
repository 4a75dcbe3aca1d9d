"""MobileMamba (CVPR 2025) as a C++/CUDA extension of PyTorch: operators, models, weights, training, detectors."""

from . import data, deploy, downstream, models, ops, training, weights
from .deploy import export
from .models import MRFFI, PRESETS, CUDAGraphs, FeatureExtractor, MobileMamba
from .ops import bidirectional_scan, depthwise_conv2d, haar_conv2d
from .zoo import b1, b2, b4, create_model, feature_extractor, list_models, nano, open_model, s6, t2, t4

__version__ = "0.1.0"

__all__ = [
    "MRFFI",
    "PRESETS",
    "CUDAGraphs",
    "FeatureExtractor",
    "MobileMamba",
    "b1",
    "b2",
    "b4",
    "bidirectional_scan",
    "create_model",
    "data",
    "deploy",
    "depthwise_conv2d",
    "downstream",
    "export",
    "feature_extractor",
    "haar_conv2d",
    "list_models",
    "models",
    "nano",
    "open_model",
    "ops",
    "s6",
    "t2",
    "t4",
    "training",
    "weights",
]
