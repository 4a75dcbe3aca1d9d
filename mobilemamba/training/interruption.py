"""Signals that ask a run to stop: it finishes the step at hand, stores its state, and can be continued."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["EXIT_CODE", "Interrupted", "Interruption"]

#: Exit code of a run that stopped for a signal and can be continued (EX_TEMPFAIL of sysexits.h).
EXIT_CODE = 75

#: Ctrl-C, a scheduler's or torchrun's end of the job, Slurm's warning before it (``sbatch --signal=USR1@120``).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):  # noqa: N818  (no error)
    """A run stopped for a signal; its state is stored."""


class Interruption:
    """While it is entered, :data:`SIGNALS` only set ``number``. A second Ctrl-C raises KeyboardInterrupt.

    Args:
        launched: torchrun started this process. Its end is a signal too, and a second Ctrl-C changes nothing: torchrun
            sends one after the terminal's.
    """

    def __init__(self, launched: bool = False) -> None:
        self.number, self.launched, self.parent = 0, launched, os.getppid()

    def asked(self) -> int:
        """The number of the signal that asks for the end, or 0."""
        if self.launched and os.getppid() != self.parent:
            self.number = signal.SIGTERM
        return self.number

    def __enter__(self) -> "Interruption":
        self.before: dict[signal.Signals, Any] = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT and not self.launched:
            raise KeyboardInterrupt
        self.number = number
