"""Finds the preset and the constructor arguments that fit weights, and checks the arguments that a file states."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..models import PRESETS, MobileMamba

__all__ = ["check_model_args", "fitting_presets", "guess_model_args"]

BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.")


def fitting_presets(state_dict: Mapping[str, Tensor]) -> list[str]:
    """The presets with the widths and depths of ``state_dict``. b1, b2 and b4 are one network, so all three fit."""
    blocks = {(int(match[1]), int(match[2])) for match in map(BLOCK.match, state_dict) if match}
    stages = range(1 + max((stage for stage, _ in blocks), default=-1))
    widths = tuple(_rows(state_dict.get(f"stages.{i}.blocks.0.mixer.proj.conv.weight")) for i in stages)
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in stages)
    return [name for name, args in PRESETS.items() if (args["widths"], args["depths"]) == (widths, depths)]


def guess_model_args(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that the shapes tell for every preset: heads, classes and image channels."""
    found: dict[str, Any] = {"distillation": "head.teacher.linear.weight" in state_dict}
    head = "head.labels.linear.weight" if found["distillation"] else "head.linear.weight"
    found["num_classes"] = _rows(state_dict.get(head))
    stem = state_dict.get("patch_embed.0.conv.weight")
    if stem is not None and stem.dim() == 4:
        found["in_chans"] = stem.shape[1]
    return found


def _rows(weight: Tensor | None) -> int:
    """Output channels; 0 for None. A scalar counts as 1: the check of all shapes refuses it later."""
    return 0 if weight is None else next(iter(weight.shape), 1)


def check_model_args(stated: Mapping[str, Any]) -> None:
    """Refuse everything in ``stated`` that is not an argument of :class:`MobileMamba`, since it comes from a file.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    kinds = typing.get_type_hints(MobileMamba.__init__)
    names = [name for name in inspect.signature(MobileMamba).parameters if name in kinds]
    for name, value in stated.items():
        if name not in names:
            raise ValueError(f"model_args: expected arguments of MobileMamba, got '{name!s:.100}'")
        if not _is_a(value, kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else kinds[name]
            raise ValueError(f"model_args: expected {name} of type {kind}, got {value!r:.100}")


def _is_a(value: object, kind: Any) -> bool:
    """Whether ``value`` has the annotated type ``kind``. JSON turns tuples into lists; an int may stand for a float.

    No value of a file is a function.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is_a(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is Callable:
        return False
    if parts := typing.get_args(kind):
        if not isinstance(value, (list, tuple)):
            return False
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(parts) == len(value) and all(map(_is_a, value, parts))
    return type(value) is kind or (kind is float and type(value) is int)
