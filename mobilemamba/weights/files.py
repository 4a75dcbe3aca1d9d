"""Functions on files that several modules need: atomic writing, hashing, recognising a web page."""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["atomic_write", "is_page", "naming", "sha256", "torch_save"]

PathLike = str | os.PathLike[str]


def atomic_write(path: PathLike, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` with a path beside ``path``, then rename that file to ``path``.

    A reader sees the complete old file or the complete new one, even if the process or the machine stops. A process
    that is killed leaves ``.NAME.*.tmp`` behind.

    Raises:
        OSError: the folder of ``path`` does not exist, cannot be written, or is full. The message names ``path``.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays; its target is replaced
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with naming(path, instead_of=temporary):
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: PathLike, instead_of: PathLike | None = None) -> Iterator[None]:
    """Lets errors of the system name ``path`` where they name no file, as those of a write, or ``instead_of``."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or (instead_of is not None and error.filename == os.fspath(instead_of))
        if error.errno is None or not unnamed:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def torch_save(content: Any, path: PathLike) -> None:
    """``torch.save`` whose error for a full disk is an OSError.

    Torch's own writer raises RuntimeError. With a Python file it meets the OSError, and may raise RuntimeError then.
    """
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_page(start: bytes) -> bool:
    """Whether a file with these first bytes is HTML or XML. Servers send such pages instead of a file."""
    return start.lstrip()[:1] == b"<"
