"""Weights in files: reading any format that is known, fitting them to a model, and writing them atomically."""

import hashlib
import json
import os
import pickle
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import published
from .transforms import Preprocessing

__all__ = ["Checkpoint", "atomic_write", "convert", "guess_preset", "load_into", "read", "save", "sha256"]

PathLike = str | os.PathLike[str]

FORMAT = "mobilemamba"  # weights for inference
TRAINING_FORMAT = "mobilemamba-training"  # the state of a training run, written by train.py
VERSION = 1


@dataclass
class Checkpoint:
    """Weights, and what is known about them.

    Args:
        state_dict: tensors by this package's names.
        preset: name of the preset, None if not known.
        model_args: arguments of :class:`MobileMamba` that differ from the preset's, such as ``num_classes``.
        labels: names of the classes.
        preprocessing: how the model wants its images.
    """

    state_dict: dict[str, Tensor]
    preset: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    preprocessing: Preprocessing | None = None

    def meta(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {
            "preset": self.preset,
            "model_args": dict(self.model_args),
            "labels": None if self.labels is None else list(self.labels),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
        }


def read(path: PathLike) -> Checkpoint:
    """Read weights: safetensors or a torch file, of this package or published (their EMA weights where present).

    Nothing in the file is executed. The format is recognised by the content, not by the name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, one that needs code to load, or a newer version; the message names the file.
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
        if start.lstrip()[:1] == b"<":
            raise ValueError("expected a checkpoint, got an HTML or XML page")
        return _interpret(*(_read_safetensors(path) if start[8:9] == b"{" else _read_torch(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    """Tensors, and what :func:`save` stored beside them."""
    _, safe_open = _safetensors()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = (file.metadata() or {}).get(FORMAT)
        return tensors, None if meta is None else json.loads(meta)
    except Exception as error:  # safetensors raises an exception class of its own, and OSError
        raise ValueError(f"not a whole safetensors file: {_one_line(error)}") from error


def _read_torch(path: Path) -> tuple[dict[str, Any], Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked:
            raise ValueError(
                f"refused, because loading it would run code of its own ({blocked[1]}); expected only tensors and "
                "plain containers: save a state_dict() instead of a whole object"
            ) from error
        raise ValueError("expected a checkpoint (torch or safetensors), got something else") from error
    except Exception as error:  # torch.load documents none: broken zip files, ends of file, missing records, ...
        raise ValueError(f"not a whole torch file: {_one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict or a training checkpoint, got a {type(content).__name__}")
    kind = content.get("format")
    if kind in (FORMAT, TRAINING_FORMAT):
        meta = {"version": content.get("version"), **(content.get("meta") or {})}
        if kind == FORMAT:
            return content.get("state_dict"), meta
        return (content.get("model") if content.get("ema") is None else content.get("ema")), meta
    if "net" in content or "net_E" in content:  # published training checkpoints; net_E is the moving average
        content = content.get("net") if content.get("net_E") is None else content["net_E"]
    return content, None


def _interpret(tensors: Any, meta: Any) -> Checkpoint:
    """A checkpoint from tensors by any known names, and the stored meta data of this package's own files."""
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        keys = ", ".join(map(str, list(tensors)[:5])) if isinstance(tensors, Mapping) else type(tensors).__name__
        raise ValueError(f"expected a state dict of tensors, or one under 'net' or 'net_E', got {keys or 'nothing'}")
    state_dict = {str(key): tensor for key, tensor in tensors.items()}
    if all(key.startswith("module.") for key in state_dict):  # of a model inside DistributedDataParallel
        state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    if published.is_published(state_dict):
        state_dict = published.convert(state_dict)
    if meta is None:
        return Checkpoint(state_dict, guess_preset(state_dict), _guess_model_args(state_dict))
    version = meta.get("version") if isinstance(meta, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"expected version {VERSION} of the format, got {version!r}")
    if version > VERSION:
        raise ValueError(f"format version {version} is newer than the {VERSION} of this mobilemamba; upgrade it")
    fields = {name: meta.get(name) for name in ("preset", "model_args", "labels", "preprocessing")}
    for name, kind in (("preset", str), ("model_args", dict), ("labels", list), ("preprocessing", dict)):
        if not isinstance(fields[name], (kind, type(None))):
            raise ValueError(f"{name}: expected a {kind.__name__}, got {fields[name]!r:.100}")
    fields["model_args"] = fields["model_args"] or {}
    fields["preprocessing"] = fields["preprocessing"] and Preprocessing.from_dict(fields["preprocessing"])
    return Checkpoint(state_dict, **fields)


def guess_preset(state_dict: Mapping[str, Tensor]) -> str | None:
    """The preset with the widths and depths of ``state_dict`` (b1 for b1, b2 and b4, which are one network)."""
    from .presets import PRESETS  # not at the top: presets needs this module

    def block_count(stage: int) -> int:
        pattern = re.compile(rf"stages\.{stage}\.blocks\.(\d+)\.")
        return len({match[1] for match in map(pattern.match, state_dict) if match})

    projections = [state_dict.get(f"stages.{i}.blocks.0.mixer.proj.conv.weight") for i in range(3)]
    widths = tuple(0 if weight is None else weight.shape[0] for weight in projections)
    depths = tuple(map(block_count, range(3)))
    fitting = (name for name, args in PRESETS.items() if (args["widths"], args["depths"]) == (widths, depths))
    return next(fitting, None)


def _guess_model_args(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that can be seen from the shapes, whatever the preset."""
    found: dict[str, Any] = {"distillation": "head.teacher.linear.weight" in state_dict}
    head = state_dict.get("head.labels.linear.weight" if found["distillation"] else "head.linear.weight")
    stem = state_dict.get("patch_embed.0.conv.weight")
    found["num_classes"] = 0 if head is None else head.shape[0]
    if stem is not None and stem.dim() == 4:
        found["in_chans"] = stem.shape[1]
    return found


def load_into(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, allow_head_mismatch: bool = False, source: PathLike = ""
) -> None:
    """Copy ``state_dict`` into ``model``, all of it or nothing.

    Args:
        allow_head_mismatch: where the head differs (other classes, one head against two), leave the model's as it
            is instead of raising. A model without a head (``num_classes=0``) needs no such leave.
        source: file name for the message.

    Raises:
        ValueError: one line with every missing, unexpected and mis-shaped key (ten of each are named).
    """
    own = model.state_dict()
    given = dict(state_dict)
    drop_head = not any(map(_in_head, own))
    if allow_head_mismatch:
        drop_head |= {k: v.shape for k, v in own.items() if _in_head(k)} != {
            k: v.shape for k, v in given.items() if _in_head(k)
        }
    if drop_head:
        own, given = ({k: v for k, v in d.items() if not _in_head(k)} for d in (own, given))

    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    differing = [
        f"{key} {_describe(given[key])} instead of {_describe(own[key])}"
        for key in own
        if key in given and _describe(given[key]) != _describe(own[key])
    ]
    if missing or unexpected or differing:
        problems = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", differing))
        counts = "; ".join(f"{len(keys)} {what}: {_shorten(keys)}" for what, keys in problems if keys)
        hint = _mismatch_hint(model.state_dict(), state_dict, [*missing, *unexpected, *differing])
        raise ValueError(f"{f'{source}: ' if source else ''}the weights do not fit the model{hint}; {counts}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key])


def _in_head(key: str) -> bool:
    return key.startswith("head.")


def _describe(tensor: Tensor) -> str:
    """Shape, and the kind of number, which must agree too: float precision may differ, float against int may not."""
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else ' of integers'}"


def _shorten(keys: list[str], limit: int = 10) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _mismatch_hint(own: Mapping[str, Tensor], given: Mapping[str, Tensor], keys: list[str]) -> str:
    """What is probably wrong: another preset, or another head."""
    expected, got = guess_preset(own), guess_preset(given)
    if expected != got:
        return f": expected those of {expected or 'no known preset'}, got those of {got or 'no known preset'}"
    if all(map(_in_head, keys)):
        heads = []
        for args in map(_guess_model_args, (own, given)):
            heads.append(f"{'two heads' if args['distillation'] else 'a head'} of {args['num_classes']} classes")
        return f": expected {heads[0]}, got {heads[1]} (allow_head_mismatch=True keeps the model's)"
    return ""


def save(path: PathLike, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` as ``.safetensors``, ``.pt`` or ``.pth``, replacing the file only when all is written."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state_dict.items()}
    if path.suffix == ".safetensors":
        save_file, _ = _safetensors()
        # one key only: safetensors writes several in random order, and the same weights should be the same file
        metadata = {FORMAT: json.dumps({"version": VERSION, **checkpoint.meta()})}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))
    elif path.suffix in (".pt", ".pth"):
        content = {"format": FORMAT, "version": VERSION, "meta": checkpoint.meta(), "state_dict": tensors}
        atomic_write(path, lambda temporary: torch.save(content, temporary))
    else:
        raise ValueError(f"{path}: expected a name that ends with .safetensors, .pt or .pth")


def atomic_write(path: PathLike, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` with a path beside ``path``, then put that file in the place of ``path``.

    A reader sees the old file or the new one, whole, whenever the process or the machine stops.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def convert(source: PathLike, target: PathLike, preset: str | None = None) -> dict[str, Any]:
    """Write the weights of any readable file in this package's format, checked against the whole model first.

    Args:
        preset: the preset, needed to tell b2 and b4 from b1, or where the shapes are of no preset.

    Returns:
        ``preset``, ``model_args``, number of ``parameters`` and ``tensors``, and the ``sha256`` of ``target``.
    """
    from . import presets, weights  # not at the top: both need this module

    checkpoint = read(source)
    if Path(target).exists() and os.path.samefile(source, target):
        raise ValueError(f"{target}: expected another file than the input, which is not overwritten")
    checkpoint.preset = preset or checkpoint.preset
    if checkpoint.preset is None:
        raise ValueError(f"{source}: not of a known preset by its shapes; expected preset to be given")
    model = presets.create_model(checkpoint.preset, **checkpoint.model_args)
    load_into(model, checkpoint.state_dict, source=source)
    if checkpoint.preprocessing is None:
        checkpoint.preprocessing = weights.entry(checkpoint.preset).preprocessing
    save(target, checkpoint)
    return {
        "preset": checkpoint.preset,
        "model_args": checkpoint.model_args,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(checkpoint.state_dict),
        "sha256": sha256(target),
    }


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("safetensors files need the package safetensors: pip install safetensors") from error
    return save_file, safe_open


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
