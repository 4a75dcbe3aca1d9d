"""The options of a training run that determine its result."""

from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["TrainConfig"]

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A field of :class:`TrainConfig`. ``mobilemamba train`` has an option of its name, with ``text`` as the help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """The options that determine the result of a training run, to the last bit on one machine.

    ``mobilemamba train --help`` says what each one means.

    Raises:
        ValueError: an option is out of its range.
    """

    model: str = option("nano", "preset of the model")
    data: str = option(
        "fashion-mnist",
        "fashion-mnist[:DIR], folder:DIR (class folders in train/ and val/) or digits (scikit-learn's)",
    )
    image_size: int | None = option(None, "height and width in pixels, for folder:DIR only (default: 224)")
    epochs: int = option(20, "passes over the training images")
    batch_size: int = option(128, "images per step")
    lr: float = option(2e-3, "highest learning rate")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up; a cosine down to lr / 100 follows")
    weight_decay: float = option(0.05, "weight decay of AdamW, on weights with more than one dimension")
    label_smoothing: float = option(0.1, "share of the target that is spread over all classes")
    clip_grad: float = option(5.0, "largest norm of the gradient; a longer one is scaled down")
    ema_decay: float = option(0.999, "decay per step of the moving average of the weights; the average is the result")
    drop_path: float = option(0.0, "rate of stochastic depth")
    flip: bool = option(True, "mirror each image with probability 1/2")
    crop: int = option(2, "largest random shift of an image, in pixels")
    erase: float = option(0.25, "probability that a rectangle of the image becomes noise")
    amp: bool = option(False, "bfloat16 autocast")
    half: bool = option(False, "store the result's weights as float16")
    seed: int = option(0, "seed of the initial weights, the order of the images and the augmentation")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "clip_grad"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_epochs", "weight_decay", "crop"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema_decay", "drop_path", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
