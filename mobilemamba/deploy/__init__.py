"""Export: models in files for programs without Python."""

from .exporting import DTYPES, FORMATS, export
from .reading import ExportedClassifier, open_exported
from .standard import FeatureMaps, portable

__all__ = ["DTYPES", "FORMATS", "ExportedClassifier", "FeatureMaps", "export", "open_exported", "portable"]
