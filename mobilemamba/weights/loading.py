"""From a source to a checkpoint with all the facts that a model needs.

The steps are source (an entry of the table, or a path) -> file -> checkpoint -> model. This file has the first two;
``zoo`` makes the model.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..models import MobileMamba
from .cache import download
from .checkpoint import Checkpoint, describe_head, load_into
from .formats import read
from .identify import fitting_presets
from .table import WeightsEntry, entry

__all__ = ["Source", "adapt_channels", "load", "load_pretrained", "locate"]

Source = WeightsEntry | str | os.PathLike[str]

FIRST_WEIGHT = "patch_embed.0.conv.weight"  # (widths, image channels, 3, 3)


def locate(source: Source) -> Path:
    """The file of ``source``. An entry of the table is downloaded if it is not in the cache.

    Raises:
        OSError, ValueError: as :func:`download`.
    """
    return download(source) if isinstance(source, WeightsEntry) else Path(source)


def load(source: Source, preset: str | None = None) -> Checkpoint:
    """Read the checkpoint of ``source``. The result has a preset.

    If the file states no preprocessing, the result has the preset's. It has none if the preset's is for another number
    of image channels than the weights.

    Args:
        source: an entry of the table of weights, or the path of a checkpoint.
        preset: name of the preset. It is needed if the file states none and the shapes fit several (b1, b2 and b4 are
            one network) or none. It replaces another preset that the file states, and then also the preprocessing.

    Raises:
        OSError: no such file, or the download failed.
        ValueError: the file is not a checkpoint, or its preset is unknown.
    """
    stored = read(locate(source))
    if isinstance(source, WeightsEntry):
        return replace(stored, preset=source.preset, labels=list(source.labels), preprocessing=source.preprocessing)
    name = preset or stored.preset
    if name is None:
        fitting = fitting_presets(stored.state_dict)
        fit = f"fit {' or '.join(fitting)}, which are one network" if fitting else "fit no known preset"
        raise ValueError(f"{stored.path}: the weights {fit}; expected the model to be named (--model)")
    known = entry(name)
    if stored.preprocessing is None or stored.preset not in (None, name):
        channels = stored.model_args.get("in_chans", known.preprocessing.channels)
        fits = channels == known.preprocessing.channels
        stored = replace(stored, preprocessing=known.preprocessing if fits else None)
    return replace(stored, preset=name)


def adapt_channels(checkpoint: Checkpoint, channels: int) -> Checkpoint:
    """``checkpoint`` for images of ``channels`` channels; ``checkpoint`` itself if it has that number.

    For one channel, the kernels of the first convolution are summed: a grey image gives what it gave in all channels.
    For other numbers they are repeated (R, G, B, R, ...) and scaled by old / new channels, which keeps the outputs'
    scale. The preprocessing goes along: for one channel the averages of ``mean`` and of ``std``, otherwise their values
    repeated in the same order.
    """
    weight = checkpoint.state_dict.get(FIRST_WEIGHT)
    if weight is None or weight.dim() != 4 or weight.shape[1] in (0, channels):
        return checkpoint
    old = weight.shape[1]
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # 16 bits would round the scaled kernels
    if channels == 1:
        adapted = weight.sum(1, keepdim=True)
    else:
        adapted = weight[:, [channel % old for channel in range(channels)]] * (old / channels)
    preprocessing = checkpoint.preprocessing
    if preprocessing is not None:
        preprocessing = replace(
            preprocessing, mean=_spread(preprocessing.mean, channels), std=_spread(preprocessing.std, channels)
        )
    return replace(
        checkpoint,
        state_dict={**checkpoint.state_dict, FIRST_WEIGHT: adapted},
        model_args={**checkpoint.model_args, "in_chans": channels},
        preprocessing=preprocessing,
    )


def _spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A value for each of ``channels`` channels, from values for another number of channels."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))


def load_pretrained(
    model: MobileMamba, name: str, pretrained: bool | str | os.PathLike[str], allow_head_mismatch: bool = False
) -> Checkpoint:
    """Load weights into ``model``, which has the preset ``name``.

    If the model has another number of image channels than the weights, they are adapted (:func:`adapt_channels`). This
    and a new head are said on stderr, a line each.

    Args:
        pretrained: True for the plain weights, ``"distilled"``, or the path of a checkpoint.
        allow_head_mismatch: keep the model's head if the head of the weights differs.

    Returns:
        The checkpoint as it was loaded. Its preprocessing has the model's number of channels.

    Raises:
        OSError: ``pretrained`` is a path without a file, or the download failed.
        ValueError: ``pretrained`` is something else, or the weights do not fit.
    """
    source: Source
    if pretrained is True or pretrained == "distilled":
        source = entry(name, distilled=pretrained == "distilled")
    elif isinstance(pretrained, (str, os.PathLike)):
        source = Path(pretrained)
        if not source.exists():
            raise FileNotFoundError(
                f"pretrained: expected True, 'distilled' or a checkpoint, got '{source}', which is not a file"
            )
    else:
        raise ValueError(f"pretrained: expected True, False, 'distilled' or a path, got {pretrained!r}")
    found = load(source, name)
    stored = adapt_channels(found, model.in_chans)
    load_into(model, stored.state_dict, allow_head_mismatch=allow_head_mismatch, source=stored.path)
    if stored is not found:
        old, new = found.state_dict[FIRST_WEIGHT].shape[1], model.in_chans
        how = "are summed" if new == 1 else f"are repeated and scaled by {old}/{new}"
        print(f"{stored.path}: the weights are for {old}-channel images; their kernels {how}", file=sys.stderr)
    heads = [describe_head(tensors) for tensors in (stored.state_dict, model.state_dict())]
    if model.num_classes and heads[0] != heads[1]:
        print(f"{stored.path}: {heads[0]}; replaced by a new head: {heads[1]}", file=sys.stderr)
    return stored
