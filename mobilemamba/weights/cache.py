"""The cache of downloaded weights: each file is downloaded once, and its hash is checked at every use."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from . import files
from .table import ASSETS, WeightsEntry

__all__ = ["cache_dir", "download"]


def cache_dir() -> Path:
    """The folder of downloaded weights: ``$MOBILEMAMBA_WEIGHTS``, or ``checkpoints`` in torch.hub's folder."""
    chosen = os.environ.get("MOBILEMAMBA_WEIGHTS")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir()) / "checkpoints"


def download(entry: WeightsEntry, sha256: str | None = None, progress: bool = True, url: str | None = None) -> Path:
    """The path of the weights file of ``entry``. If :func:`cache_dir` does not have the file, it is downloaded.

    The authors publish no hashes. So the first use records the SHA-256 beside the file (``.sha256``, in sha256sum's
    format), and every later use checks it. A folder that cannot be written gets no record; a file in it is used all the
    same. A caller who knows the hash can pass it.

    Args:
        entry: an entry of the table of weights.
        sha256: the hash that the file must have, in hexadecimal.
        progress: show a progress line on stderr.
        url: download from here instead of ``entry.url``.

    Raises:
        OSError: the download failed, and the next call continues it; or the folder cannot be written or read. The
            message says where to put the file, and that ``MOBILEMAMBA_WEIGHTS`` names another folder.
        ValueError: the downloaded data is not a torch file, or the hash differs.
    """
    if entry.drive_id is None:
        path = ASSETS / entry.file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the weights of {entry.preset} are missing from this installation")
        return path
    target = cache_dir() / entry.file_name
    source = url or entry.url
    assert source is not None
    if not os.path.exists(target):
        from .fetch import fetch  # here: its HTTP modules would cost `import mobilemamba` 10 ms

        fetch(source, target, lambda part: _check_hash(part, target, sha256), progress)
    digest = _check_hash(target, target, sha256)
    record = _record(target)
    if not record.exists():
        with suppress(OSError):  # a folder of the administrator, or on a disk that is full or read only
            files.atomic_write(record, lambda path: path.write_text(f"{digest}  {target.name}\n"))
    return target


def _record(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _check_hash(path: Path, target: Path, sha256: str | None) -> str:
    """The SHA-256 of ``path``. It must equal ``sha256`` and the record of ``target``, as far as these exist."""
    digest, record = files.sha256(path), _record(target)
    recorded = record.read_text().split(maxsplit=1)[:1] if record.exists() else None
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(f"{target}: expected sha256 {sha256.lower()}, got {digest}; remove the file if it is damaged")
    if recorded is not None and recorded != [digest]:
        raise ValueError(
            f"{target}: expected sha256 {''.join(recorded)} as at the first download, got {digest}; to download "
            f"the file again, remove it and {record.name}"
        )
    return digest
