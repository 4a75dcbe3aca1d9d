"""A checkpoint: weights by this package's names, and the facts about them. Copies weights into a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Preprocessing
from .identify import fitting_presets, guess_model_args
from .networks import find_network, without_wrappers

__all__ = ["Checkpoint", "describe_head", "differences", "load_into", "shorten"]

PathLike = str | os.PathLike[str]


@dataclass
class Checkpoint:
    """Weights, and the facts about them.

    Args:
        state_dict: tensors by this package's names.
        preset: name of the preset; None if it is unknown or the shapes fit several presets.
        model_args: arguments of :class:`MobileMamba` that differ from the preset's, such as ``num_classes``.
        labels: names of the classes.
        preprocessing: how the model expects its images.
        path: the file that the checkpoint was read from, for messages.
    """

    state_dict: dict[str, Tensor]
    preset: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    preprocessing: Preprocessing | None = None
    path: Path | None = field(default=None, compare=False)

    def meta(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {
            "preset": self.preset,
            "model_args": dict(self.model_args),
            "labels": None if self.labels is None else list(self.labels),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
        }


def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    allow_head_mismatch: bool = False,
    source: PathLike | None = None,
) -> None:
    """Copy ``state_dict`` into ``model``, or raise and copy nothing.

    Keys may have the prefixes of wrappers on both sides (``module.``, ``_orig_mod.``), and those of ``state_dict`` any
    prefix (``backbone.``). A parameter on the device ``meta`` gets memory on the device of the weights.

    Args:
        allow_head_mismatch: if the heads differ (another number of classes, or one head against two), keep the model's
            head instead of raising. A model without a head (``num_classes=0``) always ignores the head of the weights.
        source: file name for the message.

    Raises:
        ValueError: the weights do not fit, are on ``meta``, or would leave a part of the model there. The message, one
            line, names both presets if they differ, and otherwise the missing, unexpected and mis-shaped keys (at most
            ten of each).
    """
    prefix = f"{source}: " if source else ""
    tensors = model.state_dict()
    names = {without_wrappers(name): name for name in tensors}
    everything = {key: tensors[name] for key, name in names.items()}
    if state_dict.keys() != everything.keys():
        try:
            state_dict = find_network(state_dict)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error
    own, given = everything, dict(state_dict)
    drop_head = not any(map(_in_head, own))
    if allow_head_mismatch:
        drop_head |= {k: v.shape for k, v in own.items() if _in_head(k)} != {
            k: v.shape for k, v in given.items() if _in_head(k)
        }
    if drop_head:
        own, given = _body(own), _body(given)

    if counts := differences(own, given):
        expected, got = (" or ".join(fitting_presets(weights)) for weights in (everything, state_dict))
        if expected and got and expected != got:
            raise ValueError(f"{prefix}expected weights of {expected}, got weights of {got}")
        heads, hint = [describe_head(weights) for weights in (everything, state_dict)], ""
        if expected != got:
            fused = any(key.endswith(".ffn0.expand_weight") for key in given)
            got = got or ("a fused model; save those of the model before fuse()" if fused else "no known preset")
            hint = f": expected weights of {expected or 'no known preset'}, got weights of {got}"
        elif heads[0] != heads[1] and not differences(_body(own), _body(given)):
            hint = f": expected {heads[0]}, got {heads[1]} (allow_head_mismatch=True keeps the model's)"
        raise ValueError(f"{prefix}the weights do not fit the model{hint}; {counts}")
    if without_values := [key for key in own if given[key].is_meta]:
        raise ValueError(f"{prefix}expected weights with values, got tensors on meta: {shorten(without_values)}")
    if left := [key for key in everything if key not in own and everything[key].is_meta]:
        raise ValueError(
            f"{prefix}the weights do not fit the head, and the model's head is on meta, without values: "
            f"{shorten(left)}; make the model on another device"
        )
    with torch.no_grad():
        made = {
            key: torch.empty_like(tensor, device=given[key].device) for key, tensor in own.items() if tensor.is_meta
        }
        model.load_state_dict({names[key]: tensor for key, tensor in made.items()}, strict=False, assign=True)
        for key, tensor in own.items():
            made.get(key, tensor).copy_(given[key])


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps the weights ``given`` out of a model with the tensors ``own``: a text, which is empty if they fit.

    It has the missing, unexpected and mis-shaped keys, at most ten of each.
    """
    problems = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "mis-shaped": [
            f"{key} {_describe(given[key])} instead of {_describe(own[key])}"
            for key in own
            if key in given and _describe(given[key]) != _describe(own[key])
        ],
    }
    return "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys)


def _in_head(key: str) -> bool:
    return key.startswith("head.")


def _body(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_dict.items() if not _in_head(key)}


def _describe(tensor: Tensor) -> str:
    """The properties that must agree: the shape, and integers against floating point. Precision may differ."""
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else ' of integers'}"


def describe_head(state_dict: Mapping[str, Tensor]) -> str:
    """A text such as ``two heads of 1000 classes``."""
    args = guess_model_args(state_dict)
    return f"{'two heads' if args['distillation'] else 'a head'} of {args['num_classes']} classes"


def shorten(keys: list[str], limit: int = 10) -> str:
    """The first ``limit`` of ``keys``, and the number of the others."""
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
