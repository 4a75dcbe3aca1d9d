"""The packages that a format needs: the extra that brings them, in the error where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needing"]


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Imports in this block need the extra.

    Raises:
        ValueError: one fails; the message has the line to install the extra.
    """
    try:
        yield
    except ImportError as error:
        line = f"pip install 'mobilemamba[{extra}]'"
        raise ValueError(f"files of this format need the extra {extra}: {line} ({error})") from error
