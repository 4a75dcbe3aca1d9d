"""Checks of constructor arguments. A refusal is one line with the argument's name, what was expected and what came."""

import numbers
import operator
from typing import Any

__all__ = ["flag", "integer", "integers", "odd", "real", "sequence"]


def integer(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int. Integers of numpy are accepted; ``True`` and ``3.0`` are not."""
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if number >= least:
                return number
    raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r:.100}")


def integers(name: str, value: Any, length: int | None = None, least: int = 1) -> Any:
    """``value`` as a tuple of ``length`` ints; of any length but 0 if ``length`` is None."""
    return tuple(integer(name, item, least) for item in sequence(name, value, length))


def odd(name: str, value: Any) -> int:
    """``value`` as an odd int: the size of a kernel."""
    number = integer(name, value)
    if number % 2 == 0:
        raise ValueError(f"{name}: expected an odd number, got {value!r}")
    return number


def real(name: str, value: Any, least: float = 0.0, below: float = float("inf")) -> float:
    """``value`` as a float of ``[least, below)``."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and least <= float(value) < below:
        return float(value)
    limit = f"at least {least:g}" + (f" and below {below:g}" if below < float("inf") else "")
    raise ValueError(f"{name}: expected a number of {limit}, got {value!r:.100}")


def flag(name: str, value: Any) -> bool:
    """``value``, which is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r:.100}")
    return value


def sequence(name: str, value: Any, length: int | None = None) -> Any:
    """``value`` as a tuple of ``length`` items; of any length but 0 if ``length`` is None."""
    if not isinstance(value, (tuple, list)) or len(value) != (length or len(value) or 1):
        raise ValueError(f"{name}: expected a tuple of {length or 'at least 1'}, got {value!r:.100}")
    return tuple(value)
