"""Runs classifiers from files in standard operators, with the facts that the files carry."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Preprocessing
from . import executorch_files, litert_files, onnx_files
from .onnx_files import Run

__all__ = ["ExportedClassifier", "open_exported"]

VERSION = 1  # of the text records in a file; a reader refuses a newer version


@dataclass(frozen=True)
class ExportedClassifier:
    """An exported file as a function: normalised images ``(B, C, H, W)`` -> logits ``(B, classes)``, both float32.

    Args:
        run: of one image, or of any number where ``batches`` is true.
        dtype: of the images that ``run`` takes.
    """

    run: Run
    batches: bool
    dtype: torch.dtype
    preprocessing: Preprocessing
    labels: Sequence[str]

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype)
        parts = [images] if self.batches else images.split(1)
        return torch.cat([self.run(part)[0] for part in parts]).float()


def open_exported(path: Path) -> ExportedClassifier:
    """Open a classifier that ``mobilemamba export`` wrote for one image size, as onnx, executorch or litert.

    Raises:
        FileNotFoundError: there is no such file, or no JSON file with its facts beside it.
        ValueError: another kind of file, no facts, facts of a newer version, no names of classes, or the images are not
            square; or the package that runs the file is missing.
    """
    if path.suffix not in (".onnx", ".pte", ".tflite"):
        raise ValueError(f"{path}: expected a file of onnx, executorch or litert: .onnx, .pte or .tflite")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such exported file")
    if path.suffix == ".onnx":
        run, records = onnx_files.load(path)
    else:
        facts = Path(f"{path}.json")
        if not facts.is_file():
            raise FileNotFoundError(f"{facts}: no such file; mobilemamba export writes it beside {path.name}")
        try:
            records = json.loads(facts.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{facts}: expected JSON of mobilemamba export, got other text ({error})") from error
        run = executorch_files.load(path) if path.suffix == ".pte" else litert_files.load(path, ["logits"])
    if (version := records.get("mobilemamba.version")) != str(VERSION):
        raise ValueError(f"{path}: expected facts of version {VERSION} from mobilemamba export, got version {version}")
    labels = records["mobilemamba.labels"].splitlines()
    if not labels or "mobilemamba.task" in records:
        raise ValueError(f"{path}: expected a classifier with names of its classes, got another model")
    fields: dict[str, Any] = {name: int(records[f"mobilemamba.{name}"]) for name in ("resize", "crop")}
    fields |= {name: tuple(map(float, records[f"mobilemamba.{name}"].split())) for name in ("mean", "std")}
    preprocessing = Preprocessing(**fields, interpolation=records["mobilemamba.interpolation"])
    crop = f"{preprocessing.crop} {preprocessing.crop}"
    if (size := records.get("mobilemamba.size", crop)) != crop:
        raise ValueError(f"{path}: expected a file for images of the crop, {crop} pixels, got one for {size}")
    batches = path.suffix == ".onnx"
    half = batches and records["mobilemamba.dtype"] == "float16"  # the other formats take float32
    return ExportedClassifier(run, batches, torch.float16 if half else torch.float32, preprocessing, labels)
