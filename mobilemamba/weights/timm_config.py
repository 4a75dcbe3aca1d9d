"""Facts about weights as timm states them: ``pretrained_cfg``, and the file ``config.json`` of a model on the Hub."""

import math
from collections.abc import Mapping
from typing import Any

from ..data import Preprocessing
from ..models import PRESETS
from ..models.presets import check_preset
from .checkpoint import Checkpoint
from .table import entry

__all__ = ["ARCHITECTURE", "from_config", "pretrained_cfg", "to_config"]

#: What a preset's name has before it in timm's registry.
ARCHITECTURE = "mobilemamba_"

PATCH_STRIDES = (2, 2, 2, 2)  # of the presets that state none
PUBLISHED_CROP = 0.875  # the share of the resized image that the published models are evaluated on

#: Arguments that timm's class has and :class:`MobileMamba` has not, with the values that change nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {"global_pool": ("avg",), "drop_rate": (0, 0.0)}


def pretrained_cfg(preset: str, preprocessing: Preprocessing, num_classes: int, two_heads: bool) -> dict[str, Any]:
    """timm's description of weights, without the place where they are.

    Args:
        preset: name of the preset.
        preprocessing: how the weights expect their images.
        num_classes: classes of the head.
        two_heads: whether the head is that of distillation.

    Raises:
        ValueError: the preset is unknown.
    """
    check_preset(preset)
    stride = 4 * math.prod(PRESETS[preset].get("patch_strides", PATCH_STRIDES))  # two transitions halve the map
    side = -(-preprocessing.crop // stride)
    heads = ["head.labels.linear", "head.teacher.linear"]
    return {
        "num_classes": num_classes,
        "input_size": (preprocessing.channels, preprocessing.crop, preprocessing.crop),
        "pool_size": (side, side),
        "crop_pct": _crop_share(preprocessing.resize, preprocessing.crop),
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "first_conv": "patch_embed.0.conv",
        "classifier": tuple(heads) if two_heads else "head.linear",
        "license": "mit",
        "paper_ids": "arXiv:2411.15941",
        "paper_name": "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network",
    }


def _crop_share(resize: int, crop: int) -> float:
    """The share from which timm computes ``resize``: it takes the integer part of ``crop / share``."""
    for share in (PUBLISHED_CROP, crop / resize):
        if math.floor(crop / share) == resize:
            return share
    return crop / (resize + 0.5)  # crop / resize is rounded, and the quotient fell below `resize`


def to_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of ``config.json`` for a checkpoint whose preset is known. timm and transformers read it too.

    Raises:
        ValueError: the checkpoint has no preset, or an unknown one.
    """
    if checkpoint.preset is None:
        raise ValueError("preset: expected the name of a preset in the checkpoint, got None")
    check_preset(checkpoint.preset)
    args = dict(checkpoint.model_args)
    preset = PRESETS[checkpoint.preset]
    classes = args.pop("num_classes", preset.get("num_classes", 1000))  # transformers passes it beside the others
    config: dict[str, Any] = {
        "architecture": ARCHITECTURE + checkpoint.preset,
        "num_classes": classes,
        "num_features": args.get("widths", preset["widths"])[-1],
        "global_pool": "avg",
        "model_args": args,
    }
    if checkpoint.labels is not None:
        config["label_names"] = list(checkpoint.labels)
    preprocessing = checkpoint.preprocessing or entry(checkpoint.preset).preprocessing  # for the size
    cfg = pretrained_cfg(checkpoint.preset, preprocessing, classes, bool(args.get("distillation", False)))
    if checkpoint.preprocessing is None:
        channels = args.get("in_chans", preset.get("in_chans", 3))
        cfg["input_size"] = (channels, *cfg["input_size"][1:])
        for name in ("mean", "std", "crop_pct", "interpolation"):
            del cfg[name]
    config["pretrained_cfg"] = cfg
    return config


def from_config(config: Any) -> tuple[str, dict[str, Any], list[str] | None, Preprocessing | None]:
    """Preset, arguments of :class:`MobileMamba`, labels and preprocessing of a ``config.json``, also of timm's.

    Raises:
        ValueError: the file is of another model, or one of its values is not what is expected.
    """
    if not isinstance(config, Mapping) or not str(config.get("architecture")).startswith(ARCHITECTURE):
        name = config.get("architecture") if isinstance(config, Mapping) else config
        raise ValueError(f"architecture: expected one that starts with '{ARCHITECTURE}', got {name!r:.100}")
    preset = str(config["architecture"]).removeprefix(ARCHITECTURE)
    check_preset(preset)
    found = {name: config.get(name) for name in ("model_args", "label_names", "pretrained_cfg")}
    for name, kind in (("model_args", dict), ("label_names", list), ("pretrained_cfg", dict)):
        if not isinstance(found[name], (kind, type(None))):
            raise ValueError(f"{name}: expected a {kind.__name__}, got {found[name]!r:.100}")
    labels, cfg = found["label_names"], found["pretrained_cfg"]
    if labels is None and cfg is not None and isinstance(cfg.get("label_names"), list):
        labels = cfg["label_names"]
    if not all(isinstance(label, str) for label in labels or ()):
        raise ValueError(f"label_names: expected a list of names, got {labels!r:.100}")
    args = dict(found["model_args"] or {})
    for name, harmless in WITHOUT_EFFECT.items():
        if args.get(name, harmless[0]) not in harmless:
            raise ValueError(
                f"{name}: expected {harmless[0]!r}, got {args[name]!r:.100}, which timm's class takes only"
            )
        args.pop(name, None)
    if "num_classes" in config:
        args.setdefault("num_classes", config["num_classes"])
    return preset, args, labels, _preprocessing(cfg) if cfg and "mean" in cfg else None


def _preprocessing(cfg: Mapping[str, Any]) -> Preprocessing:
    """Raises ValueError if a value is missing or not what is expected."""
    try:
        _, height, width = cfg["input_size"]
        resize = math.floor(height / cfg["crop_pct"])
        fields = {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"]), "interpolation": cfg["interpolation"]}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        expected = "input_size, crop_pct, mean, std and interpolation"
        raise ValueError(f"pretrained_cfg: expected {expected}, got {cfg!r:.300}") from error
    if height != width:
        raise ValueError(f"pretrained_cfg: expected a square input_size, got {cfg['input_size']!r:.100}")
    return Preprocessing(resize=resize, crop=height, **fields)
