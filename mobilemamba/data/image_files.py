"""Image files: finds them in folders, tells whether they are complete, and reads them ahead with several threads."""

import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["describe_skipped", "find_images", "has_its_end", "image_suffixes", "read_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")

TAIL = 4096  # bytes in which the end of an image is searched: some programs write data after it


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that the installed Pillow decodes, in lower case: ``.jpg``, ``.pgm``, ``.avif``."""
    from PIL import Image, ImageFile

    suffixes = {".mpo"}  # the JPEG reader opens this format
    for suffix, name in Image.registered_extensions().items():
        reader = Image.OPEN.get(name, (None,))[0]
        stub = isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)  # recognised, not decoded
        if reader is not None and not stub and name != "MPEG":  # of a video, Pillow reads only the size
            suffixes.add(suffix)
    return frozenset(suffixes)


def find_images(folder: str | os.PathLike[str], skipped: Counter[str]) -> Iterator[str]:
    """The paths of the images in ``folder`` and its subfolders, in the order of their names.

    The suffix tells an image (:func:`image_suffixes`). Names that start with a dot are ignored. Links are followed,
    except to a folder that contains the link.

    Args:
        skipped: counts the other files, by suffix.

    Raises:
        OSError: a folder cannot be read.
    """
    parents = Path(os.path.realpath(folder)).parents
    return _find(os.fspath(folder), skipped, frozenset(map(_identity, parents)))


def _find(folder: str, skipped: Counter[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """``above``: identities of the folders that contain this one."""
    if (own := _identity(folder)) in above:
        return
    with os.scandir(folder) as entries:
        ordered = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in ordered:
        suffix = os.path.splitext(entry.name)[1].lower()
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _find(entry.path, skipped, above | {own})
        elif suffix in image_suffixes():
            yield entry.path
        else:
            skipped[suffix or "without suffix"] += 1


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """A text such as ``skipped files: 3 .txt``; empty if no file was skipped."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    return f"skipped files: {counts}" if counts else ""


def has_its_end(path: str) -> bool:
    """Whether the file is a JPEG, PNG or WebP image with its end. False for every other file.

    It reads 4 KiB, about 50 us if the file is in the page cache, and decodes nothing.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(12)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        end = file.read(TAIL)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return size >= 8 + int.from_bytes(start[4:8], "little")
    marker = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PN": b"IEND"}.get(start[:3])
    return marker is not None and marker in end


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], limit: int) -> Iterator[Result]:
    """``read(item)`` for each item, in order, computed by several threads. At most ``limit`` results are in memory."""
    pool = ThreadPoolExecutor(torch.get_num_threads())  # Pillow decodes without the GIL
    futures: deque[Future[Result]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(read, item))
            if len(futures) >= limit:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
