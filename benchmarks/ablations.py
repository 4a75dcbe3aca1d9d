"""Trains variants of nano on Fashion-MNIST, one thread each: the paper's ablations at a size that a CPU can repeat.

    python benchmarks/ablations.py --log FILE --json FILE
    python benchmarks/ablations.py --small --log FILE
    python benchmarks/ablations.py --match

All variants have the same epochs, images, precision and seeds. A finished run is a line of the log and is not
repeated; a run that was stopped goes on from its latest state in the folder ``--runs``. The table follows when all runs
are done. "Accuracy" is the mean over the seeds with its standard deviation. "Against nano" is the mean of the
differences between runs of one seed, with the half width of its 95 % interval (Student's t): where zero is outside, the
column "nano is better" says yes or no. Throughput is that of the fused model in float32, measured by turns; MACs are
those of one image before fuse().

``--match`` searches the widths with which the four-stage network has nano's throughput, instead of training.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import contestants
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba.data import fashion_mnist_dir, read_idx
from mobilemamba.training import TrainConfig, train
from mobilemamba.training.config import PRECISIONS

BASE = "nano"
COLUMNS = ["variant", "accuracy, %", "seeds", "against nano", "nano is better", "images/s", "of nano's"]
COLUMNS += ["MMACs", "M parameters"]

#: Of Student's t, two-sided 95 %, by degrees of freedom from 1.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def four_stages(scale: float) -> dict[str, Any]:
    """As many blocks as nano has, in four stages. The first map has twice the height and width of nano's."""
    widths = [max(16, round(width * scale / 8) * 8) for width in (32, 64, 96, 128)]
    return {
        "widths": widths,
        "depths": [1, 1, 1, 1],
        "global_ratios": [0.8, 0.8, 0.7, 0.6],
        "local_ratios": [0.2, 0.2, 0.2, 0.3],
        "wavelet_kernels": [5, 5, 3, 3],
        "local_kernels": [[5], [5], [3], [3]],
        "patch_strides": [1, 2],
    }


#: Arguments of the model by variant. docs/ablations.md says what each is.
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "no global part": {"global_ratios": [0.0, 0.0, 0.0]},
    "no local part": {"local_ratios": [0.0, 0.0, 0.0]},
    "no identity part": {"local_ratios": [1.0, 1.0, 1.0]},
    "no wavelet": {"wavelet_kernels": [0, 0, 0]},
    "one direction": {"directions": 1},
    "mixer ttt": {"mixer": "ttt"},
    "mixer mlstm": {"mixer": "mlstm"},
    "mixer rwkv6": {"mixer": "rwkv6"},
    "four stages": four_stages(0.625),
}


@dataclass(frozen=True)
class Size:
    """How long each run is: ``images`` training images, and a sixth of them for testing, as in the whole set."""

    epochs: int
    images: int
    seeds: int
    precision: str = "float32"

    @property
    def facts(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "images": self.images, "precision": self.precision}


def create(variant: str) -> mobilemamba.MobileMamba:
    options = {name: _tuples(value) for name, value in VARIANTS[variant].items()}
    return mobilemamba.nano(**options)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def config(variant: str, seed: int, size: Size, data: str) -> TrainConfig:
    """The options of a run: the defaults of training, but for its length and its network."""
    arguments = dict(VARIANTS[variant])
    widths = arguments.pop("widths", None)
    return TrainConfig(
        data=data,
        seed=seed,
        epochs=size.epochs,
        precision=size.precision,
        widths=widths and tuple(widths),
        model_options=json.dumps(arguments) if arguments else "",
    )


def first_images(count: int, folder: Path) -> str:
    """The data's name: all of Fashion-MNIST, or files with its first images in ``folder``."""
    if count >= 60000:
        return "fashion-mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", count), ("t10k", max(1, count // 6))):
        for kind in ("images-idx3", "labels-idx1"):
            values = read_idx(fashion_mnist_dir() / f"{part}-{kind}-ubyte.gz")[:images]
            sizes = b"".join(length.to_bytes(4, "big") for length in values.shape)
            head = bytes([0, 0, 8, values.dim()]) + sizes
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + values.numpy().tobytes())
    return f"fashion-mnist:{folder}"


class Log:
    """Finished runs, a JSON line each. A line that a stopped process left unfinished is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                self.entries.append(json.loads(line))
            except ValueError:
                continue

    def accuracy(self, key: Mapping[str, Any]) -> float | None:
        """That of the run with these facts, if it is done."""
        found = (entry["accuracy"] for entry in self.entries if all(entry.get(name) == key[name] for name in key))
        return next(found, None)

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        with self.path.open("a") as file:
            file.write(("" if text.endswith("\n") or not text else "\n") + json.dumps(entry) + "\n")


def key_of(variant: str, seed: int, size: Size) -> dict[str, Any]:
    return {"variant": variant, "options": VARIANTS[variant], "seed": seed, **size.facts}


def train_all(variants: list[str], size: Size, log: Log, runs: Path, device: str) -> None:
    """Train what the log does not have yet: all variants of a seed before the next seed."""
    data = first_images(size.images, runs / f"first-{size.images}")
    for seed in range(size.seeds):
        for variant in variants:
            key = key_of(variant, seed, size)
            if log.accuracy(key) is not None:
                continue
            print(f"{variant}, seed {seed}", flush=True)
            out = runs / f"{variant.replace(' ', '-')}-{'-'.join(map(str, size.facts.values()))}-{seed}"
            start = time.monotonic()
            resume = (out / "last.pt").exists()
            accuracy = train(config(variant, seed, size, data), out, device, resume, threads=1, workers=0)
            facts = {"seconds": round(time.monotonic() - start), "resumed": resume}
            setting = common.setting(torch.device(device))
            log.add({**key, "accuracy": round(accuracy, 5), **facts, **setting, "date": time.strftime("%Y-%m-%d")})
            shutil.rmtree(out)


def throughputs(networks: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Images/s of networks that run by turns, and those over the first network's: medians of ``rounds``."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for i in range(rounds + 2):  # two to warm up
            for name, network in networks.items():
                start = time.perf_counter()
                network(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if i >= 2:
                    times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return {
        name: (
            len(images) / statistics.median(seconds),
            statistics.median(base / own for base, own in zip(first, seconds, strict=True)),
        )
        for name, seconds in times.items()
    }


def fused(model: mobilemamba.MobileMamba, device: str) -> nn.Module:
    torch.manual_seed(0)
    return contestants.calibrate(model, torch.randn(8, 1, 28, 28)).fuse().to(device)  # type: ignore[operator]


def difference(accuracies: list[float], base: list[float]) -> tuple[str, str]:
    """In points, with the half width of its 95 % interval; and whether the base is better."""
    points = [100 * (one - other) for one, other in zip(accuracies, base, strict=True)]
    mean = statistics.mean(points)
    if len(points) == 1:
        return f"{mean:+.2f}", "one seed"
    half = T95[min(len(points) - 1, len(T95)) - 1] * statistics.stdev(points) / len(points) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}", "not seen" if abs(mean) <= half else "yes" if mean < 0 else "no"


def table(variants: list[str], size: Size, log: Log, args: argparse.Namespace) -> int:
    """Print the results; returns the exit status."""
    images = torch.randn(args.batch, 1, 28, 28, device=args.device)
    speeds = throughputs({name: fused(create(name), args.device) for name in variants}, images, args.rounds)
    settings = {**common.setting(torch.device(args.device)), **size.facts}
    report = common.Report({**settings, "batch": args.batch}, COLUMNS, args.json, None)
    base = _accuracies(BASE, size, log)
    for name in variants:
        model, accuracies = create(name).eval(), _accuracies(name, size, log)
        macs = contestants.macs_of(model, torch.randn(1, 1, 28, 28))
        parameters = sum(p.numel() for p in model.parameters())
        spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        against, better = difference(accuracies, base) if name != BASE else ("", "")
        row = [name, f"{100 * statistics.mean(accuracies):.2f}{spread}", str(len(accuracies)), against, better]
        speed, ratio = speeds[name]
        row += [f"{speed:.0f}", f"{ratio:.2f}", f"{macs / 1e6:.2f}"]
        result = {"variant": name, "accuracies": accuracies, "images/s": speed, "of nano's": ratio, "MACs": macs}
        report.add([*row, f"{parameters / 1e6:.3f}"], {**result, "parameters": parameters})
    return report.close()


def _accuracies(variant: str, size: Size, log: Log) -> list[float]:
    found = [log.accuracy(key_of(variant, seed, size)) for seed in range(size.seeds)]
    assert None not in found, variant  # train_all() was here
    return found  # type: ignore[return-value]


def match(args: argparse.Namespace) -> None:
    """Bisect the scale of the four stages' widths until no other widths are between two scales."""
    images = torch.randn(args.batch, 1, 28, 28, device=args.device)
    base, low, high = fused(mobilemamba.nano(), args.device), 0.4, 1.6
    while four_stages(low)["widths"] != four_stages(high)["widths"] and high - low > 0.02:
        scale = (low + high) / 2
        arguments = {name: _tuples(value) for name, value in four_stages(scale).items()}
        network = fused(mobilemamba.nano(**arguments), args.device)
        ratio = throughputs({BASE: base, "four": network}, images, args.rounds)["four"][1]
        print(f"scale {scale:.3f}: widths {arguments['widths']}: {ratio:.2f} of nano's images/s", flush=True)
        low, high = (scale, high) if ratio > 1 else (low, scale)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, help="these beside nano (default: all)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60000, help="the first ones of the training images")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the training")
    parser.add_argument("--seeds", type=int, default=3, help="seeds from 0 on")
    parser.add_argument("--small", action="store_true", help="1 epoch of 600 images: whether everything runs")
    parser.add_argument("--log", type=Path, default=Path("ablations.jsonl"), help="finished runs")
    parser.add_argument("--runs", type=Path, default=Path("build/ablations"), help="folder of unfinished runs")
    parser.add_argument("--device", default="cpu", help="of training and of the throughput")
    parser.add_argument("--batch", type=int, default=64, help="images of a call for the throughput")
    parser.add_argument("--rounds", type=int, default=15, help="of the throughput")
    parser.add_argument("--match", action="store_true", help="search the widths of the four stages and stop")
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    args = parser.parse_args(arguments)
    for name in ("epochs", "images", "seeds", "batch", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    torch.set_num_threads(1)
    if args.match:
        match(args)
        return 0
    epochs, images = (1, 600) if args.small else (args.epochs, args.images)
    size = Size(epochs, images, args.seeds, args.precision)
    variants = [name for name in VARIANTS if name == BASE or args.variant is None or name in args.variant]
    log = Log(args.log)
    train_all(variants, size, log, args.runs, args.device)
    return table(variants, size, log, args)


if __name__ == "__main__":
    raise SystemExit(main())
