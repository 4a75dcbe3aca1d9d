"""A detector or segmenter in a file: its weights, and the facts that make the model again."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..data.joint import fitted_size, libraries
from ..data.preprocessing import open_image, to_mode, to_tensor
from ..weights.checkpoint import differences
from ..weights.files import atomic_write, torch_save
from ..weights.formats import DOWNSTREAM_FORMAT, TRAINING_FORMAT, VERSION, load_torch

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DownstreamCheckpoint", "Preparation", "open_model", "read_checkpoint", "save_model"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Preparation:
    """How a model expects its images: calling it gives the tensor of a PIL image in any mode, or of an image file.

    Args:
        size: short side in pixels after resizing; the long side has at most four times as many. None: the size stays,
            as detectors expect it, which resize by themselves.
        mean, std: for each channel of values from 0 to 1. None: the values stay from 0 to 1, as detectors expect them.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, image: "Image.Image | PathLike") -> Tensor:
        """float32 ``(3, H, W)``.

        Raises:
            ValueError, OSError: the image cannot be read; the message names the file.
        """
        if isinstance(image, (str, os.PathLike)):
            image = open_image(image)
        pixels = to_tensor(to_mode(image, "RGB"))
        if self.size is not None:
            size = fitted_size(pixels.shape[1], pixels.shape[2], self.size)
            if size != tuple(pixels.shape[-2:]):
                pixels = libraries()[1].functional.resize(pixels, list(size), antialias=True)
        return self.normalize(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 ``(..., 3, H, W)`` -> float32 of values from 0 to 1, normalised if there are mean and std."""
        values = pixels.float().div_(255)
        if self.mean is None or self.std is None:
            return values
        mean, std = (values.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        return values.sub_(mean).div_(std)


@dataclass
class DownstreamCheckpoint:
    """The weights of a detector or segmenter, and the facts about it.

    Args:
        state_dict: the weights of the model before ``fuse()``.
        kind: a key of :data:`mobilemamba.downstream.KINDS`.
        backbone: the preset.
        num_classes: as the kind's function takes it: of a detector with the background.
        options: the function's other arguments.
        labels: names of the classes; those of a detector are without the background: label i is ``labels[i - 1]``.
        category_ids: numbers of the classes in the data that a detector was trained with, in the order of ``labels``.
        preparation: from an image to the model's input.
        path: the file that it was read from, for messages.
    """

    state_dict: dict[str, Tensor]
    kind: str
    backbone: str
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    category_ids: list[int] | None = None
    preparation: Preparation = Preparation()
    path: Path | None = field(default=None, compare=False)

    @property
    def task(self) -> str:
        """``"detect"`` or ``"segment"``."""
        from . import KINDS

        return KINDS[self.kind][0]

    def meta(self) -> dict[str, Any]:
        """Everything but the tensors, of plain types."""
        prepared = self.preparation
        return {
            "kind": self.kind,
            "backbone": self.backbone,
            "num_classes": self.num_classes,
            "options": dict(self.options),
            "labels": None if self.labels is None else list(self.labels),
            "category_ids": None if self.category_ids is None else list(self.category_ids),
            "preprocessing": {
                "size": prepared.size,
                "mean": None if prepared.mean is None else list(prepared.mean),
                "std": None if prepared.std is None else list(prepared.std),
            },
        }


def save_model(path: PathLike, checkpoint: DownstreamCheckpoint) -> None:
    """Write ``checkpoint`` to a torch file atomically.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ValueError: the name of ``path`` ends neither with ``.pt`` nor with ``.pth``.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: expected a name that ends with .pt or .pth")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state_dict.items()}
    content = {"format": DOWNSTREAM_FORMAT, "version": VERSION, "meta": checkpoint.meta(), "state_dict": tensors}
    atomic_write(path, lambda temporary: torch_save(content, temporary))


def read_checkpoint(path: PathLike) -> DownstreamCheckpoint:
    """Read what :func:`save_model` wrote, or the averaged weights of a training run's state (``last.pt``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is something else or damaged; the message names it.
    """
    from . import KINDS

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, got a folder")
    try:
        content = load_torch(path)
        ours = isinstance(content, Mapping) and content.get("format") in (DOWNSTREAM_FORMAT, TRAINING_FORMAT)
        meta = content.get("meta") if ours else None
        if not isinstance(meta, dict) or "kind" not in meta:
            raise ValueError("expected a detector or segmenter that this package trained, got another file")
        version = content.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(f"expected at most version {VERSION} of the format, got {version!r}; upgrade mobilemamba")
        if meta["kind"] not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {meta['kind']!r:.100}")
        tensors = content.get("state_dict" if content["format"] == DOWNSTREAM_FORMAT else "ema")
        kinds = {"backbone": str, "num_classes": int, "options": dict, "preprocessing": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(meta.get(name), kind)]
        if wrong or not isinstance(tensors, dict):
            raise ValueError(f"expected a complete checkpoint, got one without {', '.join(wrong) or 'weights'}")
        facts = meta["preprocessing"]
        mean, std = (None if facts.get(name) is None else tuple(facts[name]) for name in ("mean", "std"))
        return DownstreamCheckpoint(
            tensors,
            meta["kind"],
            meta["backbone"],
            meta["num_classes"],
            meta["options"],
            meta.get("labels"),
            meta.get("category_ids"),
            Preparation(facts.get("size"), mean, std),
            path,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_model(path: PathLike) -> tuple[nn.Module, DownstreamCheckpoint]:
    """Make the detector or segmenter of a checkpoint with its weights; returns the model and the checkpoint.

    The model is in evaluation mode. ``checkpoint.preparation(image)`` makes its input of a PIL image or a file. A
    detector takes a list of such tensors of any sizes, and its boxes are in the pixels of those. A segmenter takes a
    batch.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint of a detector or segmenter, or its options or weights do not fit.
        ImportError: torchvision is missing.
    """
    from . import create_model

    stored = read_checkpoint(path)
    try:
        model = create_model(stored.kind, stored.backbone, stored.num_classes, **stored.options)
    except (TypeError, ValueError) as error:  # TypeError: an option that the function does not have
        raise ValueError(f"{path}: {error}") from error
    if found := differences(model.state_dict(), stored.state_dict):
        raise ValueError(f"{path}: the weights do not fit a {stored.kind} on {stored.backbone}; {found}")
    model.load_state_dict(stored.state_dict)
    return model.eval(), stored
