"""From a source to a checkpoint with everything known that a model needs.

The way of a model's name: source (an entry of the table, or a path) -> file -> checkpoint -> model. This file has the
first two steps; ``zoo`` builds the model.
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
    """The file of ``source``. An entry of the table is downloaded where it is not in the cache yet.

    Raises:
        OSError, ValueError: as :func:`download`.
    """
    return download(source) if isinstance(source, WeightsEntry) else Path(source)


def load(source: Source, preset: str | None = None) -> Checkpoint:
    """Read the checkpoint of ``source``; its preset and its preprocessing are known.

    Args:
        preset: the preset. It is needed where the shapes fit several presets (b1, b2 and b4 are one network) or none.
            It overrides the preset that the file states, together with that preset's preprocessing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, or its preset is not known.
    """
    stored = read(locate(source))
    if isinstance(source, WeightsEntry):
        labels = list(source.labels) if source.labels else None
        return replace(stored, preset=source.preset, labels=labels, preprocessing=source.preprocessing)
    name = preset or stored.preset
    if name is None:
        fitting = fitting_presets(stored.state_dict)
        which = f"of {' or '.join(fitting)}, which are one network" if fitting else "of no known preset by their shapes"
        raise ValueError(f"{stored.path}: the weights are {which}; expected the model to be named (--model)")
    known = entry(name)
    if stored.preprocessing is None or stored.preset not in (None, name):
        stored = replace(stored, preprocessing=known.preprocessing)
    return replace(stored, preset=name)


def load_pretrained(
    model: nn.Module, name: str, pretrained: bool | str | os.PathLike[str], allow_head_mismatch: bool = False
) -> None:
    """Load weights into the model of preset ``name``.

    Args:
        pretrained: True for the plain weights, ``"distilled"``, or the path of a checkpoint.
        allow_head_mismatch: keep the model's head where the head of the weights differs.

    Raises:
        FileNotFoundError: ``pretrained`` is a path without a file.
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
