"""What ``detect`` and ``segment`` share: the model and the check of its outputs, colours, files of the drawings."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from .. import downstream
from ..downstream.checkpoint import DownstreamCheckpoint
from ..downstream.finite import refuse_infinite
from ..weights.files import atomic_write

__all__ = ["Drawings", "class_color", "class_colors", "open_model"]


def open_model(path: Path, task: str) -> tuple[nn.Module, DownstreamCheckpoint]:
    """The fused model of a checkpoint, and the checkpoint.

    A call of the model raises FloatingPointError if the outputs are not finite.

    Raises:
        ValueError: it is not a model for ``task``, or as :func:`mobilemamba.downstream.open_model`.
        OSError, ImportError: as :func:`mobilemamba.downstream.open_model`.
    """
    model, stored = downstream.open_model(path)
    if stored.task != task:
        raise ValueError(f"{path}: expected a model for {task}, got one for {stored.task} ({stored.kind})")
    return refuse_infinite(model.fuse()), stored  # type: ignore[operator]


def class_colors(labels: Sequence[str] | None, count: int) -> list[tuple[int, int, int] | None]:
    """A colour for each class of a segmenter; None for the background, whose pixels stay as they are.

    The background is a class of this name. If the classes have no names it is class 0, as in most data sets with masks.
    """
    if labels is None:
        return [None, *(class_color(i) for i in range(1, count))]
    return [None if label.casefold() == "background" else class_color(i) for i, label in enumerate(labels)]


def class_color(index: int) -> tuple[int, int, int]:
    """A colour for a class, 0 to 255: neighbouring numbers get hues that are far apart."""
    hue = index * 0.618034 % 1  # the golden ratio: every further hue falls into the largest gap
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 1 - 0.3 * (index // 8 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


class Drawings:
    """Files in a folder, named as the images with another ending, so that no image is overwritten.

    Args:
        folder: is made if it is not there.
        ending: of the files, such as ``".detect.png"``.

    Raises:
        ValueError: there is a file where the folder should be; the message names it and the option ``--out``.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, ending: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            file = next(path for path in (folder, *folder.parents) if path.exists())
            raise ValueError(
                f"--out: expected a folder, or the name of a new one, got {folder}: {file} is a file"
            ) from error
        self.folder, self.ending = folder, ending
        self.names: set[str] = set()

    def save(self, path: str, pixels: Tensor) -> str:
        """Write uint8 pixels ``(3, H, W)`` or ``(H, W)``; returns the file's path.

        The second image of a name gets the number 2, and so on.
        """
        from PIL import Image

        stem, count = Path(path).stem, 1
        name = stem + self.ending
        while name in self.names:
            count += 1
            name = f"{stem}-{count}{self.ending}"
        self.names.add(name)
        drawn = Image.fromarray((pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels).contiguous().numpy())
        atomic_write(self.folder / name, lambda temporary: drawn.save(temporary, "PNG"))
        return str(self.folder / name)
