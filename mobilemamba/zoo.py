"""Makes models by name, with weights by name or from a file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from . import weights
from .models import PRESETS, FeatureExtractor, MobileMamba
from .models.options import ModelOptions, with_model_options
from .models.presets import check_preset
from .weights.files import sha256

__all__ = [
    "b1",
    "b2",
    "b4",
    "convert",
    "create_model",
    "feature_extractor",
    "list_models",
    "nano",
    "open_model",
    "s6",
    "t2",
    "t4",
]

Pretrained = bool | str | os.PathLike[str]


def list_models() -> list[str]:
    """The names that :func:`create_model` takes."""
    return list(PRESETS)


@with_model_options()
def create_model(
    name: str, pretrained: Pretrained = False, *, allow_head_mismatch: bool = False, **options: Unpack[ModelOptions]
) -> MobileMamba:
    """Make a model by name.

    Args:
        name: one of :func:`list_models`.
        pretrained: False for random weights, True for the published plain weights (for ``nano``, those in the package),
            ``"distilled"`` for the published distilled weights, or the path of a checkpoint.
        allow_head_mismatch: keep the random head if the head of the weights differs (another ``num_classes``, or one
            head against two), and say so in a line on stderr. By default that is an error.
        options: arguments of :class:`MobileMamba` that replace the preset's, such as ``num_classes``, ``in_chans``,
            ``distillation``, ``drop_path_rate``. ``pretrained="distilled"`` makes ``distillation`` True. With another
            ``in_chans`` than that of the weights, their first convolution is adapted
            (:func:`mobilemamba.weights.adapt_channels`).

    Raises:
        ValueError: the name is unknown (the message has the nearest names), an option is out of its range, or the
            weights do not fit.
        TypeError: an option has an unknown name.
        OSError: ``pretrained`` is a path without a file, or the download failed.
    """
    check_preset(name)
    if pretrained == "distilled":
        options.setdefault("distillation", True)
    model = MobileMamba(**{**PRESETS[name], **options})
    if pretrained is not False:
        weights.load_pretrained(model, name, pretrained, allow_head_mismatch)
    return model


@with_model_options(without=("num_classes", "distillation"))
def feature_extractor(
    name: str,
    pretrained: Pretrained = False,
    *,
    stages: Sequence[int] | None = None,
    norm_eval: bool = False,
    frozen_stages: int = -1,
    **options: Unpack[ModelOptions],
) -> FeatureExtractor:
    """Make a backbone for detection or segmentation by name: images -> ``OrderedDict`` of feature maps.

    :class:`FeatureExtractor` documents the result, and how to get timm's list.

    Args:
        name, pretrained: as for :func:`create_model`. The head of the weights is left out.
        stages, norm_eval, frozen_stages: as for :class:`FeatureExtractor`.
        options: arguments of :class:`MobileMamba` that replace the preset's, but for those of the head.

    Raises:
        OSError, TypeError, ValueError: as for :func:`create_model`; an argument is out of its range.
    """
    for option in ("num_classes", "distillation"):
        if option in options:
            raise TypeError(f"feature_extractor: expected no {option}: feature maps come before the head")
    options["num_classes"] = 0
    model = create_model(name, pretrained, **options)
    return FeatureExtractor(model, stages, norm_eval=norm_eval, frozen_stages=frozen_stages)


@with_model_options(PRESETS["nano"])
def nano(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-nano: 0.86 M parameters, grey images of 28 pixels. Its Fashion-MNIST weights are in the package."""
    return create_model("nano", pretrained, **options)


@with_model_options(PRESETS["t2"])
def t2(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-T2: 8.8 M parameters, trained for 192 pixels."""
    return create_model("t2", pretrained, **options)


@with_model_options(PRESETS["t4"])
def t4(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-T4: 14.2 M parameters, trained for 192 pixels."""
    return create_model("t4", pretrained, **options)


@with_model_options(PRESETS["s6"])
def s6(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-S6: 15.0 M parameters, trained for 224 pixels."""
    return create_model("s6", pretrained, **options)


@with_model_options(PRESETS["b1"])
def b1(pretrained: Pretrained = False, **options: Unpack[ModelOptions]) -> MobileMamba:
    """MobileMamba-B1: 17.1 M parameters, trained for 256 pixels."""
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
    """Make the model of ``source`` with its weights; returns the model and the checkpoint.

    Args:
        source: an entry of the table of weights (:func:`mobilemamba.weights.entry`), or the path of a checkpoint.
        preset: as for :func:`mobilemamba.weights.load`.

    Raises:
        OSError: no such file, or the download failed.
        ValueError: the file is not a checkpoint, its preset is unknown, or the weights do not fit the preset.
    """
    stored = weights.load(source, preset)
    assert stored.preset is not None
    model = create_model(stored.preset, **stored.model_args)
    weights.load_into(model, stored.state_dict, source=stored.path)
    return model, stored


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], preset: str | None = None
) -> dict[str, Any]:
    """Write the weights of any readable checkpoint in this package's format. They must fill the whole model.

    Args:
        source: the checkpoint.
        target: the file to write; its name ends with ``.safetensors``, ``.pt`` or ``.pth``.
        preset: as for :func:`mobilemamba.weights.load`.

    Returns:
        A dict with ``preset``, ``model_args``, the number of ``parameters`` and of ``tensors``, and the ``sha256`` of
        ``target``.

    Raises:
        FileNotFoundError: no such file as ``source``.
        ValueError: as for :func:`open_model`; or ``target`` is the same file as ``source``, or its name has another
            ending.
    """
    model, stored = open_model(source, preset)
    if Path(target).exists() and os.path.samefile(source, target):
        raise ValueError(f"{target}: expected another file than the input: the input is not overwritten")
    weights.save(target, stored)
    return {
        "preset": stored.preset,
        "model_args": stored.model_args,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(stored.state_dict),
        "sha256": sha256(target),
    }
