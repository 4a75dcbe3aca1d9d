"""The parity figures of the published segmenters' necks and heads, and how their weights and inputs are filled.

A case is the published keys with their shapes, and figures by name, for two sets of feature maps, ``even`` and ``odd``:

- ``WHICH/{neck/i,logits,aux_logits,resized_logits,pred/i}``: in evaluation; ``resized_logits`` have the images' size,
  ``pred`` are the classes at the original images' size. Arrays are stored as ``shape``, ``sum``, ``abssum``, ``sub``.
- ``odd/{train,eval}/...``: losses, norms of gradients by published key, norms of updated statistics.

All figures lie outside the repository (``MOBILEMAMBA_DOWNSTREAM_PARITY``). ``MOBILEMAMBA_PARITY_SALT`` names their filling.
``parity/segmenters/*.json`` are the leading values, written by ``python tests/segmenter_figures.py``.
"""

import json
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import HERE, flatten, make_input, parameter, put
from torch import Tensor, nn

from mobilemamba.downstream.published_segmenters import RULES

FULL = Path(os.environ.get("MOBILEMAMBA_DOWNSTREAM_PARITY") or HERE.parent.parent / "shared" / "downstream")
SMALL = HERE / "parity" / "segmenters"
SALT = os.environ.get("MOBILEMAMBA_PARITY_SALT", "")
NAMES = {"semfpn": "semantic_fpn", "deeplabv3": "deeplabv3", "pspnet": "pspnet"}
ZERO = 1e-12  # a norm under this is zero in exact arithmetic

#: For each set: batch, sizes of the maps, size of the images, size of the original images.
SETS = {
    "even": (1, ((20, 28), (10, 14), (5, 7)), (320, 448), (243, 341)),
    "odd": (2, ((13, 19), (7, 10), (4, 5)), (200, 300), (200, 300)),
}
WIDTHS = (200, 376, 448)


@dataclass
class Case:
    """One segmenter; ``keys`` are the published state dict's, with shapes."""

    name: str
    keys: dict[str, tuple[int, ...]]
    figures: dict[str, np.ndarray]
    salt: str = ""

    @staticmethod
    def load(name: str) -> "Case":
        """The full figures, or the leading ones where the folder is absent."""
        if not (FULL / "state_dicts.json").is_file():
            return small_case(name)
        keys = json.loads((FULL / "state_dicts.json").read_text())[name]
        figures = dict(np.load(FULL / f"{name}.npz"))
        return Case(name, {key: tuple(shape) for key, (shape, _) in keys.items()}, figures, SALT)

    def state_dict(self) -> dict[str, Tensor]:
        """The published values by this package's names."""
        return {rename(key): parameter(key, shape, self.salt) for key, shape in self.keys.items()}

    def parameters(self) -> dict[str, str]:
        """This package's names by the published ones."""
        buffers = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")
        return {key: rename(key) for key in self.keys if not buffers.search(key)}

    def statistics(self) -> dict[str, str]:
        """The published names by this package's."""
        return {rename(key): key for key in self.keys if re.search(r"\.running_(mean|var)$", key)}

    def maps(self, which: str) -> dict[str, Tensor]:
        """The backbone's feature maps, float64."""
        batch, sizes, *_ = SETS[which]
        shapes = [(batch, width, *size) for width, size in zip(WIDTHS, sizes, strict=True)]
        return OrderedDict((str(i), make_input(shape, self.salt)) for i, shape in enumerate(shapes))

    def image_size(self, which: str) -> tuple[int, int]:
        return SETS[which][2]

    def original_size(self, which: str) -> tuple[int, int]:
        return SETS[which][3]


class Fixed(nn.Module):
    """Stands for the backbone: the maps of its stages, whatever the image."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.maps


def rename(key: str) -> str:
    for pattern, replacement in RULES:
        key = re.sub(pattern, replacement, key)
    return key


@cache
def choice(count: int) -> np.ndarray:
    """The positions of the values that are stored of an array of ``count`` values."""
    return np.random.RandomState(0).choice(count, 2000, replace=False)


def labels() -> Tensor:
    """``(2, 200, 300)``: cells of 20 x 20 pixels, and a rectangle without a class."""
    cells = np.random.RandomState(7).randint(0, 150, (2, 10, 15))
    truth = cells.repeat(20, 1).repeat(20, 2)
    truth[:, 40:60, 30:90] = 255
    return torch.from_numpy(truth)


def small_case(name: str) -> Case:
    stored = json.loads((SMALL / f"{name}.json").read_text())
    figures = {key: np.array(value) for key, value in flatten(stored["figures"], separator="/").items()}
    return Case(name, {key: tuple(shape) for key, shape in flatten(stored["keys"]).items()}, figures)


def shrink(case: Case) -> str:
    """JSON of the leading figures, in 12 digits. Names have a slash, keys have dots: both are nested."""
    figures: dict[str, Any] = {}
    for name, value in case.figures.items():
        leading = value.reshape(-1)[:40] if name.endswith("/sub") else value
        digits = json.loads(json.dumps(leading.tolist()), parse_float=lambda x: float(f"{float(x):.12g}"))
        put(figures, name.split("/"), digits)
    keys: dict[str, Any] = {}
    for key, shape in case.keys.items():
        put(keys, key.split("."), shape)
    return json.dumps({"keys": keys, "figures": figures}, separators=(",", ":")).replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    for name in NAMES:
        (SMALL / f"{name}.json").write_text(shrink(Case.load(name)))
