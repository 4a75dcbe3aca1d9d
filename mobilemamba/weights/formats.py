"""Checkpoint files: reads every known format, and writes this package's format atomically."""

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch

from ..data import Preprocessing
from ..data.imagenet import IMAGENET_LABELS
from . import published
from .checkpoint import Checkpoint
from .files import atomic_write, is_page, torch_save
from .identify import check_model_args, fitting_presets, guess_model_args
from .networks import find_network

__all__ = ["DOWNSTREAM_FORMAT", "TRAINING_FORMAT", "VERSION", "load_torch", "read", "save"]

PathLike = str | os.PathLike[str]

FORMAT = "mobilemamba"  # weights for inference
DOWNSTREAM_FORMAT = "mobilemamba-downstream"  # a detector or segmenter for inference, of downstream/checkpoint.py
TRAINING_FORMAT = "mobilemamba-training"  # the state of a training run, written by training/run.py
VERSION = 1


def read(path: PathLike) -> Checkpoint:
    """Read a checkpoint: safetensors or a torch file, of this package, a published one, or another trainer's.

    The network may be inside other dicts (``state_dict``, ``model``, ...), and its keys may have a prefix (``module.``,
    ``_orig_mod.``, ``backbone.``, ...). A training checkpoint gives its moving average of the weights, if it has one.
    A published checkpoint with 1000 classes gets the names of ImageNet's. Code in the file is never run. The content
    tells the format, not the name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, has several networks, needs code to load, has a newer version, or is a
            detector or segmenter of this package; the message names it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, got a folder")
    with path.open("rb") as file:
        start = file.read(64)
    try:
        if not start:
            raise ValueError("expected a checkpoint, got an empty file")
        if start[8:9] == b"{":  # the header follows 8 bytes with its length, which may look like a page
            return replace(_interpret(*_read_safetensors(path)), path=path)
        if is_page(start):
            raise ValueError("expected a checkpoint, got an HTML or XML page")
        return replace(_interpret(*_read_torch(path)), path=path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    """Tensors, and the facts that :func:`save` stored beside them."""
    _, safe_open = _safetensors()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = (file.metadata() or {}).get(FORMAT)
        return tensors, None if meta is None else json.loads(meta)
    except Exception as error:  # safetensors raises an exception class of its own, and OSError
        raise ValueError(f"expected a complete safetensors file, got a damaged one: {_one_line(error)}") from error


def load_torch(path: Path) -> Any:
    """The object that ``torch.save`` stored, if it consists of tensors and plain containers.

    Raises:
        ValueError: the file holds other objects, or is not torch's; one line, without the name of the file.
    """
    with path.open("rb") as file:
        if file.read(2) not in (b"PK", b"\x80\x02"):  # a zip archive, and torch's format before 1.6
            raise ValueError("expected a checkpoint (torch or safetensors), got something else")
    if _is_torchscript(path):
        raise ValueError("expected a checkpoint, got a TorchScript program; save the state_dict() of its model instead")
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked:
            raise ValueError(
                f"expected only tensors and plain containers, got an object whose loading runs code ({blocked[1]}): "
                "save the state_dict() instead of the object"
            ) from error
        raise ValueError("expected a checkpoint (torch or safetensors), got something else") from error
    except Exception as error:  # torch.load documents no errors: broken zip files, ends of file, missing records, ...
        raise ValueError(f"expected a complete torch file, got a damaged one: {_one_line(error)}") from error


class _Ignored:
    """Stands for a class of a framework that is not installed, and that weights do not depend on."""

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_classes() -> list[Any]:
    """What trainers store beside weights and torch does not know as plain: options, paths, numpy's values, logs."""
    scalar, array = (
        np.float64(0).__reduce__()[0],
        np.zeros(0).__reduce__()[0],
    )  # numpy 1 has another name for the module
    kinds = (np.bool_, np.int32, np.int64, np.float32, np.float64)
    return [
        *(argparse.Namespace, PosixPath, np.dtype, *(type(np.dtype(kind)) for kind in kinds)),
        *((scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
        *((array, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
        *(np.ndarray, (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer")),
    ]


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.match(r"[^/]+/(code/|constants\.pkl$)", name) for name in archive.namelist())
    except Exception:  # damaged, or in another format: torch.load reports it
        return False


def _read_torch(path: Path) -> tuple[Any, Any]:
    """Tensors by any known names, and the facts that :func:`save` or the training loop stored; None in other files."""
    content = load_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict or a training checkpoint, got a {type(content).__name__}")
    kind = content.get("format")
    if kind in (FORMAT, TRAINING_FORMAT, DOWNSTREAM_FORMAT):
        meta = content.get("meta")
        if not isinstance(meta, dict):
            raise ValueError(f"meta: expected a dict, got {meta!r:.100}")
        if kind == DOWNSTREAM_FORMAT or "kind" in meta:
            raise ValueError(
                f"expected a classifier's weights, got a detector or segmenter ({meta.get('kind')!s:.100}): "
                "use mobilemamba detect or segment, in Python mobilemamba.downstream.open_model"
            )
        meta = {**meta, "version": content.get("version")}
        if kind == FORMAT:
            return content.get("state_dict"), meta
        return (content.get("model") if content.get("ema") is None else content.get("ema")), meta
    return content, None


def _interpret(tensors: Any, meta: Any) -> Checkpoint:
    """A checkpoint from tensors by any known names, and the facts ``meta`` of this package's own files."""
    if not isinstance(tensors, Mapping):
        raise ValueError(f"expected a state dict of tensors, got {type(tensors).__name__}")
    state_dict = find_network(tensors)
    if is_published := published.is_published(state_dict):
        state_dict = published.convert(state_dict)
    if meta is None:
        fitting, args = fitting_presets(state_dict), guess_model_args(state_dict)
        is_imagenet = is_published and args["num_classes"] == len(IMAGENET_LABELS)
        labels = list(IMAGENET_LABELS) if is_imagenet else None
        return Checkpoint(state_dict, fitting[0] if len(fitting) == 1 else None, args, labels)
    version = meta.get("version") if isinstance(meta, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"expected version {VERSION} of the format, got {version!r}")
    if version > VERSION:
        raise ValueError(f"expected at most version {VERSION} of the format, got {version}; upgrade mobilemamba")
    fields = {name: meta.get(name) for name in ("preset", "model_args", "labels", "preprocessing")}
    for name, kind in (("preset", str), ("model_args", dict), ("labels", list), ("preprocessing", dict)):
        if not isinstance(fields[name], (kind, type(None))):
            raise ValueError(f"{name}: expected a {kind.__name__}, got {fields[name]!r:.100}")
    if not all(isinstance(label, str) for label in fields["labels"] or ()):
        raise ValueError(f"labels: expected a list of names, got {fields['labels']!r:.100}")
    fields["model_args"] = fields["model_args"] or {}
    check_model_args(fields["model_args"])
    fields["preprocessing"] = fields["preprocessing"] and Preprocessing.from_dict(fields["preprocessing"])
    return Checkpoint(state_dict, **fields)


def save(path: PathLike, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` atomically: an older file at ``path`` is replaced once the new one is complete.

    Args:
        path: its ending chooses the format: ``.safetensors``, ``.pt`` or ``.pth``.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ValueError: ``path`` has another ending, the package safetensors is missing, the preprocessing has another
            number of channels than the weights, or the mixer is a function, which no file stores.
    """
    path = Path(path)
    if callable(mixer := checkpoint.model_args.get("mixer")):
        raise ValueError(f"{path}: model_args: expected the name of a mixer, got {mixer!r:.100}, which no file stores")
    channels = guess_model_args(checkpoint.state_dict).get("in_chans")
    if checkpoint.preprocessing is not None and channels is not None:
        checkpoint.preprocessing.check_channels(channels)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state_dict.items()}
    if path.suffix == ".safetensors":
        to_bytes, _ = _safetensors()
        # only one key: safetensors writes several keys in random order, and equal weights should give equal files
        metadata = {FORMAT: json.dumps({"version": VERSION, **checkpoint.meta()})}
        atomic_write(path, lambda temporary: temporary.write_bytes(to_bytes(tensors, metadata)))
    elif path.suffix in (".pt", ".pth"):
        content = {"format": FORMAT, "version": VERSION, "meta": checkpoint.meta(), "state_dict": tensors}
        atomic_write(path, lambda temporary: torch_save(content, temporary))
    else:
        raise ValueError(f"{path}: expected a name that ends with .safetensors, .pt or .pth")


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import save as to_bytes
    except ImportError as error:
        raise ValueError("safetensors files need the package safetensors: pip install safetensors") from error
    return to_bytes, safe_open


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
