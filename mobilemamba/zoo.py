"""Models by name: making them, with weights by name or from a file."""

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint, weights
from .files import sha256
from .identify import fitting_presets
from .model import MobileMamba
from .presets import PRESETS

__all__ = ["b1", "b2", "b4", "convert", "create_model", "list_models", "nano", "open_model", "s6", "t2", "t4"]


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return list(PRESETS)


def create_model(
    name: str, pretrained: bool | str | os.PathLike[str] = False, *, allow_head_mismatch: bool = False, **kwargs: Any
) -> MobileMamba:
    """Make a model by name.

    Args:
        name: one of :func:`list_models`.
        pretrained: True for the published plain weights (for ``nano`` the ones inside the package), ``"distilled"``
            for the published distilled ones, or the path of a checkpoint.
        allow_head_mismatch: where the head of the weights is another one (other ``num_classes``, one head against
            two), keep a fresh head instead of raising.
        kwargs: arguments of :class:`MobileMamba` that replace the preset's, such as ``num_classes``, ``in_chans``,
            ``distillation``, ``drop_path_rate``.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), or weights that do not fit.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown model '{name}'; {hint}expected one of {', '.join(PRESETS)}")
    if pretrained == "distilled":
        kwargs.setdefault("distillation", True)
    model = MobileMamba(**{**PRESETS[name], **kwargs})
    if pretrained is not False:
        weights.load_pretrained(model, name, pretrained, allow_head_mismatch)
    return model


def nano(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """A small model for 28x28 grey images, whose Fashion-MNIST weights are part of the package."""
    return create_model("nano", pretrained, **kwargs)


def t2(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """MobileMamba-T2: 8.8 M parameters, 192 pixels."""
    return create_model("t2", pretrained, **kwargs)


def t4(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """MobileMamba-T4: 14.2 M parameters, 192 pixels."""
    return create_model("t4", pretrained, **kwargs)


def s6(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """MobileMamba-S6: 15.0 M parameters, 224 pixels."""
    return create_model("s6", pretrained, **kwargs)


def b1(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """MobileMamba-B1: 17.1 M parameters, 256 pixels."""
    return create_model("b1", pretrained, **kwargs)


def b2(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """MobileMamba-B2: the network of B1 trained for 384 pixels."""
    return create_model("b2", pretrained, **kwargs)


def b4(pretrained: bool | str = False, **kwargs: Any) -> MobileMamba:
    """MobileMamba-B4: the network of B1 trained for 512 pixels."""
    return create_model("b4", pretrained, **kwargs)


def open_model(source: str | os.PathLike[str], preset: str | None = None) -> tuple[MobileMamba, checkpoint.Checkpoint]:
    """The model in a file, and the file's content with preset and preprocessing known.

    Args:
        preset: the preset, needed where the shapes fit several (b1, b2 and b4 are one network) or none. What the file
            says of another preset, and of its preprocessing, gives way.
    """
    stored = checkpoint.read(source)
    name = preset or stored.preset
    if name is None:
        fitting = fitting_presets(stored.state_dict)
        which = f"of {' or '.join(fitting)}, which are one network" if fitting else "of no known preset by their shapes"
        raise ValueError(f"{source}: the weights are {which}; expected the model to be named (--model)")
    model = create_model(name, **stored.model_args)
    checkpoint.load_into(model, stored.state_dict, source=source)
    if stored.preprocessing is None or stored.preset not in (None, name):
        return model, replace(stored, preset=name, preprocessing=weights.entry(name).preprocessing)
    return model, replace(stored, preset=name)


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], preset: str | None = None
) -> dict[str, Any]:
    """Write the weights of any readable file in this package's format, checked against the whole model first.

    Args:
        preset: as for :func:`open_model`.

    Returns:
        ``preset``, ``model_args``, number of ``parameters`` and ``tensors``, and the ``sha256`` of ``target``.
    """
    model, stored = open_model(source, preset)
    if Path(target).exists() and os.path.samefile(source, target):
        raise ValueError(f"{target}: expected another file than the input, which is not overwritten")
    checkpoint.save(target, stored)
    return {
        "preset": stored.preset,
        "model_args": stored.model_args,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(stored.state_dict),
        "sha256": sha256(target),
    }
