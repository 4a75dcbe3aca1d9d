"""The published presets and ``nano``, and the functions that make them."""

import difflib
import os
from typing import Any

from . import weights
from .model import MobileMamba

__all__ = ["PRESETS", "b1", "b2", "b4", "create_model", "list_models", "nano", "s6", "t2", "t4"]

_B: dict[str, Any] = {"widths": (200, 376, 448), "depths": (2, 3, 2), "drop_path_rate": 0.03}

#: Constructor arguments of :class:`MobileMamba` for each preset (image sizes are with the weights).
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "num_classes": 10,
        "in_chans": 1,
        "widths": (48, 96, 128),
        "depths": (1, 2, 1),
        "wavelet_kernels": (5, 3, 3),
        "local_kernels": ((5,), (3,), (3,)),
        "patch_strides": (1, 2, 2),
    },
    "t2": {"widths": (144, 272, 368), "depths": (1, 2, 2)},
    "t4": {"widths": (176, 368, 448), "depths": (1, 2, 2)},
    "s6": {"widths": (192, 384, 448), "depths": (1, 2, 2)},
    "b1": _B,
    "b2": _B,
    "b4": _B,
}


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
