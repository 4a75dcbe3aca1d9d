"""The training loop: one process, from a data set to a checkpoint that ``classify`` reads, resumable bit for bit.

All random values depend only on the seed and the epoch. So a checkpoint at the end of an epoch needs no generator
state: a run that was killed and resumed gives the same bits as one that was not.
"""

import math
import sys
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
from ..weights.files import atomic_write, torch_save
from ..weights.formats import TRAINING_FORMAT, VERSION
from ..zoo import create_model
from .config import TrainConfig
from .evaluation import evaluate
from .folder import RunFolder
from .log import Log, clock, progress
from .optimization import Ema, learning_rate, parameter_groups
from .state import check_same, read_state

__all__ = ["Run", "train"]


def train(config: TrainConfig, out: Path, device: str = "cpu", resume: bool = False) -> float:
    """Train a model and store it in the folder ``out``.

    The run writes ``log.jsonl`` (one line per epoch), ``last.pt`` (the complete state at the start, and after the
    training part of each epoch) and, at the end, ``model.pt`` (the moving average of the weights).

    Args:
        config: the options that determine the result.
        out: the folder; it is made if it is missing.
        device: ``"cpu"`` or ``"cuda"``, perhaps with an index.
        resume: continue from ``last.pt``. The options must be those of the run (:func:`stored_config`), except that the
            data may be elsewhere and the number of epochs may be larger: the learning rate then follows the schedule
            of the new number.

    Returns:
        The test accuracy of the stored weights, from 0 to 1.

    Raises:
        ValueError: an option or the data cannot be used, or ``last.pt`` was made with other options or data.
        FileExistsError: ``out`` holds a run and ``resume`` is False.
        FileNotFoundError: ``out`` holds no run and ``resume`` is True; or the data are missing.
        BlockingIOError: another process trains in ``out``.
        FloatingPointError: the loss or its gradient is not finite. ``last.pt`` keeps the state of the latest epoch.
    """
    folder = RunFolder(out)
    folder.check(resume)
    try:
        dataset = data.load(config.data, config.image_size, config.on_bad_image)
    except FileNotFoundError as error:
        hint = "; if the data have moved, say where with --data" if resume else ""
        raise FileNotFoundError(f"{error}{hint}") from error
    print(f"{config.data}: {dataset.describe()}", flush=True)
    run = Run(config, dataset, torch.device(device))
    with folder.locked():
        folder.check(resume)  # another process may have trained here since
        if resume:
            run.load(folder.last)
        else:
            run.save(folder.last)  # before the first epoch: a folder that cannot be written costs no epoch
        log = Log(folder.log, epochs_done=run.epoch)
        log.write(
            {"config": asdict(config), "parameters": run.parameters, "torch": torch.__version__, "epoch": run.epoch}
        )
        if run.epoch and run.epoch not in log.epochs:  # stopped between training and the end of the evaluation
            log.write(run.evaluate_epoch())
        while run.epoch < config.epochs:
            run.train_epoch()
            run.save(folder.last)
            log.write(run.evaluate_epoch())
        accuracy = run.export(folder.model)
        bad = dataset.bad_images()
        log.write({"test_accuracy": accuracy, "file": folder.model.name, "bad_images": bad})
    if bad:
        print(f"{bad} bad images were skipped; each is named above", file=sys.stderr)
    return accuracy


class Run:
    """The state of a training run. It advances by whole epochs."""

    def __init__(self, config: TrainConfig, dataset: data.DataSet, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.batch_size = min(config.batch_size, len(dataset.train.labels))
        if self.batch_size < 2:
            raise ValueError(f"BatchNorm needs at least 2 images in a batch, got {self.batch_size}")
        self.fingerprint = dataset.fingerprint()
        self.steps_per_epoch = len(dataset.train.labels) // self.batch_size
        self.augment = data.Augmentation(config.flip, config.crop, config.erase)
        self.model_args = ModelOptions(num_classes=len(dataset.labels), in_chans=dataset.preprocessing.channels)
        self.epoch = 0
        self.entry: dict[str, Any] = {}  # the latest epoch's line of the log, without its accuracy
        torch.manual_seed(config.seed)
        assert config.drop_path is not None  # TrainConfig fills in the preset's
        options: ModelOptions = {**self.model_args, "drop_path_rate": config.drop_path}
        model = create_model(config.model, **options)
        self.model: MobileMamba = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.ema = Ema(self.model, config.ema_decay)
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)

    def train_epoch(self) -> None:
        """Pass once over the training images, in the random order of this epoch."""
        config, start, total = self.config, time.perf_counter(), 0.0
        seed = config.seed * 1_000_003 + self.epoch + 1
        torch.manual_seed(seed)  # for stochastic depth
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.dataset.train.labels), generator=generator)
        batches = order[: self.steps_per_epoch * self.batch_size].view(-1, self.batch_size)
        self.model.train()
        for i, index in enumerate(progress(batches, self.describe, len(batches))):
            images, labels = self.dataset.train.batch(index, replace=True)
            total += self.train_step(self.augment(images, generator), labels, self.epoch * len(batches) + i)
        self.epoch += 1
        seconds = time.perf_counter() - start
        self.entry = {
            "epoch": self.epoch,
            "loss": round(total / len(batches), 5),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": round(batches.numel() / seconds, 1),
            "seconds": round(seconds, 1),
        }

    def evaluate_epoch(self) -> dict[str, Any]:
        """Measure the accuracy after the latest epoch; returns the epoch's line of the log."""
        start, epochs = time.perf_counter(), self.config.epochs
        accuracy, entry = self.accuracy(), self.entry
        left = clock((entry["seconds"] + time.perf_counter() - start) * (epochs - self.epoch))
        print(
            f"epoch {self.epoch}/{epochs}  loss {entry['loss']:.4f}  test {accuracy:.2%}  "
            f"{entry['images_per_s']:.0f} images/s  {left} left",
            flush=True,
        )
        return {**entry, "ema_accuracy": accuracy}

    def accuracy(self) -> float:
        """The test accuracy of the moving average, from 0 to 1."""
        return evaluate(self.ema.model, self.dataset.test, self.dataset.preprocessing, self.config.batch_size).top1

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
            "data": self.fingerprint,
            "epoch": self.epoch,
            "entry": self.entry,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        atomic_write(path, lambda temporary: torch_save(state, temporary))

    def load(self, path: Path) -> None:
        """Continue from the state that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, or its run had other options or data.
        """
        state = read_state(path)
        try:
            check_same(state, self.config, self.meta(), self.fingerprint)
            weights.load_into(self.model, state["model"])
            weights.load_into(self.ema.model, state["ema"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.entry = state["epoch"], state["entry"]
        if (before := state["config"]["epochs"]) != self.config.epochs:
            print(f"{self.config.epochs} epochs instead of {before}: the learning rate follows the longer schedule")

    def export(self, path: Path) -> float:
        """Store the moving average for inference; returns the test accuracy of the stored weights, read back."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.ema.model.state_dict().items()}
        if self.config.half:  # vectors (biases, BatchNorm) are a small share and stay float32
            tensors = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
        weights.save(path, weights.Checkpoint(tensors, **{**self.meta(), "preprocessing": self.dataset.preprocessing}))
        weights.load_into(self.ema.model, weights.read(path).state_dict, source=path)
        return self.accuracy()
