"""Calls of a base class's method in TorchScript, which has no ``super()``."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

__all__ = ["inherited"]


def inherited(method: Callable[..., Any], name: str) -> Any:
    """``method`` of a base class under another ``name``, for a method that overrides it and calls it.

    TorchScript calls methods by the name of their function. So an alias alone would be the override again.
    """
    assert isinstance(method, FunctionType)
    copy = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    copy.__annotations__ = method.__annotations__
    return copy
