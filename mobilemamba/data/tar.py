"""Images in a tar file, read at their places without unpacking it."""

import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .folder import ImageFiles
from .image_files import image_suffixes

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Place", "TarImages", "find_in_tar"]

Place = tuple[int, int]  # offset and length of an image in the tar file, in bytes


@dataclass(frozen=True)
class TarImages(ImageFiles):
    """Images in the uncompressed tar file ``root``. Each read opens the file, so worker processes share no position.

    Args:
        places: for each image, its place in the file.
    """

    places: tuple[Place, ...] = ()

    def image(self, i: int) -> "Image.Image":
        offset, length = self.places[i]
        with open(self.root, "rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(length)
        return self._open(f"{self.root}/{self.names[i]}", content)


def find_in_tar(path: Path, skipped: Counter[str]) -> dict[str, Place]:
    """The place of each image in the tar file ``path`` by its name in it, in the order of the names.

    The images of a tar file inside it are in a folder of that file's name: ``n01440764.tar`` in ImageNet's training
    images. Names with a part that starts with a dot are ignored.

    Args:
        skipped: counts the other files, by suffix.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not an uncompressed tar file, or it is not complete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a tar file, got {'a folder' if path.is_dir() else 'no file'}")
    try:
        with tarfile.open(path, "r:") as archive:
            return dict(sorted(_find(archive, "", 0, skipped).items()))
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: expected a complete tar file, not compressed (decompress it first: images are read at their "
            f"places): {error}"
        ) from error


def _find(archive: tarfile.TarFile, folder: str, start: int, skipped: Counter[str]) -> dict[str, Place]:
    """``archive`` begins at byte ``start`` of the outer file."""
    found: dict[str, Place] = {}
    for member in archive:
        name = os.path.normpath(member.name)
        suffix = os.path.splitext(name)[1].lower()
        if not member.isreg() or any(part.startswith(".") for part in name.split("/")):
            continue
        if suffix == ".tar" and (content := archive.extractfile(member)) is not None:
            with tarfile.open(fileobj=content, mode="r:") as inner:
                below = os.path.join(folder, name.removesuffix(".tar"))
                found |= _find(inner, below, start + member.offset_data, skipped)
        elif suffix in image_suffixes():
            found[os.path.join(folder, name)] = (start + member.offset_data, member.size)
        else:
            skipped[suffix or "without suffix"] += 1
    return found
