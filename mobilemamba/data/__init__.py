"""Images: preprocessing, data sets for training, augmentation."""

from .augmentation import Augmentation
from .coco import load_coco
from .datasets import fashion_mnist_dir, load, read_idx
from .image_files import find_images
from .layouts import load_split
from .loading import default_workers, evaluation_batches, training_batches
from .mask_folder import load_masks
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, open_image
from .randomness import mixed_seed, preserved_generators, seed_generators
from .splits import AnnotatedData, AnnotatedSplit, DataSet, Split

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AnnotatedData",
    "AnnotatedSplit",
    "Augmentation",
    "DataSet",
    "Preprocessing",
    "Split",
    "default_workers",
    "evaluation_batches",
    "fashion_mnist_dir",
    "find_images",
    "load",
    "load_coco",
    "load_masks",
    "load_split",
    "mixed_seed",
    "open_image",
    "preserved_generators",
    "read_idx",
    "seed_generators",
    "training_batches",
]
