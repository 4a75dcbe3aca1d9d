"""A classifier for the server: from a file of ``mobilemamba export --format aoti``, a checkpoint, or a name."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mobilemamba
from mobilemamba import weights
from mobilemamba.data import Preprocessing

RECORDS_VERSION = 1  # of the records in a .pt2 file (docs/deployment.md)


class Classifier(NamedTuple):
    """``run`` takes images ``(B, channels, crop, crop)`` as ``preprocessing`` makes them; probabilities ``(B, C)``."""

    run: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    labels: Sequence[str]


def load(source: str) -> Classifier:
    """The classifier of ``source``: a path ending with ``.pt2``, another checkpoint, or a name such as ``nano``.

    Raises:
        OSError, ValueError: no such file or name, or the file is not a classifier's.
    """
    return exported(source) if source.endswith(".pt2") else fused(source)


def fused(source: str) -> Classifier:
    model, stored = mobilemamba.open_model(source if Path(source).exists() else weights.entry(source))
    preprocessing = stored.preprocessing or weights.entry(stored.preset or "").preprocessing
    return Classifier(probabilities(model.eval().fuse(), "cpu", torch.float32), preprocessing, stored.labels or ())


def exported(path: str) -> Classifier:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if "/extra/mobilemamba." in name]
            records = {name.rpartition("mobilemamba.")[2]: archive.read(name).decode() for name in names}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected a .pt2 file of mobilemamba export, got a damaged file: {error}") from error
    if records.get("version") != str(RECORDS_VERSION) or "task" in records:
        raise ValueError(f"{path}: expected a classifier of mobilemamba export, records of version {RECORDS_VERSION}")
    preprocessing = Preprocessing(
        resize=int(records["resize"]),
        crop=int(records["crop"]),
        mean=tuple(map(float, records["mean"].split())),
        std=tuple(map(float, records["std"].split())),
        interpolation=records["interpolation"],
    )
    package = torch._inductor.aoti_load_package(path)
    run = probabilities(package, records["device"], getattr(torch, records["dtype"]))
    return Classifier(run, preprocessing, records["labels"].splitlines())


def probabilities(network: Callable[[Tensor], Tensor], device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return network(images.to(device, dtype)).float().softmax(1).cpu()

    return run
