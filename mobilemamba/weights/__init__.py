"""Weights: the table of published files, download, reading and writing checkpoints."""

from .cache import cache_dir, download
from .checkpoint import Checkpoint, load_into
from .formats import read, save
from .loading import Source, adapt_channels, load, load_pretrained, locate
from .table import ENTRIES, WeightsEntry, entry

__all__ = [
    "ENTRIES",
    "Checkpoint",
    "Source",
    "WeightsEntry",
    "adapt_channels",
    "cache_dir",
    "download",
    "entry",
    "load",
    "load_into",
    "load_pretrained",
    "locate",
    "read",
    "save",
]
