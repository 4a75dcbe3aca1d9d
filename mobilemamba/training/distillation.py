"""Distillation: a teacher from any of the usual sources, and the losses that compare a student with it."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import weights, zoo
from ..data import Preprocessing
from ..models import PRESETS
from ..weights.checkpoint import shorten
from .config import TrainConfig
from .finetuning import same_classes

__all__ = ["Teacher", "hard_loss", "open_teacher", "soft_loss"]

SUFFIXES = (".pt", ".pt2", ".pth", ".safetensors", ".ts", ".torchscript")
RECORDS = ("crop", "mean", "std", "labels")
RECORD = "mobilemamba."  # start of the names of the text records that export() writes into a file


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(logits / T))``, averaged over the batch. Both ``(B, classes)``."""
    own, aim = (F.log_softmax(x.float() / temperature, 1) for x in (logits, teacher))
    return F.kl_div(own, aim, reduction="batchmean", log_target=True) * temperature**2


def hard_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's class (DeiT, arXiv 2012.12877). Both ``(B, classes)``."""
    return F.cross_entropy(logits.float(), teacher.argmax(1))


@dataclass(frozen=True)
class Teacher:
    """A network whose logits a student learns from.

    Args:
        module: images ``(B, C, size, size)`` -> logits; it has no gradients.
        size: height and width of its images in pixels; None: as the student's.
        mean, std: of its images.
        student: preprocessing of the images that :meth:`__call__` gets.
    """

    module: nn.Module
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    student: Preprocessing

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The logits for images that are normalised for the student: float ``(B, C, H, W)`` -> float ``(B, classes)``.

        They are normalised for the teacher and resized to its size (bicubic, antialiased where they shrink).
        """
        if (self.mean, self.std) != (self.student.mean, self.student.std):
            own, students = (
                [images.new_tensor(values)[:, None, None] for values in (x.mean, x.std)] for x in (self, self.student)
            )
            images = (images * (students[1] / own[1])).add_((students[0] - own[0]) / own[1])
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            shrinks = self.size < max(images.shape[2:])
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=shrinks)
        first = next(self.module.parameters(), images)  # a compiled module has no parameters
        logits: Tensor = self.module(images.to(first.dtype))
        return logits


def open_teacher(config: TrainConfig, student: Preprocessing, labels: Sequence[str], device: torch.device) -> Teacher:
    """The teacher of ``config``, checked with two images.

    Args:
        student: preprocessing of the images that the student gets.
        labels: classes of the data.

    Raises:
        ValueError: the source is unknown, or the teacher has other classes or image channels than the data.
        OSError: a file is missing, or a download failed.
        ImportError: the source is a name, and timm is not installed.
    """
    assert config.teacher is not None
    module, stated, known = open_module(config.teacher, device)
    if known and not same_classes(known, labels):
        raise ValueError(
            f"teacher {config.teacher}: expected the {len(labels)} classes of the data, {shorten(list(labels), 3)}; "
            f"it knows {len(known)}, {shorten(list(known), 3)}"
        )
    size, mean, std = stated or (None, student.mean, student.std)
    mean, std, size = config.teacher_mean or mean, config.teacher_std or std, config.teacher_size or size
    if not len(mean) == len(std) == student.channels:
        raise ValueError(
            f"teacher: expected images of {student.channels} channels as the data have, got mean {mean} and std {std}"
        )
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    teacher = Teacher(module, size, mean, std, student)
    try:
        logits = teacher(torch.zeros(2, student.channels, student.crop, student.crop, device=device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"teacher {config.teacher} does not take these images: {error!s:.200}") from error
    if logits.shape != (2, len(labels)):
        raise ValueError(
            f"teacher {config.teacher}: expected logits for the {len(labels)} classes of the data, got the shape "
            f"{list(logits.shape[1:])}"
        )
    return teacher


Stated = tuple[int | None, tuple[float, ...], tuple[float, ...]]
Opened = tuple[nn.Module, Stated | None, Sequence[str] | None]


def open_module(source: str, device: torch.device) -> Opened:
    """The network of ``source``; where they are known, size, mean and std of its images, and its classes."""
    path = Path(os.path.expanduser(source))
    preset, _, variant = source.partition(":")
    if preset in PRESETS and variant in ("", "plain", "distilled"):
        return own_model(weights.entry(preset, variant == "distilled"), device)
    if not path.is_file():
        if path.suffix in SUFFIXES or os.sep in source:
            raise FileNotFoundError(f"teacher: no such file: {source}")
        return timm_model(source, device)
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if path.suffix == ".pt2":
        return exported_model(path, names, device)
    if any(name.endswith("/constants.pkl") for name in names):
        records = {RECORD + key: "" for key in RECORDS}
        return torch.jit.load(str(path), device, _extra_files=records).eval(), *stated_by(records)
    return own_model(path, device)


def own_model(source: weights.Source, device: torch.device) -> Opened:
    model, stored = zoo.open_model(source)
    known = stored.preprocessing
    stated = None if known is None else (known.crop, known.mean, known.std)
    return model.eval().fuse().to(device), stated, stored.labels


def timm_model(name: str, device: torch.device) -> Opened:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"teacher {name}: a name needs timm: pip install 'mobilemamba[train]'") from error
    if not timm.is_model(name):
        raise ValueError(f"teacher: expected a file, a preset or a model of timm, got '{name}'")
    try:
        model = timm.create_model(name, pretrained=True).eval().to(device)
    except RuntimeError as error:
        raise ValueError(f"teacher {name}: {error}") from error
    facts: dict[str, Any] = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined, no-untyped-call]
    return model, (facts["input_size"][1], facts["mean"], facts["std"]), None


def exported_model(path: Path, names: list[str], device: torch.device) -> Opened:
    """A ``.pt2`` file: an exported program, or a package that AOTInductor compiled."""
    if not any("/aotinductor/" in name for name in names):
        records = {RECORD + key: "" for key in RECORDS}
        program = torch.export.load(path, extra_files=records)
        return program.module().to(device), *stated_by(records)
    package = torch._inductor.aoti_load_package(str(path), device_index=device.index or -1)
    with zipfile.ZipFile(path) as archive:
        extra = {Path(name).name: name for name in names if RECORD in name}
        records = {key: archive.read(name).decode() for key, name in extra.items()}
    dtype = getattr(torch, records.get(f"{RECORD}dtype", "float32"))
    return Compiled(package, dtype), *stated_by(records)


class Compiled(nn.Module):
    """A compiled package as a module.

    Args:
        dtype: of its images.
    """

    def __init__(self, package: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.package, self.dtype = package, dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.package(images.to(self.dtype))
        return logits


def stated_by(records: dict[str, Any]) -> tuple[Stated | None, Sequence[str] | None]:
    """Size, mean and std, and the classes, from the text records of an exported file of this package."""
    texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in records.items()}
    if not texts.get(f"{RECORD}crop"):
        return None, None
    mean, std = (tuple(map(float, texts[RECORD + key].split())) for key in ("mean", "std"))
    return (int(texts[f"{RECORD}crop"]), mean, std), texts.get(f"{RECORD}labels", "").splitlines()
