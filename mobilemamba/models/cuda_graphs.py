"""A network's forward pass as CUDA graphs: one launch for the whole pass, instead of one for each kernel."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["CUDAGraphs"]

WARM_UP = 3  # calls before a capture, as torch.cuda.make_graphed_callables makes: they create what a capture must not

#: torch captures one graph at a time in a process.
CAPTURING = threading.Lock()


class CUDAGraphs:
    """Calls ``model`` by replaying CUDA graphs. At small batches most of the time of a pass goes into its launches.

    ``CUDAGraphs(model.fuse())`` is called as the model is. The first call with images of a new shape runs the model
    several times and captures a graph, which takes a tenth of a second or more. The calls that follow copy their images
    into the graph's input, replay it, and return a copy of its output, which no later call changes.

    A graph belongs to one shape, stride and dtype of the images, one stream, and one setting of autocast. ``limit`` is
    the number of graphs that are kept; a further one replaces the graph whose last call is longest ago. A graph holds
    the memory of its images and its output. The graphs of one stream share their other memory.

    Any thread may call. Calls that share a stream follow one another there. In other streams they run at the same time.

    Replays see weights that change in place, as by ``load_state_dict``. Where a weight moves (``to()``,
    ``load_state_dict(assign=True)``), or a layer or a hook is added, replaced or removed, the next call drops all
    graphs and captures again. Settings of torch, such as TF32, stay as they were at the capture.

    Args:
        model: a module of one argument, a tensor whose values decide no shape and no branch. What it returns may be
            nested in lists, tuples and dictionaries. It stays the caller's, who may move it or load weights.
        limit: the most graphs that are kept.

    Raises:
        ValueError: the model is in training mode or has hooks, the limit is below 1, the images are not on CUDA or on
            another device than the model, or a gradient is asked for.
    """

    def __init__(self, model: nn.Module, limit: int = 8) -> None:
        if limit < 1:
            raise ValueError(f"CUDAGraphs: limit is {limit}, expected at least 1")
        self.model, self.limit = model, limit
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()  # that of the latest call is the last
        self._parts = _Parts(model)

    def __call__(self, images: Tensor) -> Any:
        if images.device.type != "cuda":
            raise ValueError(
                f"CUDAGraphs: the images are on {images.device}, expected CUDA; there, call the model itself"
            )
        if self.model.training:
            raise ValueError("CUDAGraphs: the model is in training mode, expected evaluation: call its eval()")
        with self._lock, torch.cuda.device(images.device):
            if not self._parts.are_unchanged():
                self._graphs.clear()
                self._parts = _Parts(self.model)
            self._check(images)
            if images.numel() == 0:
                return self.model(images)  # launches nothing
            stream = torch.cuda.current_stream()
            autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
            place = (images.device, stream.cuda_stream)
            key = (place, images.shape, images.stride(), images.dtype, autocast)
            graph = self._graphs.get(key)
            if graph is None:
                while len(self._graphs) >= self.limit:
                    self._graphs.popitem(last=False)
                neighbour = next((self._graphs[other] for other in self._graphs if other[0] == place), None)
                graph = self._graphs[key] = _Graph(self.model, images, neighbour)
            self._graphs.move_to_end(key)
            return graph.replay(images)

    def clear(self) -> None:
        """Drop all graphs, which frees their memory."""
        with self._lock:
            self._graphs.clear()

    def _check(self, images: Tensor) -> None:
        if self._parts.device not in (None, images.device):
            raise ValueError(
                f"CUDAGraphs: the model is on {self._parts.device}, expected {images.device} as the images"
            )
        if torch.is_grad_enabled() and (images.requires_grad or self._parts.require_gradients()):
            raise ValueError(
                "CUDAGraphs: a replay has no gradients; call it within torch.inference_mode() or torch.no_grad()"
            )


class _Graph:
    """A captured pass, for one stream: the tensors that it reads and writes."""

    def __init__(self, model: nn.Module, images: Tensor, neighbour: "_Graph | None") -> None:
        """``neighbour`` is another graph of the same stream, with which this one shares memory."""
        # the default stream cannot be captured
        self.side: torch.cuda.Stream = neighbour.side if neighbour else torch.cuda.Stream()
        self.pool: Any = neighbour.pool if neighbour else torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # A tensor of inference mode could not be written outside of it. A capture must not leave its casts to others.
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with CAPTURING, torch.inference_mode(False), torch.no_grad(), autocast:
            self.input = torch.empty_like(images)
            self.input.copy_(images)
            self.side.wait_stream(stream)
            with torch.cuda.stream(self.side):
                for _ in range(WARM_UP):
                    model(self.input)
            stream.wait_stream(self.side)
            # other threads may allocate meanwhile
            with torch.cuda.graph(self.graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                self.output = model(self.input)

    def replay(self, images: Tensor) -> Any:
        with torch.no_grad():
            self.input.copy_(images)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.output)


class _Parts:
    """What a capture depends on: the modules in a model, their hooks, and the memory of their tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.tables: list[dict[Any, Any]] = []
        for name, m in model.named_modules():
            if m._forward_pre_hooks or m._forward_hooks:
                raise ValueError(f"CUDAGraphs: {name or 'the model'} has hooks, which a replay would not run")
            self.tables += [m._modules, m._parameters, m._buffers, m._forward_pre_hooks, m._forward_hooks]
        self.members = list(self._members())
        self.identities = list(map(id, self.members))
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        # Their memory is held, so that no other tensor gets the same address.
        self.memory = [tensor.detach() for tensor in self.tensors]
        self.addresses = [tensor.data_ptr() for tensor in self.memory]
        self.device = self.tensors[0].device if self.tensors else None

    def _members(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self.tables))

    def are_unchanged(self) -> bool:
        """Runs in every call: 30 microseconds for s6."""
        if list(map(id, self._members())) != self.identities:
            return False
        return [tensor.data_ptr() for tensor in self.tensors] == self.addresses

    def require_gradients(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors)
