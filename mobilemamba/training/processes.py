"""Several processes: joining those that torchrun started, and what they compute together."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ..models.frozen import FrozenBatchNorm

__all__ = ["ALONE", "Processes", "joined", "synchronize_norms"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        rank: number of this one, from 0 to ``count - 1``. Process 0 writes the files.
        device: of this process, on which they exchange tensors.
        here: how many of them are on this machine.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    here: int = 1

    @property
    def share(self) -> tuple[int, int]:
        return self.rank, self.count

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes."""
        if self.count > 1:
            tensor = tensor.to(self.device or "cpu", copy=True)
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """The ``item`` of each process, in the order of their ranks."""
        found = [item] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, item)
        return found

    def count_different(self, items: set[str]) -> int:
        """The number of different items of all processes."""
        return len(set.union(*self.gather(items)))

    def wait(self) -> None:
        """Return when every process is here."""
        self.sum(torch.zeros(()))

    def first_says(self, holds: bool) -> bool:
        """Whether ``holds`` is true in the first process."""
        return bool(self.sum(torch.tensor(float(holds and self.rank == 0))))

    def copy_from_first(self, module: nn.Module) -> None:
        """Give ``module`` the parameters and buffers that it has in the first process."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, 0)


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, if it started this one.

    Args:
        device: ``"cpu"`` or ``"cuda"``, perhaps with an index.

    Yields:
        The processes, and the device of this one: under torchrun, ``cuda`` is the GPU of its local rank.

    Raises:
        ValueError: torchrun started more processes on this machine than it has GPUs, or ``device`` names one GPU for
            all of them.
    """
    place = torch.device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE, place
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {count}, without {', '.join(missing)}: start several processes by torchrun")
    if place.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place.index is not None:
            raise ValueError(f"expected the device cuda for {count} processes, one GPU each, got {device}")
        if local >= gpus:
            raise ValueError(f"expected at most {gpus} processes on this machine, one for each GPU, got {local + 1}")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    try:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        yield Processes(distributed.get_rank(), distributed.get_world_size(), place, here), place
    finally:
        distributed.destroy_process_group()


def synchronize_norms(model: nn.Module, device: torch.device) -> None:
    """Replace every BatchNorm in ``model`` by one with the statistics of all processes, in place.

    Those with frozen statistics stay as they are. On a GPU it is torch's, which takes CUDA tensors only.
    """
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, FrozenBatchNorm):
                kind = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
                new = kind(norm.num_features, norm.eps, norm.momentum, device="meta")
                new._parameters, new._buffers = norm._parameters, norm._buffers
                setattr(parent, name, new.train(norm.training))


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Sum.forward(ctx, grad)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of all processes: ``(B, C, ...) -> (B, C, ...)``.

    The processes must have equally many elements.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not distributed.is_initialized():
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        dims = [dim for dim in range(input.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
        count = distributed.get_world_size()
        var, mean = torch.var_mean(input.float(), dims, correction=0)
        mean, var = mean.double(), var.double()  # so the difference of squares below has no rounding error to speak of
        total: Any = Sum.apply
        mean, square = total(torch.stack([mean, var + mean.square()])) / count
        var, mean = (square - mean.square()).float(), mean.float()
        with torch.no_grad():
            elements = input.numel() // input.size(1) * count
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (elements / (elements - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)
