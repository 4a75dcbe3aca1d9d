"""Refuses outputs that are not finite, before they are gone: NaN is above no threshold and is no class."""

from typing import Any, TypeVar

from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["refuse_infinite"]

Model = TypeVar("Model", bound=nn.Module)

#: The modules whose outputs are logits or deltas: of all detectors and segmenters.
HEADS = ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "classifier")


def refuse_infinite(model: Model) -> Model:
    """``model``, a detector or segmenter, whose calls from now on raise FloatingPointError where a head gives NaN or
    infinity."""
    for name, part in model.named_modules():
        if name in HEADS:
            part.register_forward_hook(check)
    return model


def check(head: nn.Module, inputs: Any, outputs: Any) -> None:
    for values in tree_leaves(outputs):
        wrong = values[~values.isfinite()]
        if len(wrong):
            raise FloatingPointError(f"expected finite outputs of the model, got {float(wrong[0])}")
