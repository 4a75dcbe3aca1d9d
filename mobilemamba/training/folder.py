"""The folder of a run: its files, and a lock that keeps other processes out."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RunFolder"]


class RunFolder:
    """The folder of a run.

    Args:
        path: the folder. It has the state after the latest epoch (``last``), the log (``log``), the finished model
            (``model``) and the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.log, self.model = self.files = [path / name for name in ("last.pt", "log.jsonl", "model.pt")]

    def check(self, resume: bool) -> None:
        """Refuse to start over a run, or to resume where none is.

        Raises:
            FileExistsError: without ``resume``, the folder has files of a run.
            FileNotFoundError: with ``resume``, the folder has no state of a run.
            NotADirectoryError: the folder is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: expected a folder for the run, got a file")
        if resume and not self.last.exists():
            what = "a folder without last.pt" if self.path.exists() else "no folder"
            raise FileNotFoundError(f"{self.path}: expected the folder of a run to resume, got {what}")
        if not resume and self.last.exists():
            raise FileExistsError(f"{self.last} exists: continue that run with --resume, or choose another folder")
        for file in self.files:
            if not resume and file.exists():
                raise FileExistsError(f"{file} exists, without the state of its run: choose another folder")

    def forget(self) -> None:
        """Remove the state and the log of a run that ended before its first step: another may start here."""
        for file in (self.last, self.log):
            file.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if it is missing, and keep other processes from training in it while this one does.

        The lock ends with the process, however that ends. Files that a killed process left unfinished are removed.

        Raises:
            BlockingIOError: another process trains in this folder; the message names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.register_at_fork(after_in_child=file.close)  # a worker that outlives the run would keep the lock
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BlockingIOError(
                    f"{self.path}: {holder} trains in this folder; wait for it, or choose another folder"
                ) from error
            except OSError as error:
                print(
                    f"{self.path}: this file system has no locks ({error.strerror}); start no second run in it",
                    file=sys.stderr,
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            for path in self.files:
                for unfinished in self.path.glob(f".{path.name}.*.tmp"):
                    unfinished.unlink()
            yield
