"""Images per second of the input pipeline alone, beside the training step and the inference that it feeds.

    python benchmarks/input.py --data folder:DIR --workers 0 4 8 --batch 256 --device cuda --precision bfloat16
    python benchmarks/input.py                                # no data: 500x375 JPEG files are made

The input rows read, decode and augment image files, and count the batches that arrive at the trainer. The row with 0
workers is one core in the trainer itself. The model's rows use one batch again and again. The augmentation of the
recipes needs `pip install '.[train]'`. A trainer waits for its images where the input is slower than the training step;
workers and trainer share the cores of a CPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import mobilemamba
from mobilemamba import data, training

WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet


class Repeated:
    """The images of a split, over and over: an epoch that lasts longer than the measurement."""

    skip = False

    def __init__(self, split: data.Split, count: int = 1_000_000) -> None:
        self.split, self.bad = split, split.bad
        self.labels = split.labels.repeat(-(-count // len(split.labels)))

    def image(self, i: int) -> Image.Image:
        return self.split.image(i % len(self.split.labels))

    def fingerprint(self) -> dict[str, list[Any]]:
        return self.split.fingerprint()


def make_images(root: Path, count: int) -> None:
    """JPEG files of quality 90 with detail at several scales, 90 to 130 KiB each, as in ImageNet."""
    generator = np.random.default_rng(0)

    def layer(cell: int) -> np.ndarray:
        small = generator.integers(0, 256, (HEIGHT // cell + 1, WIDTH // cell + 1, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)

    for i in range(count):
        pixels = sum(share * layer(cell) for cell, share in ((64, 0.45), (16, 0.2), (4, 0.15), (1, 0.2)))
        for part in ("train", "val"):
            folder = root / part / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(pixels)).save(folder / f"{i}.jpg", quality=90)


def rate(batches: Iterator[Any], images: int, seconds: float) -> float:
    """Images per second of an iterator whose items have ``images`` images, after its first item."""
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += images
    return count / (time.perf_counter() - start)


def calls(call: Callable[[], Any], device: torch.device) -> Iterator[None]:
    """An item for each call, when the device has finished it."""
    while True:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield


def training_step(
    model: torch.nn.Module, batch: int, device: torch.device, side: int, precision: str
) -> Callable[[], None]:
    images = torch.randn(batch, 3, side, side, device=device)
    targets = torch.full((batch, 1000), 1e-3, device=device)
    model = model.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def inference(
    model: torch.nn.Module, batch: int, device: torch.device, side: int, precision: str
) -> Callable[[], None]:
    dtype = getattr(torch, precision)
    fused = model.eval().to(device).fuse().to(dtype)
    images = torch.randn(batch, 3, side, side, device=device, dtype=dtype)

    def call() -> None:
        with torch.inference_mode():
            fused(images)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder:DIR (default: files are made)")
    parser.add_argument("--images", type=int, default=256, help="how many files are made (default: %(default)s)")
    parser.add_argument(
        "--recipe", nargs="+", choices=list(training.RECIPES), default=["default", "published-300"], help="augmentation"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="(default: 0 2)")
    parser.add_argument("--model", default="s6", help="its size of the images, and its speed (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--threads", type=int, help="threads of the model on the CPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, side = torch.device(args.device), mobilemamba.weights.entry(args.model).preprocessing.crop
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            make_images(Path(folder), args.images)
        dataset = data.load(args.data or f"folder:{folder}", side)
        settings = common.setting(device) | {"model": args.model, "batch": args.batch, "precision": args.precision}
        settings |= {"data": args.data or f"{args.images} JPEG files of {WIDTH}x{HEIGHT}", "side": side}
        report = common.Report(settings, ["what", "workers", "images/s"], args.json, None)

        def add(what: str, workers: int | None, items: Iterator[Any], images: int = args.batch) -> None:
            found = rate(items, images, args.seconds)
            row = [what, "-" if workers is None else str(workers), f"{found:.0f}"]
            report.add(row, {"what": what, "workers": workers, "images_per_s": found})

        recipes = {name: training.TrainConfig(**training.recipe(name)).augmentation for name in args.recipe}
        train, options = Repeated(dataset.train), {"batch_size": args.batch, "pin": device.type == "cuda"}
        add("read and decode, one core", None, (train.image(i) for i in range(len(train.labels))), images=1)
        for workers in args.workers:
            for name, augmentation in recipes.items():
                transform = augmentation.image_transform(dataset.preprocessing)
                batches = data.training_batches(train, transform, seed=0, epoch=0, workers=workers, **options)
                add(f"training images, {name}", workers, batches)
            test = Repeated(dataset.test)
            batches = data.evaluation_batches(test, dataset.preprocessing, workers=workers, **options)
            add("test images", workers, batches)
        pixels = torch.randint(0, 256, (args.batch, 3, side, side), dtype=torch.uint8, device=device)
        labels = torch.zeros(args.batch, dtype=torch.long, device=device)
        normalize = dataset.preprocessing.normalize
        for name, augmentation in recipes.items():
            mix = augmentation.batch_transform(1000)
            items = calls(lambda mix=mix: mix(normalize(pixels), labels), device)
            add(f"normalisation, erasing, mixing, {name}", None, items)
        for what, prepare in (("training step", training_step), ("inference, fused", inference)):
            model = mobilemamba.create_model(args.model)
            add(f"{args.model}, {what}", None, calls(prepare(model, args.batch, device, side, args.precision), device))
        return report.close()


if __name__ == "__main__":
    sys.exit(main())
