"""The weights that can be had by name: what they are, where they come from, and getting them into a model."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, files
from .data import FASHION_MNIST_LABELS, FASHION_MNIST_PREPROCESSING
from .download import fetch
from .transforms import Preprocessing

__all__ = ["ENTRIES", "WeightsEntry", "cache_dir", "download", "entry", "load_pretrained"]

DRIVE_URL = "https://drive.usercontent.google.com/download?id={id}&export=download&confirm=t"
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class WeightsEntry:
    """One file of weights.

    Args:
        preset: name of the preset.
        variant: ``"plain"`` or ``"distilled"``.
        file_name: name in the cache, or in the package where there is no ``drive_id``.
        drive_id: Google Drive's name of the published file.
        preprocessing: how the model wants its images.
        top1, top5: published accuracy in percent on the data set's test images; None where none was published.
        labels: names of the classes; None for ImageNet-1k, whose 1000 are in the usual order.
    """

    preset: str
    variant: str
    file_name: str
    drive_id: str | None
    preprocessing: Preprocessing
    top1: float | None = None
    top5: float | None = None
    labels: tuple[str, ...] | None = None

    @property
    def url(self) -> str | None:
        """Where the file is published."""
        return None if self.drive_id is None else DRIVE_URL.format(id=self.drive_id)


# preset, pixels; then for plain and for distilled weights: Drive id, top-1, top-5
_PUBLISHED = (
    ("t2", 192, ("1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-", 73.6, 91.42), ("14UUeEeN62a1jo5qit-m0yChQnNU8JWQG", 76.9, 93.10)),
    ("t4", 192, ("17-5Q93_cEhBYMDzWTq4sDcc4_c_ezwpd", 76.1, 92.77), ("12e1RKJEYDWVjOZuQLycjOUkA5PqCUnwu", 78.9, 94.16)),
    ("s6", 224, ("13en_zNB2wuHmnHKZMUQDe4KizlaTCHbP", 78.0, 93.99), ("1ujVeWpoICjioRF0aB7PD1fadM4PGFRfl", 80.7, 95.18)),
    ("b1", 256, ("1ODO1XM2luMfczbDLJxHrEl-ie7yUscAC", 79.9, 94.92), ("15rBhYky_f7jNSknXujuwQESaIkiTBAR1", 82.2, 95.87)),
    ("b2", 384, ("1tJJZqeP09D_IAKKFuQtJQOYm4eNGjr1r", 81.6, 95.89), ("1KuleL6Fi84zkjIhkRFbR4lqGa2iu6bOp", 83.3, 96.44)),
    ("b4", 512, ("1MiGLHSldK2JpbQEe-7VlmFsaCdugDnYR", 82.5, 96.25), ("1KevdesGm8Pb4fEbgZ5JY4FMy9IQgYbiZ", 83.6, 96.61)),
)

_NANO = WeightsEntry(
    preset="nano",
    variant="plain",
    file_name="nano.pt",
    drive_id=None,
    preprocessing=FASHION_MNIST_PREPROCESSING,
    top1=93.18,
    labels=FASHION_MNIST_LABELS,
)

#: All weights that can be had by name.
ENTRIES: tuple[WeightsEntry, ...] = (
    _NANO,
    *(
        WeightsEntry(
            preset=preset,
            variant=variant,
            file_name=f"mobilemamba-{preset}-{variant}.pth",
            drive_id=drive_id,
            preprocessing=Preprocessing(resize=int(pixels / 0.875), crop=pixels),
            top1=top1,
            top5=top5,
        )
        for preset, pixels, plain, distilled in _PUBLISHED
        for variant, (drive_id, top1, top5) in (("plain", plain), ("distilled", distilled))
    ),
)


def entry(name: str, distilled: bool = False) -> WeightsEntry:
    """The weights of preset ``name``."""
    variant = "distilled" if distilled else "plain"
    for candidate in ENTRIES:
        if (candidate.preset, candidate.variant) == (name, variant):
            return candidate
    presets = dict.fromkeys(candidate.preset for candidate in ENTRIES)
    if name not in presets:
        raise ValueError(f"unknown model '{name}'; expected one of {', '.join(presets)}")
    having = [candidate.preset for candidate in ENTRIES if candidate.variant == variant]
    raise ValueError(f"no {variant} weights for model '{name}'; expected one of {', '.join(having)}")


def cache_dir() -> Path:
    """Folder of downloaded weights: ``MOBILEMAMBA_WEIGHTS``, or ``checkpoints`` in torch.hub's folder."""
    chosen = os.environ.get("MOBILEMAMBA_WEIGHTS")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir()) / "checkpoints"


def download(entry: WeightsEntry, sha256: str | None = None, progress: bool = True, url: str | None = None) -> Path:
    """The path of the weights file, downloaded to :func:`cache_dir` if it is not there.

    The publisher gave no hashes. So the SHA-256 is recorded beside the file when it is first there (``.sha256``, in
    sha256sum's format) and checked ever after; a caller who knows the hash can pass it.

    Args:
        sha256: the hash that the file must have.
        progress: show a line on stderr.
        url: another place to download from.

    Raises:
        OSError: the download failed; the next call continues it.
        ValueError: what arrived is not the file, or its hash is another one.
    """
    if entry.drive_id is None:
        path = ASSETS / entry.file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the weights of {entry.preset} are missing from this installation")
        return path
    target = cache_dir() / entry.file_name
    source = url or entry.url
    assert source is not None
    if not target.exists():
        fetch(source, target, lambda part: _check_hash(part, target, sha256), progress)
    digest = _check_hash(target, target, sha256)
    record = _record(target)
    if not record.exists():
        files.atomic_write(record, lambda path: path.write_text(f"{digest}  {target.name}\n"))
    return target


def _record(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _check_hash(path: Path, target: Path, sha256: str | None) -> str:
    """The hash of ``path``, which must be the one asked for and the one recorded for ``target``."""
    digest, record = files.sha256(path), _record(target)
    recorded = record.read_text().split(maxsplit=1)[:1] if record.exists() else None
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(f"{target}: expected sha256 {sha256.lower()}, got {digest}; remove the file if it is damaged")
    if recorded is not None and recorded != [digest]:
        raise ValueError(
            f"{target}: expected sha256 {''.join(recorded)} as at the first download, got {digest}; to accept a new "
            f"file remove it together with {record.name}"
        )
    return digest


def load_pretrained(
    model: nn.Module, name: str, pretrained: bool | str | os.PathLike[str], allow_head_mismatch: bool = False
) -> None:
    """Load weights into the model of preset ``name``.

    Args:
        pretrained: True for the plain weights, ``"distilled"``, or the path of a checkpoint.
        allow_head_mismatch: keep the model's head where that of the weights is another one.
    """
    if pretrained is True or pretrained == "distilled":
        path = download(entry(name, distilled=pretrained == "distilled"))
    elif isinstance(pretrained, (str, os.PathLike)):
        path = Path(pretrained)
        if not path.exists():
            raise FileNotFoundError(f"pretrained: expected True, 'distilled' or a checkpoint, got '{path}', not a file")
    else:
        raise ValueError(f"pretrained: expected True, False, 'distilled' or a path, got {pretrained!r}")
    stored = checkpoint.read(path)
    checkpoint.load_into(model, stored.state_dict, allow_head_mismatch=allow_head_mismatch, source=path)
