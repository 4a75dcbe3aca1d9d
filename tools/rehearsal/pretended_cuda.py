"""Stands for a GPU where there is none, so that programs for CUDA run up to their launches.

Tensors that a program puts on CUDA have no data: they are torch's meta tensors, and say that they are on ``cuda:0``.
So each call makes its checks of shapes, types and devices, and computes nothing. Streams, events, graphs and figures of
memory are those below; each call of torch.cuda is held against the signature of torch's own function. torch.compile
returns what it is given, and a number that is read from a tensor is 1.

With ``storage="cpu"`` the tensors have data: operators are computed by the CPU, and a graph replays what it recorded.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
GIB = 2**30

#: How a value of a tensor becomes one of Python, by the type of the result.
VALUES = {
    Tensor.item: float,
    Tensor.__float__: float,
    Tensor.__int__: int,
    Tensor.__index__: int,
    Tensor.__bool__: bool,
}
#: What brings data from CUDA to the CPU.
COPIES = {Tensor.to, Tensor.cpu, Tensor.copy_}
BETWEEN_DEVICES = {Tensor.data.__set__, torch._has_compatible_shallow_copy_type}
#: What programs ask most, and needs nothing of this file.
FACTS = {Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.shape.__get__, Tensor.dtype.__get__, torch.device}
DEVICE_OF = {Tensor.device.__get__}
TYPES_OF_DEVICES = {Tensor.is_cuda.__get__: "cuda", Tensor.is_cpu.__get__: "cpu"}


class OnCUDA(TorchFunctionMode):
    """Inside this context CUDA is there: its tensors are on ``storage``, and their attributes say CUDA."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.storage = storage

    def stored(self, value: Any) -> Any:
        """An argument of a call, which may be a device, as the storage's device."""
        if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
            return torch.device(self.storage) if torch.device(value).type == "cuda" else value
        return value

    def reported(self, device: torch.device) -> torch.device:
        return DEVICE if device.type == self.storage else device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            return func(*args, **kwargs)
        if func in DEVICE_OF:
            return self.reported(func(*args))
        if func in TYPES_OF_DEVICES:
            return self.reported(args[0].device).type == TYPES_OF_DEVICES[func]
        if func in VALUES and self.storage == "meta" and args[0].is_meta:
            return VALUES[func](1)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], DEVICE, *args[2:])
        args = [self.stored(value) for value in args]
        kwargs = {name: self.stored(value) for name, value in kwargs.items()}
        if func in COPIES and self.storage == "meta":
            return copied(func, args, kwargs)
        if func not in BETWEEN_DEVICES:
            check_devices(func, args)
        return func(*args, **kwargs)


def copied(func: Any, args: Any, kwargs: Any) -> Any:
    """What copies a tensor without data to the CPU, or ``func``."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:  # torch: cannot copy out of meta tensor
        return args[0] if func is Tensor.copy_ else torch.zeros_like(args[0], device="cpu")


def check_devices(func: Any, args: list[Any]) -> None:
    """As CUDA's kernels do; many of torch's for meta tensors do not. A tensor of one number may be anywhere."""
    found = {
        x.is_meta
        for arg in args
        for x in (arg if isinstance(arg, list | tuple) else (arg,))
        if isinstance(x, Tensor) and x.dim() > 0
    }
    if len(found) > 1:
        raise RuntimeError(f"{func}: expected all tensors on one device, got some on {DEVICE} and some on the CPU")


class Recorder(TorchDispatchMode):
    """Records the operators that run, for a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Computes the operators again, from the same memory into the same memory."""
        for func, args, kwargs, result in self.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True):
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Stream:
    """A stream, whose work is done when it is queued."""

    count = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        Stream.count += 1
        self.cuda_stream, self.device = Stream.count, DEVICE

    def wait_stream(self, stream: "Stream") -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: "Event") -> float:
        return 1.0  # milliseconds


class CUDAGraph:
    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.replays = 0

    def replay(self) -> None:
        if self.recorder is None:
            raise RuntimeError("a replay before the capture")
        self.replays += 1
        if computes():
            self.recorder.replay()


class OfThread(threading.local):
    """A thread's stream, and its graph during a capture."""

    def __init__(self) -> None:
        self.streams = [DEFAULT]


DEFAULT = Stream()
THREAD = OfThread()


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    THREAD.streams.append(stream or THREAD.streams[-1])
    try:
        yield
    finally:
        THREAD.streams.pop()


@contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    if capture_error_mode not in ("global", "thread_local", "relaxed") or stream is DEFAULT:
        raise RuntimeError(f"a capture of the stream {stream} in the mode {capture_error_mode}")
    cuda_graph.recorder = Recorder()
    with cuda_graph.recorder, IN_STREAM(stream or Stream()):
        yield


IN_STREAM = stream


def computes() -> bool:
    return any(isinstance(mode, OnCUDA) and mode.storage == "cpu" for mode in modes())


def modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()


def properties(device: Any = None) -> SimpleNamespace:
    # few bytes of L2, so that operators.py draws one set of tensors for each operator
    facts = {"major": 9, "minor": 0, "total_memory": 80 * GIB, "L2_cache_size": 1, "multi_processor_count": 132}
    return SimpleNamespace(name="NVIDIA Rehearsal", **facts)


#: For what programs call: a function or class of torch.cuda by its name there.
TORCH_CUDA: dict[str, Any] = {
    "CUDAGraph": CUDAGraph,
    "Event": Event,
    "Stream": Stream,
    "_sleep": lambda cycles: None,
    "current_device": lambda: 0,
    "current_stream": lambda device=None: THREAD.streams[-1],
    "device": lambda device: nullcontext(),
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: properties().name,
    "get_device_properties": properties,
    "graph": graph,
    "graph_pool_handle": lambda: (0, 1),
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "is_bf16_supported": lambda including_emulation=True: True,
    "max_memory_allocated": lambda device=None: GIB,
    "mem_get_info": lambda device=None: (80 * GIB, 80 * GIB),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "stream": stream,
    "synchronize": lambda device=None: None,
}


def held_against(real: Any, stand_in: Any) -> Any:
    """``stand_in``, which refuses the calls that ``real`` refuses. Some classes of torch have no signature."""
    try:
        signature = inspect.signature(real)
    except ValueError:
        return stand_in

    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return stand_in(*args, **kwargs)

    return call


@contextmanager
def pretended(storage: str = "meta") -> Iterator[None]:
    """Inside this context this thread has a GPU; other threads have one inside ``OnCUDA(storage)``."""
    on_cuda = OnCUDA(storage)
    context_of = DeviceContext.__init__
    with ExitStack() as stack:

        def replace(where: Any, name: str, stand_in: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, stand_in))

        for name, stand_in in TORCH_CUDA.items():
            replace(torch.cuda, name, held_against(getattr(torch.cuda, name), stand_in))
        accelerator = torch.accelerator  # its own way to the stream, which optimizers take from torch 2.14 on
        current = held_against(accelerator.current_stream, TORCH_CUDA["current_stream"])
        replace(accelerator, "current_stream", current)
        for name in ("start", "stop"):
            replace(torch.cuda.profiler, name, held_against(getattr(torch.cuda.profiler, name), lambda: None))
        replace(DeviceContext, "__init__", lambda self, device: context_of(self, on_cuda.stored(device)))
        replace(torch, "compile", held_against(torch.compile, lambda model, **options: model))
        replace(FunctionEvent, "device_time_total", property(lambda event: 1.0))  # microseconds
        stack.enter_context(on_cuda)
        yield


def install() -> None:
    """From here to the end of the process."""
    context = pretended()
    KEPT.append(context)
    context.__enter__()


KEPT: list[Any] = []  # a context that is no longer held ends
