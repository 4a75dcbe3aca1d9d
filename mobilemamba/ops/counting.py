"""Registers the formulas of ``flops`` when torch's counter is first imported.

The counter imports triton, which takes longer than all of this package, and few programs count.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__: list[str] = []

COUNTER = "torch.utils.flop_counter"


def register() -> None:
    from . import flops  # noqa: F401


class RegisterWithCounter(MetaPathFinder):
    """Finds the counter as others do, but its module registers the formulas after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(COUNTER)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register()
else:
    sys.meta_path.insert(0, RegisterWithCounter())
