"""Times the model against a plain PyTorch rendition of the same network, alternating.

    python benchmarks/models.py --model s6 --batch 1 32
    python benchmarks/models.py --device cuda --batch 1 256 --dtype float32 bfloat16 float16 --train 256

Prints a table of medians with their spread; ``--json FILE`` writes the same with versions and settings. 16-bit types
are autocast's. On CUDA every call is waited for, batch 1 is also replayed as a CUDA graph, and the peak of the memory
that tensors take is measured. ``--train`` times training steps, with AdamW.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import common
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobilemamba
from mobilemamba import weights

Call = Callable[[], Any]


def forward_calls(name: str, x: Tensor, dtype: torch.dtype) -> dict[str, Call]:
    """Forward passes of the images ``x``, by what the table calls them."""
    torch.manual_seed(0)
    model = mobilemamba.create_model(name).eval()
    autocast = autocast_of(x.device, dtype)

    def forward(network: nn.Module) -> Tensor:
        with torch.inference_mode(), autocast():
            return network(x)

    def plain() -> Tensor:
        with reference.plain_pytorch():
            return forward(model)

    native, fused = partial(forward, model), partial(forward, model.fuse())
    calls = {"plain PyTorch": plain, f"mobilemamba.{name}()": native, f"mobilemamba.{name}().fuse()": fused}
    if x.device.type == "cuda" and len(x) == 1:
        calls |= {f"{key}, CUDA graph": graph_of(call) for key, call in calls.items()}
    return calls


def training_calls(name: str, x: Tensor, dtype: torch.dtype) -> dict[str, Call]:
    """Training steps on the images ``x``."""
    torch.manual_seed(0)
    model = mobilemamba.create_model(name)
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.randint(model.num_classes, (len(x),))
    autocast = autocast_of(x.device, dtype)
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype == torch.float16)

    def native() -> None:
        with autocast():
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def plain() -> None:
        with reference.plain_pytorch():
            native()

    return {"plain PyTorch, training": plain, f"mobilemamba.{name}(), training": native}


def autocast_of(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    # without its cache of casts, which graphs cannot share
    return nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype, cache_enabled=False)


def graph_of(call: Call) -> Call:
    """``call`` captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(calls: dict[str, Call], rounds: int, wait: Call) -> dict[str, list[float]]:
    """Milliseconds per call, for each model a list with one figure per round; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):  # two rounds to warm up
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def peak_mebibytes(call: Call) -> float:
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s6", choices=mobilemamba.list_models())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--train", type=int, nargs="+", default=[], metavar="BATCH", help="training steps as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, help="seconds after which the remaining cases are left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    on_cuda = args.device.type == "cuda"
    size = weights.entry(args.model).preprocessing.crop
    channels = mobilemamba.PRESETS[args.model].get("in_chans", 3)
    settings = {"model": args.model, "pixels": size, **common.setting(args.device)}
    columns = ["batch", "dtype", "model", "ms, median", "min to max", "images/s", "against plain"]
    report = common.Report(settings, [*columns, *["peak MiB"] * on_cuda], args.json, args.limit)
    forward = itertools.product([forward_calls], args.batch, args.dtype)
    training = itertools.product([training_calls], args.train, args.dtype)
    for make, batch, dtype in (*forward, *training):
        if report.time_is_up():
            continue
        try:
            calls = make(args.model, torch.randn(batch, channels, size, size), getattr(torch, dtype))
            times = measure(calls, args.rounds, torch.cuda.synchronize if on_cuda else lambda: None)
            eager = [name for name in calls if on_cuda and "graph" not in name]  # graphs hold their memory throughout
            peaks = {name: peak_mebibytes(calls[name]) for name in eager}
        except RuntimeError as error:  # the other cases are worth their own figures
            report.fail([str(batch), dtype, *"-----", *"-" * on_cuda], {"batch": batch, "dtype": dtype}, error)
            continue
        base = statistics.median(next(iter(times.values())))
        for name, values in times.items():
            median = statistics.median(values)
            spread = f"{min(values):.1f} to {max(values):.1f}"
            figures = [f"{median:.1f}", spread, f"{batch / median * 1e3:.0f}", f"{base / median:.2f}x"]
            peak = [f"{peaks[name]:.0f}" if name in peaks else "-"] if on_cuda else []
            result = {"batch": batch, "dtype": dtype, "model": name, "ms": values, "peak MiB": peaks.get(name)}
            report.add([str(batch), dtype, name, *figures, *peak], result)
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
