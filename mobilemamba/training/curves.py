"""Curves of runs: reads their logs, and draws loss and accuracy, AP or mIoU over the epochs."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..weights.files import atomic_write
from .config import MEASURES

__all__ = ["SUFFIXES", "Curves", "draw", "read_curves"]

SUFFIXES = (".png", ".svg")

#: Colours that people with any colour vision tell apart: Okabe and Ito (2008), without yellow and black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")  # the next one after each round of colours


@dataclass
class Curves:
    """What the log of a run says so far.

    Args:
        path: the log.
        loss: mean training loss, by epoch (from 1).
        accuracy: accuracy, AP or mIoU of the averaged weights on the test images, from 0 to 1, by epoch.
        measure: which of the three.
        result: the same of the stored model; None while the run goes on.
        epochs: epochs that the run will have; None if the log does not say.
    """

    path: Path
    loss: dict[int, float] = field(default_factory=dict)
    accuracy: dict[int, float] = field(default_factory=dict)
    measure: str = MEASURES["classify"]
    result: float | None = None
    epochs: int | None = None

    @property
    def name(self) -> str:
        """The name of the run: that of its folder or, for a log of another name than ``log.jsonl``, of the file."""
        return self.path.absolute().parent.name if self.path.name == "log.jsonl" else self.path.stem

    @property
    def state(self) -> str:
        """``94.1 %`` after the end, ``epoch 3 of 20`` before."""
        if self.result is not None:
            return f"{self.result:.2%}".replace("%", " %")
        last = max(self.loss, default=0)
        return f"epoch {last} of {self.epochs}" if self.epochs else f"epoch {last}"


def read_curves(run: Path) -> Curves:
    """Read the log of a run, also of one in progress. Of several lines for one epoch the last one counts.

    Args:
        run: the folder of the run, or a log.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a line is no entry of a log (the last one may be unfinished); the message names it.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        what = "a folder without log.jsonl" if run.is_dir() else "no file"
        raise FileNotFoundError(f"{run}: expected the folder of a run or its log, got {what}")
    curves = Curves(path)
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # without its newline: the run is writing it, or was killed
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
        try:
            _add(curves, entry)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected numbers, got {line[:80]!r}") from error
    return curves


def _add(curves: Curves, entry: dict[str, object]) -> None:
    """Add one line of the log: its first entry, an epoch's or its last one."""
    if isinstance(config := entry.get("config"), dict):
        curves.result = None  # a run that goes on after its end
        curves.epochs = int(_number(config["epochs"])) if "epochs" in config else None
        curves.measure = MEASURES.get(str(config.get("task")), curves.measure)
    elif "loss" in entry:
        epoch = int(_number(entry.get("epoch")))
        curves.loss[epoch] = _number(entry["loss"])
        if f"ema_{curves.measure}" in entry:
            curves.accuracy[epoch] = _number(entry[f"ema_{curves.measure}"])
    elif f"test_{curves.measure}" in entry:
        curves.result = _number(entry[f"test_{curves.measure}"])


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def draw(runs: Sequence[Curves], target: Path) -> None:
    """Draw the loss and the accuracy, AP or mIoU of ``runs`` side by side, with one legend.

    Args:
        runs: at least one with an epoch; runs without one are only in the legend.
        target: the file to write; its name ends with ``.png`` or ``.svg``.

    Raises:
        ValueError: the name has another ending, or no run has an epoch.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{target}: expected a name that ends with {' or '.join(SUFFIXES)}")
    if not any(run.loss for run in runs):
        raise ValueError(f"{', '.join(str(run.path) for run in runs)}: expected a finished epoch, got none so far")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder to write {target.name} into")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install '.[train]'") from error

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "0.4",
        "axes.grid": True,
        "grid.color": "0.9",
        "axes.axisbelow": True,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "mobilemamba",  # equal curves give equal files
    }
    columns = 1 if len(runs) == 1 else 2
    rows = math.ceil(len(runs) / columns)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4.2 + 0.22 * rows), layout="constrained")
        panels = figure.subplots(1, 2)
        handles = []
        longest = max(len(run.loss) for run in runs)
        for i, (run, name) in enumerate(zip(runs, _distinct_names(runs), strict=True)):
            look = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": LINES[i // len(COLOURS) % len(LINES)],
                "linewidth": 1.8,
                "marker": "o" if longest <= 40 or len(run.loss) <= 1 else "",
                "markersize": 3.5,
            }
            for panel, values in zip(panels, (run.loss, run.accuracy), strict=True):
                epochs = sorted(values)
                (line,) = panel.plot(epochs, [values[epoch] for epoch in epochs], **look)
            line.set_label(f"{name}  ({run.state})")
            handles.append(line)
        measures = ", ".join(dict.fromkeys(run.measure for run in runs))
        for panel, title in zip(panels, ("training loss", f"test {measures}"), strict=True):
            panel.set_title(title, loc="left")
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        content = io.BytesIO()
        metadata = {"Date": None} if target.suffix.lower() == ".svg" else {}
        figure.savefig(content, format=target.suffix[1:].lower(), dpi=150, metadata=metadata)
    atomic_write(target, lambda temporary: Path(temporary).write_bytes(content.getvalue()))


def _distinct_names(runs: Sequence[Curves]) -> list[str]:
    """The runs' names; where several are the same, their paths."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
