"""The training loop: one process, from a data set to a checkpoint that ``classify`` reads, resumable bit for bit.

All random values depend only on the seed and the epoch. So a checkpoint at the end of an epoch needs no generator
state: a run that was killed and resumed gives the same bits as one that was not.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, weights
from ..models import MobileMamba
from ..models.options import ModelOptions
from ..weights.checkpoint import shorten
from ..weights.files import atomic_write
from ..weights.formats import TRAINING_FORMAT, VERSION, load_torch
from ..zoo import create_model
from .config import TrainConfig
from .evaluation import evaluate
from .log import Log, clock, progress
from .optimization import Ema, learning_rate, parameter_groups

__all__ = ["Run", "train"]


def train(config: TrainConfig, out: Path, device: str = "cpu", resume: bool = False) -> float:
    """Train a model and store it in the folder ``out``.

    The run writes ``log.jsonl`` (one line per epoch), ``last.pt`` (the complete state after the latest epoch) and, at
    the end, ``model.pt`` (the moving average of the weights).

    Args:
        config: the options that determine the result.
        out: the folder; it is made if it is missing.
        device: ``"cpu"`` or ``"cuda"``, perhaps with an index.
        resume: continue from ``last.pt`` if ``out`` has one.

    Returns:
        The test accuracy of the stored weights, from 0 to 1.

    Raises:
        ValueError: an option or the data cannot be used, or ``last.pt`` was made with other options or data.
        FileExistsError: ``out`` holds a run and ``resume`` is False.
        FloatingPointError: the loss or its gradient is not finite. ``last.pt`` keeps the state of the latest epoch.
    """
    last, log_file, model_file = files = [out / name for name in ("last.pt", "log.jsonl", "model.pt")]
    for path in files:
        if path.exists() and not resume:
            raise FileExistsError(f"{path} exists: continue that run with --resume, or choose another folder")
    run = Run(config, data.load(config.data, config.image_size), torch.device(device))
    if last.exists():
        run.load(last)
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        for unfinished in out.glob(f".{path.name}.*.tmp"):  # left by a process that was killed while saving
            unfinished.unlink()
    log = Log(log_file, epochs_done=run.epoch)
    log.write({"config": asdict(config), "parameters": run.parameters, "torch": torch.__version__, "epoch": run.epoch})
    while run.epoch < config.epochs:
        log.write(run.train_epoch())
        run.save(last)
    accuracy = run.export(model_file)
    log.write({"test_accuracy": accuracy, "file": model_file.name})
    return accuracy


class Run:
    """The state of a training run. It advances by whole epochs."""

    def __init__(self, config: TrainConfig, dataset: data.DataSet, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.batch_size = min(config.batch_size, len(dataset.train.labels))
        if self.batch_size < 2:
            raise ValueError(f"BatchNorm needs at least 2 images in a batch, got {self.batch_size}")
        self.steps_per_epoch = len(dataset.train.labels) // self.batch_size
        self.augment = data.Augmentation(config.flip, config.crop, config.erase)
        self.model_args = ModelOptions(num_classes=len(dataset.labels), in_chans=dataset.preprocessing.channels)
        self.epoch = 0
        torch.manual_seed(config.seed)
        options: ModelOptions = {**self.model_args, "drop_path_rate": config.drop_path}
        model = create_model(config.model, **options)
        self.model: MobileMamba = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.ema = Ema(self.model, config.ema_decay)
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)

    def train_epoch(self) -> dict[str, Any]:
        """Pass once over the training images, in the random order of this epoch; returns its line of the log."""
        config, start, total = self.config, time.perf_counter(), 0.0
        seed = config.seed * 1_000_003 + self.epoch + 1
        torch.manual_seed(seed)  # for stochastic depth
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.dataset.train.labels), generator=generator)
        batches = order[: self.steps_per_epoch * self.batch_size].view(-1, self.batch_size)
        self.model.train()
        for i, index in enumerate(progress(batches, self.describe)):
            images = self.augment(self.dataset.train.images(index), generator)
            total += self.train_step(images, self.dataset.train.labels[index], self.epoch * len(batches) + i)
        self.epoch += 1
        seconds = time.perf_counter() - start
        entry = {
            "epoch": self.epoch,
            "loss": round(total / len(batches), 5),
            "ema_accuracy": evaluate(self.ema.model, self.dataset.test, self.dataset.preprocessing),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": round(batches.numel() / seconds, 1),
            "seconds": round(seconds, 1),
        }
        left = clock((time.perf_counter() - start) * (config.epochs - self.epoch))
        print(
            f"epoch {self.epoch}/{config.epochs}  loss {entry['loss']:.4f}  test {entry['ema_accuracy']:.2%}  "
            f"{entry['images_per_s']:.0f} images/s  {left} left",
            flush=True,
        )
        return entry

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> float:
        """One step of the optimizer and of the moving average; returns the loss.

        Args:
            images: augmented, uint8 ``(B, C, H, W)``.
            labels: int64 ``(B,)``.
            step: number of the step, from 0 in the first epoch.
        """
        config = self.config
        warmup = round(config.warmup_epochs * self.steps_per_epoch)
        lr = learning_rate(step, config.epochs * self.steps_per_epoch, warmup, config.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = self.dataset.preprocessing.normalize(images.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels.to(self.device), label_smoothing=config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        value = loss.item()
        if not math.isfinite(value + norm.item()):
            raise FloatingPointError(
                f"loss {value} with gradient norm {norm.item()} at step {step} (epoch {self.epoch + 1}); "
                "expected finite values: try a lower --lr or a longer --warmup-epochs"
            )
        self.optimizer.step()
        self.ema.update(self.model, step)
        return value

    def describe(self, done: int, total: int, seconds: float) -> str:
        """The progress line of the terminal, ``done`` of ``total`` steps and ``seconds`` into the epoch."""
        left = seconds / done * (total * (self.config.epochs - self.epoch) - done)
        rate = done * self.batch_size / seconds
        return f"epoch {self.epoch + 1}  step {done}/{total}  {rate:.0f} images/s  {clock(left)} left"

    def meta(self) -> dict[str, Any]:
        """The facts about the model that go into every checkpoint."""
        return {
            "preset": self.config.model,
            "model_args": self.model_args,
            "labels": list(self.dataset.labels),
            "preprocessing": self.dataset.preprocessing.to_dict(),
        }

    def save(self, path: Path) -> None:
        """Write the state to ``path``. If that fails, an older file at ``path`` stays as it was."""
        state = {
            "format": TRAINING_FORMAT,
            "version": VERSION,
            "meta": self.meta(),
            "config": asdict(self.config),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        atomic_write(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Continue from the state that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, or its run had other options or data.
        """
        try:
            self.restore(load_torch(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def restore(self, state: Any) -> None:
        """Continue from ``state``; the errors of :meth:`load`, without the name of the file."""
        ours = isinstance(state, dict) and state.get("format") == TRAINING_FORMAT
        version = state.get("version") if ours else "something else"
        if version != VERSION:
            raise ValueError(f"expected a training checkpoint of version {VERSION}, got {version}")
        parts = {"config": dict, "meta": dict, "epoch": int, "model": dict, "ema": dict, "optimizer": dict}
        absent = [part for part, kind in parts.items() if not isinstance(state.get(part), kind)]
        if absent:
            raise ValueError(f"expected a complete training checkpoint, got one without {', '.join(absent)}")
        was = {**state["config"], **facts(state["meta"])}
        now = {**asdict(self.config), **facts(self.meta())}
        keys = (key for key in {**was, **now} if was.get(key) != now.get(key))
        if differing := [f"{key} {was.get(key)} (now {now.get(key)})" for key in keys]:
            raise ValueError(f"made with other options or data, expected the same: {shorten(differing)}")
        weights.load_into(self.model, state["model"])
        weights.load_into(self.ema.model, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]

    def export(self, path: Path) -> float:
        """Store the moving average for inference; returns the test accuracy of the stored weights, read back."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.ema.model.state_dict().items()}
        if self.config.half:  # vectors (biases, BatchNorm) are a small share and stay float32
            tensors = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
        weights.save(path, weights.Checkpoint(tensors, **{**self.meta(), "preprocessing": self.dataset.preprocessing}))
        weights.load_into(self.ema.model, weights.read(path).state_dict, source=path)
        return evaluate(self.ema.model, self.dataset.test, self.dataset.preprocessing)


def facts(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` with one entry for each label, so that a comparison names the labels that differ."""
    labels = {f"label {i}": label for i, label in enumerate(meta.get("labels") or ())}
    return {**{key: value for key, value in meta.items() if key != "labels"}, **labels}
