"""The stored state of a run: reading it, and telling whether a run with some options and data can continue from it."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..weights.checkpoint import shorten
from ..weights.formats import TRAINING_FORMAT, VERSION, load_torch
from .config import CHANGEABLE, TrainConfig
from .folder import RunFolder

__all__ = ["check_same", "read_state", "stored_config", "stored_how"]

PARTS = {
    "config": dict,
    "meta": dict,
    "data": dict,
    "facts": dict,
    "epoch": int,
    "step": int,
    "total": float,
    "skipped": int,
    "seconds": float,
    "bad": dict,
    "how": dict,
    "entry": dict,
    "model": dict,
    "ema": dict,
    "optimizer": dict,
    "scaler": dict,
}


def read_state(path: Path) -> dict[str, Any]:
    """The state of a run, from the file that ``Run.save`` wrote.

    Raises:
        ValueError: the file is damaged, no training checkpoint, or one of another version; the message names it.
    """
    try:
        state = load_torch(path)
        ours = isinstance(state, dict) and state.get("format") == TRAINING_FORMAT
        version = state.get("version") if ours else "something else"
        if version != VERSION:
            raise ValueError(f"expected a training checkpoint of version {VERSION}, got {version}")
        absent = [part for part, kind in PARTS.items() if not isinstance(state.get(part), kind)]
        if absent:
            raise ValueError(f"expected a complete training checkpoint, got one without {', '.join(absent)}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state


def stored_config(out: Path, **changes: Any) -> TrainConfig:
    """The options of the run in the folder ``out``, with ``changes``.

    Raises:
        FileNotFoundError: the folder has no state of a run.
        ValueError: as for :func:`read_state`; or the run has options that this version does not know.
    """
    folder = RunFolder(out)
    folder.check(resume=True)
    options = read_state(folder.last)["config"]
    unknown = sorted(set(options) - {field.name for field in fields(TrainConfig)})
    if unknown:
        raise ValueError(
            f"{folder.last}: made by another version of mobilemamba, with the options {', '.join(unknown)}"
        )
    kinds = [str(data).partition(":")[0] for data in (options["data"], changes.get("data", options["data"]))]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{folder.last}: the run has other data: {options['data']} (now {changes['data']})")
    return TrainConfig(**{**options, **changes})


def stored_how(out: Path) -> dict[str, Any]:
    """The arguments of :func:`train` that do not determine the result, as the run in ``out`` had them.

    Raises:
        FileNotFoundError, ValueError: as :func:`stored_config`.
    """
    how: dict[str, Any] = read_state(RunFolder(out).last)["how"]
    return how


def check_same(state: dict[str, Any], config: TrainConfig, meta: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse to continue from ``state`` with other options, another model or other data.

    Raises:
        ValueError: the message names what differs, and says what to do.
    """
    defaults = {field.name: field.default for field in fields(TrainConfig)}  # of options that are newer than the run
    was, now = (
        {name: value for name, value in options.items() if name not in CHANGEABLE}
        for options in ({**defaults, **state["config"]}, asdict(config))
    )
    if differing := differences(was, now):
        raise ValueError(
            f"the run has other options: {shorten(differing)}; leave them out to continue with those of the run, or "
            "start a new run in another folder"
        )
    if config.epochs < state["config"].get("epochs", 0):
        raise ValueError(f"the run has {state['config']['epochs']} epochs, got {config.epochs}; expected no fewer")
    if differing := changed_groups(state["data"], data) or differences(facts(state["meta"]), facts(meta)):
        raise ValueError(f"the run has other data: {shorten(differing)}; expected the same images, wherever they are")


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A text such as ``lr 0.1 (now 0.2)`` for each entry that differs."""
    return [f"{key} {was.get(key)} (now {now.get(key)})" for key in {**was, **now} if was.get(key) != now.get(key)]


def changed_groups(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two fingerprints (:meth:`DataSet.fingerprint`): all images, then each group that differs."""
    if was == now:
        return []
    counts = [{group: entry[0] for group, entry in data.items()} for data in (was, now)]
    total = [sum(count.values()) for count in counts]
    renamed = [
        f"{group} has other names or labels"
        for group in was
        if counts[0][group] == counts[1].get(group) and was[group] != now[group]
    ]
    return [f"{total[0]} images (now {total[1]})", *differences(*counts), *renamed]


def facts(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` with one entry for each label, so that a comparison names the labels that differ."""
    labels = {f"label {i}": label for i, label in enumerate(meta.get("labels") or ())}
    return {**{key: value for key, value in meta.items() if key != "labels"}, **labels}
