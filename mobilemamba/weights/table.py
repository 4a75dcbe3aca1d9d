"""The table of weights that have a name: the contents of each file, and where it is published."""

from dataclasses import dataclass, field
from pathlib import Path

from ..data import Preprocessing
from ..data.datasets import FASHION_MNIST_LABELS, FASHION_MNIST_PREPROCESSING
from ..data.imagenet import IMAGENET_LABELS
from ..models.presets import check_preset

__all__ = ["ASSETS", "ENTRIES", "WeightsEntry", "entry"]

ASSETS = Path(__file__).parent / "assets"

DRIVE_URL = "https://drive.usercontent.google.com/download?id={id}&export=download&confirm=t"


@dataclass(frozen=True)
class WeightsEntry:
    """One file of weights.

    Args:
        preset: name of the preset.
        variant: ``"plain"`` or ``"distilled"``.
        file_name: name in the cache; in the package if ``drive_id`` is None.
        drive_id: Google Drive's identifier of the published file.
        preprocessing: how the model expects its images.
        top1, top5: published accuracy in percent on ``tested_on``; None if none was published.
        labels: names of the classes.
        tested_on: the images of the published accuracy.
    """

    preset: str
    variant: str
    file_name: str
    drive_id: str | None
    preprocessing: Preprocessing
    top1: float | None = None
    top5: float | None = None
    labels: tuple[str, ...] = field(default=IMAGENET_LABELS, repr=False)
    tested_on: str = "the 50,000 validation images of ImageNet-1k"

    @property
    def url(self) -> str | None:
        """The address of the published file; None if the file is part of the package."""
        return None if self.drive_id is None else DRIVE_URL.format(id=self.drive_id)


# preset, pixels; then for plain and for distilled weights: Drive id, top-1 and top-5 in percent
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
    tested_on="the 10,000 test images of Fashion-MNIST",
)

#: All weights that have a name.
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
    """The weights of preset ``name``.

    Raises:
        ValueError: an unknown name, or a preset without distilled weights.
    """
    check_preset(name)
    variant = "distilled" if distilled else "plain"
    for candidate in ENTRIES:
        if (candidate.preset, candidate.variant) == (name, variant):
            return candidate
    having = [candidate.preset for candidate in ENTRIES if candidate.variant == variant]
    raise ValueError(f"no {variant} weights for model '{name}'; expected one of {', '.join(having)}")
