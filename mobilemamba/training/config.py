"""The options of a training run that determine its result."""

from dataclasses import dataclass, field
from typing import TypeVar

from ..data.datasets import ON_BAD_IMAGE
from ..models.presets import PRESETS, check_preset
from ..weights import entry

__all__ = ["CHANGEABLE", "TrainConfig"]

T = TypeVar("T")

#: The options that may differ when a run is resumed. The data may be elsewhere, but must be the same.
CHANGEABLE = ("data", "epochs", "on_bad_image")


def option(default: T, text: str, choices: tuple[str, ...] | None = None) -> T:
    """A field of :class:`TrainConfig`. ``mobilemamba train`` has an option of its name, with ``text`` as the help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The options that determine the result of a training run, to the last bit on one machine.

    ``mobilemamba train --help`` says what each one means. ``drop_path`` and ``image_size`` are the preset's where they
    are not given.

    Raises:
        ValueError: an option is out of its range, or the preset is unknown.
    """

    model: str = option("nano", "preset of the model")
    data: str = option(
        "fashion-mnist",
        "fashion-mnist[:DIR], folder:DIR (images in train/CLASS/ and val/CLASS/) or digits (scikit-learn's)",
    )
    image_size: int | None = option(None, "height and width in pixels, for folder:DIR only (default: the preset's)")
    on_bad_image: str = option(
        "fail",
        "a file of folder:DIR that is not a complete image: stop, or name it and go on without it",
        ON_BAD_IMAGE,
    )
    epochs: int = option(20, "passes over the training images")
    batch_size: int = option(128, "images per step, and per pass of an evaluation")
    lr: float = option(2e-3, "highest learning rate")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up; a cosine down to lr / 100 follows")
    weight_decay: float = option(0.05, "weight decay of AdamW, on weights with more than one dimension")
    label_smoothing: float = option(0.1, "share of the target that is spread over all classes")
    clip_grad: float = option(5.0, "largest norm of the gradient; a longer one is scaled down")
    ema_decay: float = option(0.999, "decay per step of the moving average of the weights; the average is the result")
    drop_path: float | None = option(None, "rate of stochastic depth (default: the preset's)")
    flip: bool = option(True, "mirror each image with probability 1/2")
    crop: int = option(2, "largest random shift of an image, in pixels")
    erase: float = option(0.25, "probability that a rectangle of the image becomes noise")
    amp: bool = option(False, "bfloat16 autocast")
    half: bool = option(False, "store the result's weights as float16")
    seed: int = option(0, "seed of the initial weights, the order of the images and the augmentation")

    def __post_init__(self) -> None:
        check_preset(self.model)
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", PRESETS[self.model].get("drop_path_rate", 0.0))
        if self.image_size is None and self.data.startswith("folder:"):
            object.__setattr__(self, "image_size", entry(self.model).preprocessing.crop)
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image must be {' or '.join(ON_BAD_IMAGE)}, got {self.on_bad_image}")
        for name in ("epochs", "batch_size", "lr", "clip_grad"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_epochs", "weight_decay", "crop"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema_decay", "drop_path", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not abs(self.seed) < 2**40:  # the seed of an epoch, about a million times as large, has 64 bits
            raise ValueError(f"seed must be below 2**40, got {self.seed}")
