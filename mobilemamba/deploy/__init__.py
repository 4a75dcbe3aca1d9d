"""Export: models in files for programs without Python."""

from .exporting import DTYPES, FORMATS, export

__all__ = ["DTYPES", "FORMATS", "export"]
