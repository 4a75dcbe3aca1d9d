"""The arguments of :class:`MobileMamba` as one type, for functions that pass them on."""

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from torch import nn
from typing_extensions import TypedDict

from .backbone import MobileMamba

__all__ = ["ModelOptions", "with_model_options"]

F = TypeVar("F", bound=Callable[..., Any])


class ModelOptions(TypedDict, total=False):
    """Arguments of :class:`MobileMamba`, which documents them. Each may be left out: a preset has a value for it."""

    num_classes: int
    in_chans: int
    distillation: bool
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    global_ratios: tuple[float, ...]
    local_ratios: tuple[float, ...]
    wavelet_kernels: tuple[int, ...]
    local_kernels: tuple[tuple[int, ...], ...]
    patch_strides: tuple[int, ...]
    ssm_ratio: float
    d_state: int
    directions: int
    mixer: str | Callable[[int], nn.Module]
    drop_path_rate: float


class _OfThePreset:
    """Stands for a default that depends on the preset."""

    def __repr__(self) -> str:
        return "<the preset's>"


def with_model_options(preset: Mapping[str, Any] | None = None, without: Collection[str] = ()) -> Callable[[F], F]:
    """Give a function that takes ``**options: Unpack[ModelOptions]`` a signature with every option, for ``help()``.

    Args:
        preset: the preset's arguments, shown as defaults. Arguments that the preset leaves out have the defaults of
            :class:`MobileMamba`. None: the preset is chosen at the call, so no default is known.
        without: options that the function does not take.
    """

    def decorate(function: F) -> F:
        kinds = typing.get_type_hints(MobileMamba.__init__)
        own = inspect.signature(function)
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_OfThePreset() if preset is None else preset.get(name, parameter.default),
                annotation=kinds[name],
            )
            for name, parameter in inspect.signature(MobileMamba).parameters.items()
            if name not in without
        ]
        kept = [parameter for parameter in own.parameters.values() if parameter.kind != inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
        return function

    return decorate
