"""The parity figures of the published detectors' and segmenters' necks and heads, and how they are filled.

A case is the published keys with their shapes, and figures by name. The backbone is no part of them: feature maps by
:func:`figures.make_input` stand for it. An array of 4000 values and more is stored as ``shape``, ``sum``, ``abssum``
and ``sub``, 2000 of its values.

The figures lie outside the repository (``MOBILEMAMBA_DOWNSTREAM_PARITY``), for a filling that
``MOBILEMAMBA_PARITY_SALT`` names. ``parity/downstream/*.json`` are the leading values, written by
``python tests/downstream_figures.py NAME...``.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from figures import HERE, flatten, parameter, put
from torch import Tensor, nn

FULL = Path(os.environ.get("MOBILEMAMBA_DOWNSTREAM_PARITY") or HERE.parent.parent / "shared" / "downstream")
SMALL = HERE / "parity" / "downstream"
SALT = os.environ.get("MOBILEMAMBA_PARITY_SALT", "")
ZERO = 1e-12  # a norm under this is zero in exact arithmetic

#: Values of an array from which on the small copy has no single values: to find their positions takes seconds.
LARGE = 10**6

#: Figures that are the input of others: stored whole in the small copy, to the last digit.
INPUTS = re.compile(r"(^|/)(rois|deltas|gts|boxes|labels|pos_anchor|pos_gt|loss_proposals/\d+)$")


@dataclass
class Case:
    """One detector or segmenter; ``keys`` are the published state dict's, with shapes."""

    name: str
    keys: dict[str, tuple[int, ...]]
    figures: dict[str, np.ndarray]
    salt: str = ""
    is_whole: bool = True

    @staticmethod
    def load(name: str) -> "Case":
        """The full figures, or the leading ones where the folder is absent."""
        return Case.full(name) if (FULL / "state_dicts.json").is_file() else Case.small(name)

    @staticmethod
    def full(name: str) -> "Case":
        keys = json.loads((FULL / "state_dicts.json").read_text())[name]
        return Case(
            name, {key: tuple(shape) for key, (shape, _) in keys.items()}, dict(np.load(FULL / f"{name}.npz")), SALT
        )

    @staticmethod
    def small(name: str) -> "Case":
        stored = json.loads((SMALL / f"{name}.json").read_text())
        values = {key: np.array(value) for key, value in flatten(stored["figures"], separator="/").items()}
        keys = {key: tuple(shape) for key, shape in flatten(stored["keys"]).items()}
        return Case(name, keys, values, is_whole=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The published state dict in float32, without the backbone."""
        return {key: parameter(key, shape, self.salt) for key, shape in self.keys.items()}

    def make_input(self, *shape: int) -> Tensor:
        """An input or the weights of a loss, rounded to float32; float64."""
        return figures.make_input(shape, self.salt).float().double()

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.figures[name])

    def rows(self, name: str) -> Tensor:
        """Boxes, or other rows of four or five."""
        return self.tensor(name).reshape(-1, 5 if name.endswith("rois") and "coder" not in name else 4)

    def shrink(self) -> str:
        """JSON of the leading figures; outputs in 12 digits. Names have slashes, keys have dots: both are nested."""
        leading: dict[str, Any] = {}
        for name, value in self.figures.items():
            if name.endswith("/sub") and self.figures[f"{name[:-3]}shape"].prod() > LARGE:
                continue
            if INPUTS.search(name):
                put(leading, name.split("/"), value.tolist())
                continue
            limit = 4500 if name.endswith("packed") else 12  # the bytes of the first mask
            text = json.dumps(value.reshape(-1)[:limit].tolist() if value.ndim else value.item())
            put(leading, name.split("/"), json.loads(text, parse_float=lambda x: float(f"{float(x):.12g}")))
        keys: dict[str, Any] = {}
        for key, shape in self.keys.items():
            put(keys, key.split("."), shape)
        return json.dumps({"keys": keys, "figures": leading}, separators=(",", ":")).replace('},"', '},\n"') + "\n"


class Fixed(nn.Module):
    """Stands for the backbone: the maps of its stages, whatever the images."""

    def __init__(self, *maps: Tensor) -> None:
        super().__init__()
        self.maps = {str(i): x for i, x in enumerate(maps)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.maps


@cache
def choice(count: int) -> np.ndarray:
    """The positions of the values that are stored of an array of ``count`` values."""
    return np.random.RandomState(0).choice(count, 2000, replace=False)


def stored(actual: Tensor, name: str) -> dict[str, Tensor]:
    """The figures of the array ``actual`` as they are stored under ``name``."""
    if actual.numel() < 4000 or name.endswith("packed"):
        return {name: actual}
    flat = actual.detach().flatten()
    return {
        f"{name}/shape": torch.tensor(actual.shape),
        f"{name}/sum": flat.sum(),
        f"{name}/abssum": flat.abs().sum(),
        f"{name}/sub": flat[torch.from_numpy(choice(flat.numel()))],
    }


def error(actual: Tensor, expected: np.ndarray) -> float:
    """Relative error of the leading values, in the norm. Several values of an expected loss are its parts."""
    reference = torch.from_numpy(np.asarray(expected)).double().flatten()
    values = actual.detach().double().flatten()
    if actual.dim() == 0:
        reference = reference.sum()[None]
    if len(values) < len(reference):
        return float("inf")
    difference = values[: len(reference)] - reference
    return (difference.norm() / reference.norm().clamp(min=ZERO)).item() if difference.norm() > ZERO else 0.0


def scalar(case: Case, outputs: list[Tensor]) -> Tensor:
    """The loss whose gradients are stored: the sum over the outputs of their weighted means."""
    return torch.stack([(x * case.make_input(*x.shape).to(x.dtype)).mean() for x in outputs]).sum()


if __name__ == "__main__":
    SMALL.mkdir(exist_ok=True)
    for name in sys.argv[1:]:
        (SMALL / f"{name}.json").write_text(Case.full(name).shrink())
