"""The network: its layers, its mixer, the backbone, and the presets."""

from .backbone import MobileMamba
from .features import FeatureExtractor
from .mrffi import MRFFI
from .presets import PRESETS

__all__ = ["MRFFI", "PRESETS", "FeatureExtractor", "MobileMamba"]
