"""From a source to a checkpoint with all the facts that a model needs.

The steps are source (an entry of the table, or a path) -> file -> checkpoint -> model. This file has the first two;
``zoo`` makes the model.
"""

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from .cache import download
from .checkpoint import Checkpoint, load_into
from .formats import read
from .identify import fitting_presets
from .table import WeightsEntry, entry

__all__ = ["Source", "load", "load_pretrained", "locate"]

Source = WeightsEntry | str | os.PathLike[str]


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


def load_pretrained(
    model: nn.Module, name: str, pretrained: bool | str | os.PathLike[str], allow_head_mismatch: bool = False
) -> None:
    """Load weights into ``model``, which has the preset ``name``.

    Args:
        pretrained: True for the plain weights, ``"distilled"``, or the path of a checkpoint.
        allow_head_mismatch: keep the model's head if the head of the weights differs.

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
    stored = load(source, name)
    load_into(model, stored.state_dict, allow_head_mismatch=allow_head_mismatch, source=stored.path)
