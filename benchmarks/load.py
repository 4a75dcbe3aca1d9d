"""Latency of one image while other processes want the cores: ours, and files under ONNX Runtime and OpenVINO.

    python benchmarks/load.py --busy 0 1 2 --onnx s6.onnx hgnetv2_b2.onnx
    python benchmarks/load.py --busy 0 1 --beside onnxruntime --onnx s6.onnx

Each contestant runs in a process of its own, one after another, with ``--threads`` threads, beside ``--busy``
processes that never wait. For ``--seconds`` it is called without a pause, in float32 at batch 1, and ``--rounds`` times
so. The table has the median of its calls, the 95th percentile, and the ratio of that to its median without busy
processes. ``--beside`` calls another contestant in the same process between the calls, so that its threads are alive.
The files are networks with one input of images; the images are random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import runtimes
import torch

import mobilemamba


def ours(kind: str, model: str) -> runtimes.Call:
    torch.manual_seed(0)
    network = mobilemamba.create_model(model).eval().fuse()
    side = mobilemamba.weights.entry(model).preprocessing.crop
    images = torch.randn(1, network.in_chans, side, side)
    run: Any = torch.jit.script(network) if kind == "scripted" else network

    def call() -> None:
        with torch.inference_mode():
            run(images)

    return call


def contestant(name: str, args: argparse.Namespace) -> runtimes.Call:
    kind, _, what = name.partition(":")
    if kind in ("fused", "scripted"):
        return ours(kind, what)
    return {"onnxruntime": runtimes.onnxruntime, "openvino": runtimes.openvino}[kind](what, args.threads)


def run(name: str, args: argparse.Namespace) -> list[float]:
    """Milliseconds of each call."""
    call = contestant(name, args)
    beside = contestant(args.beside, args) if args.beside else None
    times: list[float] = []
    end = time.perf_counter() + args.seconds + 1
    while (start := time.perf_counter()) < end:
        call()
        stop = time.perf_counter()
        if stop > end - args.seconds:  # the first second is for warming up
            times.append((stop - start) * 1e3)
        if beside:
            beside()
    return times


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["s6"], choices=mobilemamba.list_models())
    parser.add_argument("--onnx", nargs="+", default=[], metavar="FILE", help="networks for ONNX Runtime and OpenVINO")
    parser.add_argument(
        "--runtimes", nargs="+", default=["onnxruntime", "openvino"], choices=["onnxruntime", "openvino"]
    )
    parser.add_argument("--beside", metavar="CONTESTANT", help="such as onnxruntime:FILE, in the same process")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)  # in a contestant's own process
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.run:
        print(json.dumps(run(args.run, args)))
        return
    names = [f"{kind}:{model}" for model in args.model for kind in ("fused", "scripted")]
    names += [f"{kind}:{path}" for path in args.onnx for kind in args.runtimes]
    settings = {**common.setting(torch.device("cpu")), "cores": os.cpu_count(), "beside": args.beside}
    settings |= {runtime: common.version(runtime) for runtime in args.runtimes if args.onnx}
    columns = ["contestant", "busy processes", "calls", "ms, median", "95 %", "longest", "95 % to quiet median"]
    report = common.Report(settings, columns, args.json, None)
    quiet: dict[str, float] = {}
    command = [sys.executable, *sys.argv]
    for count in sorted(args.busy):
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                with busy(count):
                    done = subprocess.run([*command, "--run", name], stdout=subprocess.PIPE, check=True)
                times[name] += json.loads(done.stdout)
        for name, values in times.items():
            median, high = statistics.median(values), statistics.quantiles(values, n=20)[-1]
            quiet.setdefault(name, median)
            label = ":".join(Path(part).name for part in name.split(":", 1))
            figures = {"median ms": median, "95 % ms": high, "longest ms": max(values)}
            row = [label, str(count), str(len(values)), *(f"{ms:.1f}" for ms in figures.values())]
            row.append(f"{high / quiet[name]:.1f}")
            report.add(row, {"contestant": label, "busy": count, "calls": len(values), **figures})
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
