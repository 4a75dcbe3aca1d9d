"""Times the model against a plain PyTorch rendition of the same network, alternating, on the CPU.

    python benchmarks/models.py --model s6 --batch 1 32

Prints a table of medians with their spread; ``--json FILE`` writes the same with versions and settings.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import reference

import mobilemamba
from mobilemamba import weights


def contestants(name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Callables on an image batch, by what the table calls them."""
    torch.manual_seed(0)
    model = mobilemamba.create_model(name).eval()
    fused = model.fuse()

    def plain(x: torch.Tensor) -> torch.Tensor:
        with reference.plain_pytorch():
            return model(x)

    return {"plain PyTorch": plain, f"mobilemamba.{name}()": model, f"mobilemamba.{name}().fuse()": fused}


@torch.inference_mode()
def measure(models: dict[str, Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, rounds: int) -> dict:
    """Milliseconds per call, for each model a list with one figure per round; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 2):  # two rounds to warm up
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s6", choices=mobilemamba.list_models())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = weights.entry(args.model).preprocessing.crop
    models = contestants(args.model)
    settings = {
        "model": args.model,
        "pixels": size,
        "dtype": "float32",
        "threads": args.threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "mobilemamba": mobilemamba.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()), end="\n\n")
    print("| batch | model | ms, median | min to max | against plain |\n|---|---|---|---|---|")
    results = []
    for batch in args.batch:
        channels = mobilemamba.PRESETS[args.model].get("in_chans", 3)
        times = measure(models, torch.randn(batch, channels, size, size), args.rounds)
        base = statistics.median(next(iter(times.values())))
        for name, values in times.items():
            median = statistics.median(values)
            spread = f"{min(values):.1f} to {max(values):.1f}"
            print(f"| {batch} | {name} | {median:.1f} | {spread} | {base / median:.2f}x |", flush=True)
            results.append({"batch": batch, "model": name, "ms": values})
    if args.json:
        args.json.write_text(json.dumps({**settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
