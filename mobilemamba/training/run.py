"""The state of a training run, its steps, and how it is stored."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import data, weights
from ..models import MobileMamba
from ..weights.files import atomic_write, torch_save
from ..weights.formats import TRAINING_FORMAT, VERSION
from .config import TrainConfig
from .downstream_tasks import Detection, Segmentation
from .interruption import Interruption
from .log import clock, memory, progress
from .optimization import learning_rate, moving_average, parameter_groups
from .processes import ALONE, Processes, synchronize_norms
from .state import check_same, read_state
from .tasks import Classification, Task

__all__ = ["Run"]

TASKS: dict[str, type[Task]] = {"classify": Classification, "detect": Detection, "segment": Segmentation}


class Run:
    """The state of a training run: networks, optimizer, and the number of epochs and steps that are done.

    Args:
        resume: :meth:`load` follows, so no weights are read to start from.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: data.DataSet | data.AnnotatedData,
        device: torch.device,
        processes: Processes = ALONE,
        resume: bool = False,
    ) -> None:
        self.config, self.dataset, self.device, self.processes = config, dataset, device, processes
        self.interruption, self.asked_to_stop = Interruption(), False
        self.workers = 0
        self.how: dict[str, Any] = {}  # the arguments of train() that are stored
        self.fingerprint = dataset.fingerprint()
        self.task = TASKS[config.task](config, dataset, device)
        parts = processes.count * config.accumulate
        self.batch_size = batch_size(config, len(dataset.train), parts, self.task)
        self.steps_per_epoch = len(dataset.train) // self.batch_size
        self.epoch = self.step = 0  # epochs done, and steps of the next one
        self.total, self.skipped, self.seconds = 0.0, 0, 0.0  # of these: sum of the losses, steps without one, time
        self.entry: dict[str, Any] = {}  # the latest epoch's line of the log, without its accuracy
        torch.manual_seed(config.seed)
        self.model = self.task.create(resume).to(device)
        self.ema = moving_average(self.model, config.ema_decay)
        if config.sync_batchnorm and processes.count > 1:
            synchronize_norms(self.model, device)
        self.task.freeze(self.model)
        for module in self.model.modules():
            if isinstance(module, MobileMamba):
                module.set_grad_checkpointing(config.grad_checkpointing)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = parameter_groups(
            self.model,
            config.weight_decay,
            decay_vectors=config.decay_vectors,
            head_lr=config.head_lr,
            heads=self.task.heads,
        )
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.network: nn.Module = self.model
        if processes.count > 1:
            self.network = DistributedDataParallel(self.model, device_ids=[device] if device.type == "cuda" else None)
        if config.compile:
            self.network.compile()
        if not resume:
            self.task.prepare()

    def train_epoch(self) -> Iterator[None]:
        """Pass over the training images that are left in this epoch, in its random order. Yields after each step."""
        start, before = time.perf_counter(), self.seconds
        batches = data.training_batches(
            self.dataset.train,
            self.task.transform,
            batch_size=self.batch_size,
            seed=self.config.seed,
            epoch=self.epoch,
            first=self.step,
            share=self.processes.share,
            workers=self.workers,
            pin=self.device.type == "cuda",
        )
        self.network.train()
        for images, targets in progress(batches, self.describe, self.steps_per_epoch - self.step):
            self.total += self.train_step(images, targets)
            self.step += 1
            self.seconds = before + time.perf_counter() - start
            yield
        self.epoch += 1
        self.entry = {
            "epoch": self.epoch,
            "loss": round(self.total / max(1, self.steps_per_epoch - self.skipped), 5),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": round(self.steps_per_epoch * self.batch_size / self.seconds, 1),
            "seconds": round(self.seconds, 1),
        }
        self.step, self.total, self.skipped, self.seconds = 0, 0.0, 0, 0.0

    def train_step(self, images: Any, targets: Any) -> float:
        """One step of the optimizer and of the moving average; returns the loss, averaged over all processes.

        In float16 a forward or a backward pass may overflow. The step changes nothing then but the scale of the loss.

        Args:
            images, targets: this process's share of the batch, as :func:`training_batches` yields it.
        """
        config, step = self.config, self.epoch * self.steps_per_epoch + self.step
        key = ("step", config.seed, step, self.processes.rank)
        data.seed_generators(*key)  # for mixing, erasing and stochastic depth
        if self.device.type == "cuda":
            torch.cuda.manual_seed(data.mixed_seed(*key))
        warmup = round(config.warmup_epochs * self.steps_per_epoch)
        rate = learning_rate(step, config.epochs * self.steps_per_epoch, warmup, config.lr, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        parts = self.task.parts(images, targets)
        self.optimizer.zero_grad()
        scales = self.scaler.is_enabled()
        statistics = [buffer.clone() for buffer in self.model.buffers()] if scales else []
        losses: list[Tensor] = []
        for part in parts:
            last = len(losses) == config.accumulate - 1
            with nullcontext() if last or self.network is self.model else self.network.no_sync():  # type: ignore[operator]
                loss = self.loss(*part) / config.accumulate
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.learning, config.clip_grad or math.inf)
        value, norms, signals = self.processes.sum(
            torch.stack([torch.stack(losses).sum(), norm, norm.new_tensor(self.interruption.asked())])
        ).tolist()
        self.asked_to_stop = signals > 0
        finite = math.isfinite(value) and math.isfinite(norms)
        if not finite and not (scales and self.scaler.get_scale() > 1):  # otherwise the scale is halved
            raise FloatingPointError(
                f"loss {value / self.processes.count} with gradient norm {norm.item()} at {self.position()}; expected "
                "finite values: try a lower --lr or a longer --warmup-epochs"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not finite:
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)
            self.skipped += 1
            return 0.0
        self.ema.update_parameters(self.model)
        return value / self.processes.count

    def loss(self, *part: Any) -> Tensor:
        """The mean loss of a part of a batch, as :meth:`Task.parts` makes it."""
        return self.task.loss(self.network, *part)

    def evaluate_epoch(self) -> dict[str, Any]:
        """Measure the model after the latest epoch; returns the epoch's line of the log."""
        start, epochs = time.perf_counter(), self.config.epochs
        measures, entry = self.measures(), self.entry
        left = clock((entry["seconds"] + time.perf_counter() - start) * (epochs - self.epoch))
        told = "  ".join(f"{name} {value:.2%}" for name, value in measures.items())
        print(
            f"epoch {self.epoch}/{epochs}  loss {entry['loss']:.4f}  {told}  "
            f"{entry['images_per_s']:.0f} images/s  {memory(self.device)}  {left} left",
            flush=True,
        )
        return {**entry, **{f"ema_{name}": value for name, value in measures.items()}}

    def measures(self) -> dict[str, float]:
        """The measures of the moving average on the test images, by name; that of the task comes first."""
        model = self.ema.module
        self.processes.copy_from_first(model)
        size = max(1, self.config.batch_size // self.processes.count)
        return self.task.evaluate(model, size, self.workers, self.processes)

    def describe(self, done: int, total: int, seconds: float) -> str:
        """The progress line of the terminal, after ``done`` steps that took ``seconds``."""
        steps, step = self.steps_per_epoch, self.step
        left = seconds / done * (steps * (self.config.epochs - self.epoch) - step)
        return (
            f"epoch {self.epoch + 1}  step {step}/{steps}  loss {self.total / max(1, step - self.skipped):.3f}  "
            f"{done * self.batch_size / seconds:.0f} images/s  {memory(self.device)}  {clock(left)} left"
        )

    def position(self) -> str:
        """Where the run is, for messages."""
        return f"step {self.step} of epoch {self.epoch + 1}"

    def facts(self) -> dict[str, Any]:
        """What does not determine the result, but its last bits."""
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
        }

    def save(self, path: Path) -> None:
        """Write the state to ``path``. If that fails, an older file at ``path`` stays as it was."""
        state = {
            "format": TRAINING_FORMAT,
            "version": VERSION,
            "meta": self.task.meta(),
            "config": asdict(self.config),
            "data": self.fingerprint,
            "facts": self.facts(),
            "epoch": self.epoch,
            "step": self.step,
            "total": self.total,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "bad": {part: getattr(self.dataset, part).bad for part in ("train", "test")},
            "how": self.how,
            "entry": self.entry,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        atomic_write(path, lambda temporary: torch_save(state, temporary))

    def load(self, path: Path) -> None:
        """Continue from the state that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, or its run had other options or data.
        """
        state = read_state(path)
        try:
            if state["config"].get("task", "classify") == self.config.task:  # otherwise check_same() refuses
                for model in (self.model, self.ema.module):
                    self.task.restore(model, state["meta"])
            check_same(state, self.config, self.task.meta(), self.fingerprint)
            weights.load_into(self.model, state["model"])
            weights.load_into(self.ema.module, state["ema"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "step", "total", "skipped", "seconds", "entry"):
            setattr(self, name, state[name])
        for part, bad in state["bad"].items():
            getattr(self.dataset, part).bad.update(bad)
        self.ema.n_averaged.fill_(self.epoch * self.steps_per_epoch + self.step)
        self.task.prepare()
        if (before := state["config"]["epochs"]) != self.config.epochs:
            print(f"{self.config.epochs} epochs instead of {before}: the learning rate follows the longer schedule")
        now = self.facts()
        reasons = [f"{key} {was} (now {now[key]})" for key, was in state["facts"].items() if was != now[key]]
        if self.device.type == "cuda":
            reasons.append("a GPU adds in no fixed order")
        if self.processes.count > 2:
            reasons.append("three or more processes add gradients in another order in their first step")
        if reasons:
            print(f"the run goes on, but not bit for bit: {', '.join(reasons)}")

    def export(self, path: Path) -> dict[str, float]:
        """Store the moving average for inference; returns the measures of the stored weights, read back."""
        if self.processes.rank == 0:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.ema.module.state_dict().items()}
            if self.config.half:  # vectors (biases, BatchNorm) are a small share and stay float32
                tensors = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
            weights.load_into(self.ema.module, self.task.save(path, tensors), source=path)
        return self.measures()


def batch_size(config: TrainConfig, images: int, parts: int, task: Task) -> int:
    """The images of a step: ``config.batch_size``, or the largest number that ``images`` allow.

    Args:
        images: number of training images.
        parts: number of parts of a step, in all processes.

    Raises:
        ValueError: the batch has no equal parts, or parts of too few images.
    """
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of {parts}, the processes times --accumulate, got {config.batch_size}"
        )
    task.check_parts(config.batch_size // parts * config.accumulate)
    even = 2 * parts // math.gcd(2, config.accumulate) if config.mixup or config.cutmix else parts
    size = min(config.batch_size, images) // even * even
    if size < config.batch_size:
        print(f"batches of {size} images instead of {config.batch_size}: the data have no more")
    if size < task.least_images * parts:
        what = "BatchNorm needs at least 2 images" if task.least_images > 1 else "expected at least 1 image"
        raise ValueError(f"{what} in each part of a batch, got {size} in {parts} parts")
    return size
