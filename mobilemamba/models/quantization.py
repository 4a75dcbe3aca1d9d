"""The ranges of the layers' inputs, from which 8-bit products get their scales."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import ConvNorm

__all__ = ["input_scales"]


@torch.no_grad()
def input_scales(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[float, int]]:
    """For each dense convolution with a norm but the first, by its name: scale and zero point of its input in 8 bits.

    Args:
        model: a network that is not fused, on the CPU.
        batches: images as the model gets them.

    Raises:
        ValueError: the model is fused or not on the CPU, or there are no images.
        FloatingPointError: an input of a layer is not finite.
    """
    first = next(model.parameters())
    if first.device.type != "cpu":
        raise ValueError(f"quantize: expected a model on the CPU, got one on {first.device}")
    observed = copy.deepcopy(model).eval()
    ranges: dict[str, tuple[float, float]] = {}
    layers = {name: m for name, m in observed.named_modules() if isinstance(m, ConvNorm) and m.conv.groups == 1}
    if not layers:
        raise ValueError("quantize: expected a model that is not fused, got one without convolutions before norms")
    layers.pop(next(iter(layers)))  # of images, whose few channels make rounding the larger part
    for name, layer in layers.items():
        layer.register_forward_pre_hook(_widen(name, ranges))
    for images in batches:
        observed(images)
    if not ranges:
        raise ValueError("quantize: batches has no images, expected some")
    return {name: scale_of(low, high) for name, (low, high) in ranges.items()}


def scale_of(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point for values from ``low`` to ``high``; 0 is always among them, and stays exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def _widen(name: str, ranges: dict[str, tuple[float, float]]) -> Callable[[nn.Module, Any], None]:
    """A hook that makes ``ranges[name]`` hold the layer's input."""

    def hook(layer: nn.Module, inputs: Any) -> None:
        low, high = (float(value) for value in inputs[0].aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise FloatingPointError(f"quantize: expected finite inputs of {name}, got a range of {low} to {high}")
        before = ranges.get(name, (low, high))
        ranges[name] = min(low, before[0]), max(high, before[1])

    return hook
