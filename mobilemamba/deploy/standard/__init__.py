"""The network in standard operators of torch, for runtimes that do not have this package's operators."""

from .network import FeatureMaps, Logits, SegmenterLogits, portable

__all__ = ["FeatureMaps", "Logits", "SegmenterLogits", "portable"]
