"""Models by name: making them, with weights by name or from a file."""

import os
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from . import weights
from .models import PRESETS, MobileMamba
from .models.options import ModelOptions, with_model_options
from .models.presets import check_preset
from .weights.files import sha256

__all__ = ["b1", "b2", "b4", "convert", "create_model", "list_models", "nano", "open_model", "s6", "t2", "t4"]

Pretrained = bool | str | os.PathLike[str]


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return list(PRESETS)


@with_model_options()
def create_model(
    name: str, pretrained: Pretrained = False, *, allow_head_mismatch: bool = False, **options: Unpack[ModelOptions]
) -> MobileMamba:
    """Make a model by name.

    Args:
        name: one of :func:`list_models`.
        pretrained: True for the published plain weights (``nano``: those inside the package), ``"distilled"`` for the
            published distilled weights, or the path of a checkpoint.
        allow_head_mismatch: keep a fresh head where the head of the weights differs (other ``num_classes``, one head
            against two). By default that is an error.
        options: arguments of :class:`MobileMamba` that replace the preset's, such as ``num_classes``, ``in_chans``,
            ``distillation``, ``drop_path_rate``.

    Raises:
        ValueError: an unknown name (the message has the nearest names), or weights that do not fit.
    """
    check_preset(name)
    if pretrained == "distilled":
        options.setdefault("distillation", True)
    model = MobileMamba(**{**PRESETS[name], **options})
    if pretrained is not False:
        weights.load_pretrained(model, name, pretrained, allow_head_mismatch)
    return model


@with_model_options(PRESETS["nano"])
def nano(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """A small model for 28x28 grey images. Its Fashion-MNIST weights are part of the package."""
    return create_model("nano", pretrained, **options)


@with_model_options(PRESETS["t2"])
def t2(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-T2: 8.8 M parameters, 192 pixels."""
    return create_model("t2", pretrained, **options)


@with_model_options(PRESETS["t4"])
def t4(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-T4: 14.2 M parameters, 192 pixels."""
    return create_model("t4", pretrained, **options)


@with_model_options(PRESETS["s6"])
def s6(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-S6: 15.0 M parameters, 224 pixels."""
    return create_model("s6", pretrained, **options)


@with_model_options(PRESETS["b1"])
def b1(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-B1: 17.1 M parameters, 256 pixels."""
    return create_model("b1", pretrained, **options)


@with_model_options(PRESETS["b2"])
def b2(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-B2: the network of B1, trained for 384 pixels."""
    return create_model("b2", pretrained, **options)


@with_model_options(PRESETS["b4"])
def b4(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-B4: the network of B1, trained for 512 pixels."""
    return create_model("b4", pretrained, **options)


def open_model(source: weights.Source, preset: str | None = None) -> tuple[MobileMamba, weights.Checkpoint]:
    """The model of ``source``, and its checkpoint.

    Args:
        source: an entry of the table of weights (:func:`mobilemamba.weights.entry`), or the path of a checkpoint.
        preset: as for :func:`mobilemamba.weights.load`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, its preset is not known, or the weights do not fit the preset.
    """
    stored = weights.load(source, preset)
    assert stored.preset is not None
    model = create_model(stored.preset, **stored.model_args)
    weights.load_into(model, stored.state_dict, source=stored.path)
    return model, stored


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], preset: str | None = None
) -> dict[str, Any]:
    """Write the weights of any readable file in this package's format. They must fit the whole model.

    Args:
        preset: as for :func:`mobilemamba.weights.load`.

    Returns:
        ``preset``, ``model_args``, number of ``parameters`` and ``tensors``, and the ``sha256`` of ``target``.

    Raises:
        ValueError: as for :func:`open_model`, or ``target`` is the same file as ``source``.
    """
    model, stored = open_model(source, preset)
    if Path(target).exists() and os.path.samefile(source, target):
        raise ValueError(f"{target}: expected another file than the input, which is not overwritten")
    weights.save(target, stored)
    return {
        "preset": stored.preset,
        "model_args": stored.model_args,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(stored.state_dict),
        "sha256": sha256(target),
    }
