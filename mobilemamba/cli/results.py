"""Results of images on stdout, as they are made."""

import json
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["print_json", "print_tables"]

Result = dict[str, Any]


def print_tables(results: Iterable[Result], table: Callable[[Result], str]) -> None:
    for i, result in enumerate(results):
        print(*([""] if i else []), table(result), sep="\n", flush=True)


def print_json(results: Iterable[Result]) -> None:
    """One list, written item by item."""
    start = "["
    for result in results:
        print(start + "\n" + textwrap.indent(json.dumps(result, indent=2), "  "), end="", flush=True)
        start = ","
    print("\n]" if start == "," else "[]")
