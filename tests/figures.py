"""The parity figures: what the published network computes for parameters drawn by a rule, and that rule.

A case is a published state dict (names and shapes) and figures by name:

- ``logits/BxCxHxW``: output in evaluation for ``make_input((B, C, H, W))``.
- ``feat/BxCxHxW/PART/{shape,head,mean,std}``: a feature map: its shape, ``[0, :8, :2, :2]``, per-channel statistics.
- ``train/...``: loss, gradients (norms, and ``[0, :, :4, :4]`` of the input's), norms of updated statistics.

Full figures lie outside the repository (``MOBILEMAMBA_PARITY``); ``parity/*.json`` here are the leading values of some,
written by ``python tests/figures.py FOLDER CASE``.
"""

import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
FULL = Path(os.environ.get("MOBILEMAMBA_PARITY") or HERE.parent.parent / "shared" / "parity")


@dataclass
class Case:
    """One network and its figures; ``keys`` are the published state dict's, with shapes."""

    name: str
    keys: dict[str, tuple[int, ...]]
    figures: dict[str, np.ndarray]

    @property
    def preset(self) -> str:
        return self.name.split("_")[0].lower()

    @property
    def model_args(self) -> dict[str, Any]:
        classes = re.search(r"_nc(\d+)", self.name)
        return {"num_classes": int(classes[1]) if classes else 1000, "distillation": "_distilled" in self.name}

    def inputs(self) -> list[tuple[int, ...]]:
        """Shapes for which there are logits."""
        return [tuple(map(int, key[7:].split("x"))) for key in self.figures if key.startswith("logits/")]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Figures under ``prefix``, by the rest of their names."""
        return {key[len(prefix) :]: value for key, value in self.figures.items() if key.startswith(prefix)}

    def state_dict(self) -> dict[str, Tensor]:
        """The published state dict in float32, as released files have it."""
        return {key: parameter(key, shape) for key, shape in self.keys.items()}


def draw(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal values that ``text`` determines."""
    return np.random.RandomState(zlib.crc32(text.encode())).standard_normal(shape)


def parameter(key: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """The value of the published state dict's ``key``. Another ``salt`` is another filling."""
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf in ("wt_filter", "iwt_filter"):  # as released files hold them: not quite 0.5
        signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).view(4, 1, 2, 2)
        return 0.49999997 * signs.repeat(shape[0] // 4, 1, 1, 1)
    offset, scale = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    for pattern, special in SPECIAL:
        if re.search(pattern, key):
            offset, scale = special
            break
    else:
        if leaf in ("x_proj_weight", "dt_projs_weight"):
            scale = 1 / math.sqrt(shape[-1])
        elif len(shape) == 1:
            offset, scale = 1.0, 0.1
    values = draw(salt + key, shape)
    values = offset + scale * (np.abs(values) if leaf == "running_var" else values)
    return torch.from_numpy(values.astype(np.float32))


#: Offset and scale of the values of some keys; the weights of BatchNorm are small in blocks, whose residuals add up.
SPECIAL = (
    (r"running_var$", (0.5, 0.5)),
    (r"A_logs$", (0.0, 0.5)),
    (r"(dt_projs_bias|\.running_mean|\.bias)$", (0.0, 0.1)),
    (r"base_scale\.weight$", (1.0, 0.1)),
    (r"wavelet_scale", (0.5, 0.1)),
    (r"^blocks(?!.*\.conv[123]\.).*\.(bn|bn1|bn2)\.weight$", (0.3, 0.03)),
)


def make_input(shape: tuple[int, ...], salt: str = "") -> Tensor:
    """Images ``(B, C, H, W)`` of 16 x 16 tiles with noise, rounded to float32; other shapes plain noise. float64."""
    stream = np.random.RandomState(zlib.crc32(f"{salt}input{'x'.join(map(str, shape))}".encode()))
    values = stream.standard_normal(shape)
    if len(shape) != 4:
        return torch.from_numpy(values).to(torch.get_default_device())
    rows, columns = (np.arange(side) // 16 for side in shape[2:])
    tiles = stream.standard_normal((*shape[:2], *(-(-side // 16) for side in shape[2:])))
    values = tiles[:, :, rows[:, None], columns] + 0.5 * values
    return torch.from_numpy(values.astype(np.float32)).double().to(torch.get_default_device())


def full_cases(folder: Path = FULL) -> list[Case]:
    """All cases of the full figures; none where they are absent."""
    if not (folder / "state_dicts.json").is_file():
        return []
    state_dicts = json.loads((folder / "state_dicts.json").read_text())
    return [
        Case(path.stem, {key: tuple(shape) for key, shape, _ in state_dicts[path.stem]}, dict(np.load(path)))
        for path in sorted(folder.glob("*.npz"))
    ]


def small_cases() -> list[Case]:
    """The cases whose leading figures are part of the repository."""
    cases = []
    for path in sorted((HERE / "parity").glob("*.json")):
        stored = json.loads(path.read_text())
        keys = {key: tuple(shape) for key, shape in flatten(stored["keys"]).items()}
        figures = {key: np.array(value) for key, value in flatten(stored["figures"], separator="/").items()}
        cases.append(Case(stored["name"], keys, figures))
    return cases


def shrink(case: Case) -> str:
    """JSON of the leading figures of ``case``, in 12 digits."""
    figures: dict[str, Any] = {}
    for name, value in case.figures.items():
        if name.startswith("feat/") and name.endswith("/std"):
            continue
        limit = 16 if name.startswith("feat/") else 64
        leading = value.reshape(-1)[:limit] if value.ndim else value
        put(
            figures,
            name.split("/"),
            json.loads(json.dumps(leading.tolist()), parse_float=lambda x: float(f"{float(x):.12g}")),
        )
    keys: dict[str, Any] = {}
    for key, shape in case.keys.items():
        put(keys, key.split("."), shape)
    return json.dumps({"name": case.name, "keys": keys, "figures": figures}, separators=(",", ":"))


def put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def flatten(tree: dict[str, Any], separator: str = ".") -> dict[str, Any]:
    """The leaves of nested dictionaries, by their paths."""
    leaves = {}
    for name, value in tree.items():
        below = flatten(value, separator) if isinstance(value, dict) else None
        leaves.update({name: value} if below is None else {f"{name}{separator}{k}": v for k, v in below.items()})
    return leaves


if __name__ == "__main__":
    folder, name = sys.argv[1:]
    (case,) = (case for case in full_cases(Path(folder)) if case.name == name)
    (HERE / "parity" / f"{name}.json").write_text(shrink(case).replace('},"', '},\n"') + "\n")
