"""The options of a training run."""

from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["TrainConfig"]

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A field of the configuration, which is also an option of ``mobilemamba train`` with ``text`` as its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """What determines the result of a training run, to the last bit on one machine."""

    model: str = option("nano", "preset")
    data: str = option(
        "fashion-mnist",
        "fashion-mnist[:DIR], folder:DIR (class folders in train/ and val/) or scikit-learn's digits",
    )
    image_size: int | None = option(None, "height and width of the images of folder:DIR (default: 224)")
    epochs: int = option(20, "passes over the training images")
    batch_size: int = option(128, "images in a step")
    lr: float = option(2e-3, "highest learning rate")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up, before the cosine to lr / 100")
    weight_decay: float = option(0.05, "of AdamW, on weights with more than one dimension")
    label_smoothing: float = option(0.1, "share of the target spread over all the classes")
    clip_grad: float = option(5.0, "largest norm of the gradient")
    ema_decay: float = option(0.999, "decay per step of the averaged weights, which are the result")
    drop_path: float = option(0.0, "rate of stochastic depth")
    flip: bool = option(True, "mirror half of the images")
    crop: int = option(2, "shift the images by up to this many pixels")
    erase: float = option(0.25, "probability of a rectangle of noise")
    amp: bool = option(False, "bfloat16 autocast")
    half: bool = option(False, "store the weights of the result as float16")
    seed: int = option(0, "seed of initial weights, order and augmentation")

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
