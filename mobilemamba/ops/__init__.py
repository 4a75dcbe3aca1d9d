"""The native operators, and what they cost in floating-point operations."""

from . import counting  # noqa: F401  (registers the formulas with torch's counter)
from .operators import (
    MRFFI_WEIGHTS,
    backbone,
    bidirectional_scan,
    conv_norm,
    depthwise_conv2d,
    ffn,
    ffn_norm,
    haar_conv2d,
    mrffi,
    patch_embedding,
    patch_merging,
)
from .packed import pack_conv2d_weight, packed_conv2d, quantize_conv2d_weight

__all__ = [
    "MRFFI_WEIGHTS",
    "backbone",
    "bidirectional_scan",
    "conv_norm",
    "depthwise_conv2d",
    "ffn",
    "ffn_norm",
    "haar_conv2d",
    "mrffi",
    "pack_conv2d_weight",
    "packed_conv2d",
    "patch_embedding",
    "patch_merging",
    "quantize_conv2d_weight",
]
