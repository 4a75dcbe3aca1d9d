"""Images: preprocessing, data sets for training, augmentation."""

from .augmentation import Augmentation
from .datasets import DataSet, Split, fashion_mnist_dir, load, read_idx
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, open_image

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "DataSet",
    "Preprocessing",
    "Split",
    "fashion_mnist_dir",
    "load",
    "open_image",
    "read_idx",
]
