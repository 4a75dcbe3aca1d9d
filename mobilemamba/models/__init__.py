"""The network: its layers, its mixer, the backbone, and the presets."""

from .backbone import MobileMamba
from .cuda_graphs import CUDAGraphs
from .features import FeatureExtractor
from .mrffi import MRFFI
from .presets import PRESETS

__all__ = ["MRFFI", "PRESETS", "CUDAGraphs", "FeatureExtractor", "MobileMamba"]
