"""The training loop: one process, resumable bit for bit, from a data set to a checkpoint that ``classify`` reads.

Everything random is a function of the seed and the epoch, so a checkpoint at the end of an epoch needs no generator
state: what follows it is the same whether or not the process was killed in between.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, data
from .files import atomic_write
from .transforms import Preprocessing
from .zoo import create_model

__all__ = ["Ema", "TrainConfig", "evaluate", "learning_rate", "parameter_groups", "train"]

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A field of the configuration, which is also an option of ``mobilemamba train`` with ``text`` as its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """What determines the result of a training run, to the last bit on one machine."""

    model: str = option("nano", "preset")
    data: str = option(
        "fashion-mnist",
        "fashion-mnist[:DIR], folder:DIR (class folders in train/ and val/) or scikit-learn's digits",
    )
    image_size: int | None = option(None, "height and width of the images of folder:DIR (default: 224)")
    epochs: int = option(20, "passes over the training images")
    batch_size: int = option(128, "images in a step")
    lr: float = option(2e-3, "highest learning rate")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up, before the cosine to lr / 100")
    weight_decay: float = option(0.05, "of AdamW, on weights with more than one dimension")
    label_smoothing: float = option(0.1, "share of the target spread over all the classes")
    clip_grad: float = option(5.0, "largest norm of the gradient")
    ema_decay: float = option(0.999, "decay per step of the averaged weights, which are the result")
    drop_path: float = option(0.0, "rate of stochastic depth")
    flip: bool = option(True, "mirror half of the images")
    crop: int = option(2, "shift the images by up to this many pixels")
    erase: float = option(0.25, "probability of a rectangle of noise")
    amp: bool = option(False, "bfloat16 autocast")
    half: bool = option(False, "store the weights of the result as float16")
    seed: int = option(0, "seed of initial weights, order and augmentation")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "clip_grad"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_epochs", "weight_decay", "crop"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema_decay", "drop_path", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: no decay on biases and other 1-D parameters nor on ``model.no_weight_decay()``."""
    exempt = model.no_weight_decay()
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        groups[parameter.dim() <= 1 or name in exempt].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear from ``highest / 1000`` over ``warmup`` steps, then a cosine down to ``highest / 100`` at ``steps``."""
    if step < warmup:
        return highest * (0.001 + 0.999 * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Ema:
    """Exponential moving average of parameters and statistics; the decay warms up as ``(1 + t) / (10 + t)``."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in ``model`` after step ``step`` (from 0)."""
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([mine for mine, _ in averaged], [new for _, new in averaged], 1 - decay)
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)


@torch.inference_mode()
def evaluate(model: nn.Module, split: data.Split, preprocessing: Preprocessing, batch_size: int = 500) -> float:
    """Share of the images of ``split`` that ``model`` gets right, with BatchNorm folded."""
    fused, device = model.fuse(), next(model.parameters()).device
    right = 0
    for index in torch.arange(len(split.labels)).split(batch_size):
        images = preprocessing.normalize(split.images(index).to(device))
        right += int((fused(images).argmax(1).cpu() == split.labels[index]).sum())
    return right / len(split.labels)


def train(config: TrainConfig, out: Path, device: str = "cpu", resume: bool = False) -> float:
    """Train a model into the folder ``out``; returns the test accuracy of the weights that were stored.

    ``out`` gets ``log.jsonl`` (a line per epoch), ``last.pt`` (the whole state after the latest epoch) and, at the
    end, ``model.pt`` (the averaged weights). With ``resume`` it continues from ``last.pt``.

    Raises:
        ValueError: an option or the data is not usable, or ``last.pt`` was made with others.
        FileExistsError: ``out`` has a run and ``resume`` was not asked for.
        FloatingPointError: the loss or its gradient is no longer finite; ``last.pt`` is still the latest good state.
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
        for unfinished in out.glob(f".{path.name}.*.tmp"):  # of a process that was killed while saving
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
    """The state of a training run, which moves on by whole epochs."""

    def __init__(self, config: TrainConfig, dataset: data.DataSet, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.batch_size = min(config.batch_size, len(dataset.train.labels))
        if self.batch_size < 2:
            raise ValueError(f"BatchNorm needs at least 2 images in a batch, got {self.batch_size}")
        self.steps_per_epoch = len(dataset.train.labels) // self.batch_size
        self.augment = data.Augmentation(config.flip, config.crop, config.erase)
        self.model_args = {"num_classes": len(dataset.labels), "in_chans": len(dataset.preprocessing.mean)}
        self.epoch = 0
        torch.manual_seed(config.seed)
        model = create_model(config.model, drop_path_rate=config.drop_path, **self.model_args)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.ema = Ema(self.model, config.ema_decay)
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)

    def train_epoch(self) -> dict[str, Any]:
        """One pass over the training images in an order of its own; returns what the log says of it."""
        config, start, total = self.config, time.perf_counter(), 0.0
        seed = config.seed * 1_000_003 + self.epoch + 1
        torch.manual_seed(seed)  # stochastic depth
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
        """One step of the optimizer and the average; returns the loss."""
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
        """The line that a terminal shows during an epoch."""
        left = seconds / done * (total * (self.config.epochs - self.epoch) - done)
        rate = done * self.batch_size / seconds
        return f"epoch {self.epoch + 1}  step {done}/{total}  {rate:.0f} images/s  {clock(left)} left"

    def meta(self) -> dict[str, Any]:
        return {
            "preset": self.config.model,
            "model_args": self.model_args,
            "labels": list(self.dataset.labels),
            "preprocessing": self.dataset.preprocessing.to_dict(),
        }

    def save(self, path: Path) -> None:
        """Replace ``path`` by the present state, or leave it as it was."""
        state = {
            "format": checkpoint.TRAINING_FORMAT,
            "version": checkpoint.VERSION,
            "meta": self.meta(),
            "config": asdict(self.config),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        atomic_write(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Continue from what :meth:`save` wrote."""
        try:
            self.restore(checkpoint.load_torch(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def restore(self, state: Any) -> None:
        ours = isinstance(state, dict) and state.get("format") == checkpoint.TRAINING_FORMAT
        version = state.get("version") if ours else "something else"
        if version != checkpoint.VERSION:
            raise ValueError(f"expected a training checkpoint of version {checkpoint.VERSION}, got {version}")
        parts = {"config": dict, "meta": dict, "epoch": int, "model": dict, "ema": dict, "optimizer": dict}
        absent = [part for part, kind in parts.items() if not isinstance(state.get(part), kind)]
        if absent:
            raise ValueError(f"expected a whole training checkpoint, got one without {', '.join(absent)}")
        was = {**state["config"], **facts(state["meta"])}
        now = {**asdict(self.config), **facts(self.meta())}
        keys = (key for key in {**was, **now} if was.get(key) != now.get(key))
        if differing := [f"{key} {was.get(key)} (now {now.get(key)})" for key in keys]:
            raise ValueError(f"made with other options or data, expected the same: {checkpoint.shorten(differing)}")
        checkpoint.load_into(self.model, state["model"])
        checkpoint.load_into(self.ema.model, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]

    def export(self, path: Path) -> float:
        """Store the averaged weights for inference; returns the test accuracy of the file, read back."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.ema.model.state_dict().items()}
        if self.config.half:  # the statistics of BatchNorm and other vectors are few and stay as they are
            weights = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in weights.items()}
        meta = {**self.meta(), "preprocessing": self.dataset.preprocessing}
        checkpoint.save(path, checkpoint.Checkpoint(weights, **meta))
        checkpoint.load_into(self.ema.model, checkpoint.read(path).state_dict, source=path)
        return evaluate(self.ema.model, self.dataset.test, self.dataset.preprocessing)


def facts(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` with an entry for each label, so that a comparison names the ones that moved."""
    labels = {f"label {i}": label for i, label in enumerate(meta.get("labels") or ())}
    return {**{key: value for key, value in meta.items() if key != "labels"}, **labels}


class Log:
    """JSON lines, a flushed line for each epoch.

    What is there of epochs that will be repeated is dropped first, and a line that a killed process left unfinished.
    """

    def __init__(self, path: Path, epochs_done: int) -> None:
        lines = path.read_text().splitlines() if path.exists() and epochs_done else []
        kept = [line for line in lines if epoch_of(line) <= epochs_done]
        atomic_write(path, lambda temporary: Path(temporary).write_text("".join(f"{x}\n" for x in kept)))
        self.path = path

    def write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def epoch_of(line: str) -> float:
    try:
        return json.loads(line).get("epoch", math.inf)
    except ValueError:
        return math.inf


def progress(batches: Tensor, describe: Callable[[int, int, float], str]) -> Iterator[Tensor]:
    """Iterate, and on a terminal show a line that is rewritten twice a second; elsewhere nothing."""
    start = shown = time.perf_counter()
    for i, batch in enumerate(batches):
        yield batch
        now = time.perf_counter()
        if sys.stderr.isatty() and now - shown > 0.5:
            shown = now
            print(f"\r{describe(i + 1, len(batches), now - start)}\033[K", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{whole:02d}"
