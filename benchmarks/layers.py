"""Where the time of a forward pass goes: by stage and kind of layer, and by operator inside MRFFI.

Every layer is bracketed for torch's profiler, which slows the pass down; the last rows put the sum beside the time that
the pass takes by itself. On CUDA the times are those of the kernels. A layer's time has in it what Python does there.
"""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

COLUMNS = ["stage", "layer", "calls", "ms, median", "%", "MMACs", "GFLOP/s"]
MARK = "layer: "
INSIDE = "· "  # what starts with it is an operator in the layer above, and is not summed
SMALL = 0.05  # of its layer: operators below that are taken together

#: From a module's name to its kind; the first that fits. Modules without one belong to the layer around them.
KINDS = [
    (r"patch_embed", "patch embedding"),
    (r"stages\.\d\.transition\.[03]", "transition: depthwise"),
    (r"stages\.\d\.transition\.[14]", "transition: FFN"),
    (r"stages\.\d\.transition\.2\.expand", "transition: expand"),
    (r"stages\.\d\.transition\.2\.depthwise", "transition: depthwise, stride 2"),
    (r"stages\.\d\.transition\.2\.squeeze_excite", "transition: squeeze-excite"),
    (r"stages\.\d\.transition\.2\.project", "transition: project"),
    (r"stages\.\d\.transition\.2", "transition: patch merging"),
    (r"stages\.\d\.blocks\.\d+\.depthwise[01]", "depthwise"),
    (r"stages\.\d\.blocks\.\d+\.ffn[01]", "FFN"),
    (r"stages\.\d\.blocks\.\d+\.mixer", "MRFFI"),
    (r"stages\.\d\.blocks\.\d+", "block: the rest"),
    (r"head", "head"),
    (r"", "pooling and the rest"),
]


def kind_of(name: str) -> tuple[str, str] | None:
    """Stage (from 1) and kind of the layer that is the module ``name``."""
    for pattern, kind in KINDS:
        if re.fullmatch(pattern, name):
            stage = re.match(r"stages\.(\d)", name)
            return str(int(stage[1]) + 1) if stage else "", kind
    return None


class Marks:
    """Brackets the calls of every module that is a layer, for the profiler, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kinds = {name: kind for name, _ in model.named_modules() if (kind := kind_of(name))}

    def __enter__(self) -> None:
        self.hooks = ExitStack()
        for name, module in self.model.named_modules():
            if name in self.kinds:
                open_marks: list[record_function] = []

                def enter(*_: Any, name: str = name, marks: list[record_function] = open_marks) -> None:
                    marks.append(record_function(MARK + name))
                    marks[-1].__enter__()

                def leave(*_: Any, marks: list[record_function] = open_marks) -> None:
                    marks.pop().__exit__(None, None, None)

                self.hooks.callback(module.register_forward_pre_hook(enter).remove)
                self.hooks.callback(module.register_forward_hook(leave).remove)

    def __exit__(self, *_: Any) -> None:
        self.hooks.close()


def layer_of(event: Any) -> str | None:
    return event.name.removeprefix(MARK) if event.name.startswith(MARK) else None


def within(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from within(child)


Key = tuple[str, str]  # stage and layer, or operator of the layer


def layers_of(events: list[Any], kinds: dict[str, Key], flops: dict[str, dict[Any, int]], on_cuda: bool) -> dict:
    """Per key calls, milliseconds and flops of one profiled pass."""
    found: dict[Key, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])

    def add(key: Key, milliseconds: float, flops: float) -> None:
        for i, value in enumerate((1, milliseconds, flops)):
            found[key][i] += value

    def milliseconds(event: Any) -> float:
        return (event.device_time_total if on_cuda else event.cpu_time_total) / 1e3

    layers = [event for event in events if layer_of(event) and event.device_type == torch.autograd.DeviceType.CPU]

    def flops_of_call(event: Any) -> float:
        return sum(flops[layer_of(event)].values())

    for event in layers:
        nested = [child for child in event.cpu_children if layer_of(child) is not None]
        own = milliseconds(event) - sum(milliseconds(child) for child in nested)
        name = layer_of(event)
        stage, kind = kinds[name]
        add((stage, kind), own, flops_of_call(event) - sum(flops_of_call(child) for child in nested))
        if kind == "MRFFI":
            for operator in event.cpu_children:
                names = {inner.name.replace("::", ".") for inner in (operator, *within(operator))}
                of_operator = sum(count for packet, count in flops[name].items() if str(packet) in names)
                # the same operator may be there several times, and the counter has their sum
                calls = sum(other.name == operator.name for other in event.cpu_children)
                add((stage, INSIDE + operator.name), milliseconds(operator), of_operator / calls)
    return found


def without_small(passes: list[dict[Key, list[float]]]) -> list[dict[Key, list[float]]]:
    """The same with operators that have no flops and next to no time taken together."""

    def median(key: Key) -> float:
        return statistics.median(found[key][1] for found in passes)

    def is_small(key: Key) -> bool:
        inside = key[1].startswith(INSIDE) and not passes[0][key][2]
        return inside and median(key) < SMALL * median((key[0], "MRFFI"))

    small = {key for key in passes[0] if is_small(key)}
    result = []
    for found in passes:
        kept: dict[Key, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for key, values in found.items():
            name = (key[0], f"{INSIDE}small operators") if key in small else key
            kept[name] = [a + b for a, b in zip(kept[name], values, strict=True)]
        result.append(kept)
    return result


def flops_of(model: nn.Module, x: Tensor) -> dict[str, dict[Any, int]]:
    """Per module, by operator; what its children do is in it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    root = type(model).__name__
    return defaultdict(dict) | {
        name.removeprefix(root).removeprefix("."): counts
        for name, counts in counter.get_flop_counts().items()
        if name != "Global"
    }


def profile(model: nn.Module, x: Tensor, rounds: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The rows of the table, and the same for JSON; ``rounds`` profiled passes and as many by themselves, by turns."""
    on_cuda = x.device.type == "cuda"
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    marks = Marks(model)
    with marks:  # as in the profiled passes, where the layers are no single operator
        flops = flops_of(model, x)
    passes, alone = [], []
    with torch.inference_mode():
        for i in range(rounds + 2):  # two rounds to warm up
            wait()
            start = time.perf_counter()
            model(x)
            wait()
            seconds = time.perf_counter() - start
            with marks, torch.profiler.profile(activities=activities) as profiler:
                model(x)
                wait()
            if i >= 2:
                alone.append(seconds * 1e3)
                passes.append(layers_of(profiler.events(), marks.kinds, flops, on_cuda))
    passes = without_small(passes)
    medians = {key: statistics.median(found[key][1] for found in passes) for key in passes[0]}
    total = sum(medians[key] for key in medians if not key[1].startswith(INSIDE))
    for key in sorted(medians, key=order_of(list(medians))):
        calls, _, counted = passes[0][key]
        rate = f"{counted / medians[key] / 1e6:.0f}" if counted else "-"
        figures = [f"{medians[key]:.3f}", f"{medians[key] / total:.1%}", f"{counted / 2e6:.1f}", rate]
        result = {"ms": [found[key][1] for found in passes], "MMACs": counted / 2e6}
        yield [*key, str(calls), *figures], {"stage": key[0], "layer": key[1], "calls": calls, **result}
    counted = sum(flops[""].values())
    for what, values in (("sum of the layers", [total]), ("the pass without the profiler", alone)):
        median = statistics.median(values)
        figures = [f"{median:.3f}", f"{median / total:.1%}", f"{counted / 2e6:.1f}", f"{counted / median / 1e6:.0f}"]
        yield ["", what, "1", *figures], {"layer": what, "ms": values, "MMACs": counted / 2e6}


def order_of(keys: list[Key]) -> Any:
    """Layers as they come, operators after their layer by themselves."""
    first = {key: i for i, key in enumerate(keys) if not key[1].startswith(INSIDE)}
    return lambda key: (first.get(key, first.get((key[0], "MRFFI"))), key not in first)
