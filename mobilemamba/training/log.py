"""The log of a run: a file with a line for each epoch, TensorBoard events, and a progress line on the terminal."""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..weights.files import atomic_write, naming

__all__ = ["Log", "clock", "memory", "progress"]

Item = TypeVar("Item")


class Log:
    """A file of JSON lines, one for each epoch; and where tensorboard is installed, its events in ``tensorboard``.

    Opening it drops the lines of epochs after ``epochs_done``, which will be repeated, and a line that a killed process
    left unfinished. ``epochs`` are the epochs that have a line with their loss.
    """

    def __init__(self, path: Path, epochs_done: int) -> None:
        lines = path.read_text(errors="replace").splitlines() if path.exists() and epochs_done else []
        kept = [line for line in lines if epoch_of(line) <= epochs_done]
        self.epochs = {epoch_of(line) for line in kept if "loss" in json.loads(line)}
        atomic_write(path, lambda temporary: Path(temporary).write_text("".join(f"{x}\n" for x in kept)))
        self.path, self.events = path, None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(path.with_name("tensorboard"), purge_step=epochs_done + 1)

    def write(self, entry: dict[str, Any]) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.events and "loss" in entry:
            for name, value in entry.items():
                self.events.add_scalar(name, value, entry["epoch"])
            self.events.flush()


def epoch_of(line: str) -> float:
    try:
        return json.loads(line).get("epoch", math.inf)
    except ValueError:
        return math.inf


def progress(batches: Iterable[Item], describe: Callable[[int, int, float], str], total: int) -> Iterator[Item]:
    """Iterate over ``batches``. On a terminal, also show a line that is rewritten twice a second.

    Of the processes that torchrun started, the first one shows it.

    Args:
        describe: the text of the line, from the number of batches done, the number of all batches and the seconds.
        total: the number of all batches.
    """
    start = shown = time.perf_counter()
    shows = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        if shows and now - shown > 0.5:
            shown = now
            print(f"\r{describe(done, total, now - start)}\033[K", end="", file=sys.stderr, flush=True)
    if shows:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def memory(device: torch.device) -> str:
    """The largest memory so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


def clock(seconds: float) -> str:
    """``seconds`` as ``h:mm:ss``."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{whole:02d}"
