"""The networks that have names: the published presets and ``nano``."""

from typing import Any

__all__ = ["PRESETS"]

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
