"""The networks that have names: the published presets and ``nano``."""

import difflib
from typing import Any

__all__ = ["PRESETS", "check_preset"]

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


def check_preset(name: str) -> None:
    """Refuse a name that is not a preset's.

    Raises:
        ValueError: the message has the nearest names, and all of them.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown model '{name}'; {hint}expected one of {', '.join(PRESETS)}")
