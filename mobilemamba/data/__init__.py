"""Images: preprocessing, data sets for training, augmentation."""

from .augmentation import Augmentation
from .datasets import fashion_mnist_dir, load, read_idx
from .image_files import find_images
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, open_image
from .splits import DataSet, Split

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "DataSet",
    "Preprocessing",
    "Split",
    "fashion_mnist_dir",
    "find_images",
    "load",
    "open_image",
    "read_idx",
]
