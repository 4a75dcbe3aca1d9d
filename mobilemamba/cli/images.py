"""The images that a command reads: files, folders and patterns, decoded ahead; a bad one is a line on stderr."""

import glob
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ..data import find_images
from ..data.image_files import describe_skipped, read_ahead
from .options import Parser, one_line

__all__ = ["ImageReader", "add_images_argument"]

T = TypeVar("T")


def add_images_argument(parser: Parser) -> None:
    text = "image file, folder (with its subfolders), or pattern such as 'DIR/*.jpg'"
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=text)


class ImageReader(Generic[T]):
    """Reads images for a command, and goes on after bad ones.

    Args:
        command: the name for messages, such as ``"classify"``.
        read: from a path to what the command works on. OSError and ValueError mean a bad image.

    Attributes:
        failed: whether an image or a folder was refused.
    """

    def __init__(self, command: str, read: Callable[[str], T]) -> None:
        self.command, self.read, self.failed = command, read, False

    def refuse(self, error: Exception | str) -> None:
        self.failed = True
        message = one_line(error) if isinstance(error, Exception) else error
        print(f"mobilemamba {self.command}: error: {message}", file=sys.stderr)

    def chunks(self, arguments: Iterable[Path], size: int) -> Iterator[list[tuple[str, T]]]:
        """The paths and contents of up to ``size`` images at a time."""
        images = read_ahead(self._read, self.paths(arguments), 2 * size)
        while chunk := list(itertools.islice(images, size)):
            good: list[tuple[str, T]] = []
            for path, content, error in chunk:
                if error is not None:
                    self.refuse(error)
                else:
                    good.append((path, content))  # type: ignore[arg-type]
            if good:
                yield good

    def paths(self, arguments: Iterable[Path]) -> Iterator[str]:
        """The paths of the images that the arguments name: files, folders, patterns."""
        for argument in map(str, arguments):
            paths = [argument]
            if set("*?[") & set(argument) and not os.path.lexists(argument):
                paths = sorted(glob.glob(argument))
                if not paths:
                    self.refuse(f"{argument}: no file matches this pattern")
            for path in paths:
                yield from self._images_in(path) if os.path.isdir(path) else (path,)

    def _read(self, path: str) -> tuple[str, T | None, Exception | None]:
        try:
            return path, self.read(path), None
        except (OSError, ValueError) as error:
            return path, None, error

    def _images_in(self, folder: str) -> Iterator[str]:
        skipped: Counter[str] = Counter()
        count = 0
        try:
            for count, path in enumerate(find_images(folder, skipped), 1):  # noqa: B007
                yield path
        except OSError as error:
            self.refuse(error)
            return
        told = describe_skipped(skipped)
        if not count:
            self.refuse(f"{folder}: expected images in the folder, got none" + (f"; {told}" if told else ""))
        elif told:
            print(f"mobilemamba {self.command}: {folder}: {told}", file=sys.stderr)
