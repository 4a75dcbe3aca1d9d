"""Curves of runs: reads loss and accuracy, AP or mIoU by epoch from their logs."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .config import MEASURES

__all__ = ["Curves", "read_curves"]


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
