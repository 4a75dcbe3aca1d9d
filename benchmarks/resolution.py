"""Times a preset and peers from small to large images, by turns, with the memory of a call: a table and a figure.

    python benchmarks/resolution.py --json resolution.json --figure resolution.svg
    python benchmarks/resolution.py --device cuda --dtype float16 --json resolution.json --figure resolution.svg
    python benchmarks/resolution.py --model nano --peers repvit_m1_0 shvit_s4 --sides 128 256 --rounds 3

The peers are two convolutional networks (MobileNetV4-conv-M, RepViT-M1.0) and two with attention (SHViT-S4,
MobileNetV4-hybrid-M) with the accuracy of b1, from those that take images of any size. All are eager, or with
``--compile`` all are compiled, anew for each side; BatchNorm is fused, memory is channels last, weights are random. In
each round every network has one call, after the others have used the caches. On CUDA every call is waited for.

The peak memory is that of one call, weights and images not included. On CUDA torch's allocator states it. On the CPU it
is the growth of the process's resident memory as Linux has it, so that buffers of all threads and libraries count.

The slope is that of log time over log side between the two largest sides: 2 is linear in the number of pixels, and 4
quadratic, as attention over all pixels is in the end.
"""

import argparse
import ctypes
import gc
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import contestants
import models
import peers
import plot
import torch
from contestants import Setting
from torch import Tensor, nn

import mobilemamba

COLUMNS = ["network", "pixels", "ms, median", "min to max", "peak MiB"]
PEERS = ["mobilenetv4_conv_medium", "repvit_m1_0", "shvit_s4", "mobilenetv4_hybrid_medium"]
SIDES = [128, 256, 512, 1024, 2048]


def build(name: str, setting: Setting) -> tuple[nn.Module, int]:
    """A network for inference, and the channels of its images."""
    if name in mobilemamba.list_models():
        model, channels, _ = contestants.make_model(name)
        return model.fuse().to(setting.dtype), channels  # type: ignore[operator]
    torch.manual_seed(0)
    model = contestants.calibrate(peers.build(name), torch.randn(4, 3, 224, 224))
    return peers.fuse(model).to(setting.dtype, memory_format=torch.channels_last), 3  # type: ignore[call-overload]


def status(name: str) -> int:
    """KiB, an entry of Linux's ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_resident_mebibytes(call: Callable[[], Any]) -> float:
    """How far the process's resident memory grows during ``call``. Memory that is free before is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 2**10


def peak_mebibytes(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return models.peak_mebibytes(call, device)
    return peak_resident_mebibytes(call)


def slope(medians: dict[int, float]) -> float:
    """Of log time over log side, between the two largest sides."""
    small, large = sorted(medians)[-2:]
    return math.log(medians[large] / medians[small]) / math.log(large / small)


def measure(names: list[str], sides: list[int], setting: Setting, args: Any, report: common.Report) -> None:
    """Fill the report: a row for each side and network. A network that fails at a side is left out from there on."""
    networks = {name: build(name, setting) for name in names}
    for side in sides:
        if report.time_is_up():
            continue
        calls: dict[str, Callable[[], Tensor]] = {}
        for name, (network, channels) in list(networks.items()):
            x = setting.images(channels, side).to(setting.dtype)
            call = partial(contestants.forward, setting.compile(network) if args.compile else network, x)
            try:
                call()
            except (RuntimeError, MemoryError) as error:  # out of memory, for one
                report.fail([name, str(side), "-", "-", "-"], {"network": name, "pixels": side}, error)
                del networks[name]
            else:
                calls[name] = call
        turns = {name: partial(models.turn_of, call, 1, setting.device) for name, call in calls.items()}
        times = models.by_turns(turns, args.rounds)
        for name, call in calls.items():
            median, peak = statistics.median(times[name]), peak_mebibytes(call, setting.device)
            spread = f"{min(times[name]):.1f} to {max(times[name]):.1f}"
            result = {"network": name, "pixels": side, "ms": times[name], "median ms": median, "peak MiB": peak}
            report.add([name, str(side), f"{median:.1f}", spread, f"{peak:.0f}"], result)


def series(results: list[dict[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """``key`` by network and side."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if key in result:
            found.setdefault(result["network"], {})[result["pixels"]] = result[key]
    return found


def slopes(results: list[dict[str, Any]]) -> str:
    """A table; networks with fewer than two sides are not in it."""
    lines = ["| network | sides | slope |", "|---|---|---|"]
    for name, medians in series(results, "median ms").items():
        if len(medians) >= 2:
            small, large = sorted(medians)[-2:]
            lines.append(f"| {name} | {small} to {large} | {slope(medians):.2f} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], settings: dict[str, Any], path: Path) -> None:
    """Time and memory over the side, both axes logarithmic."""
    pyplot = plot.pyplot_with_stable_files()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for ax, key, label in zip(
        axes, ("median ms", "peak MiB"), ("ms a call", "peak memory of a call, MiB"), strict=True
    ):
        for i, (name, points) in enumerate(series(results, key).items()):
            own = name in mobilemamba.list_models()
            look = {"color": "black", "linewidth": 2} if own else {"color": f"C{i}", "linewidth": 1}
            title = f"{plot.OURS} {name.upper()}" if own else peers.PEERS[name].title
            ax.plot(list(points), list(points.values()), marker="o", markersize=4, label=title, **look)
        sides = sorted({result["pixels"] for result in results})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sides, [str(side) for side in sides])
        ax.set_xlabel("side of the image, pixels")
        ax.set_ylabel(label)
        ax.grid(True, alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    what = f"batch {settings['batch']}, {settings['dtype']}, {settings['runtime']}"
    figure.suptitle(f"{what}; {plot.where(settings)}", fontsize=9)
    plot.save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["b1"], choices=mobilemamba.list_models())
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=peers.IN_TIMM, metavar="PEER")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="all networks, by torch.compile")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, help="seconds after which the remaining sides are left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="svg or png; needs matplotlib")
    args = parser.parse_args(argv)
    if min(args.sides) < 1 or len(set(args.sides)) < len(args.sides):
        parser.error(f"--sides: expected positive numbers that differ, got {' '.join(map(str, args.sides))}")
    if args.peers and not peers.is_available():
        parser.error("--peers needs timm, which is not installed: pip install '.[bench]'")
    if args.figure and not plot.is_available():
        parser.error("--figure needs matplotlib, which is not installed: pip install '.[bench]'")
    if args.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu: expected Linux, which tells the peak of the resident memory")
    runtime = "compiled" if args.compile else "eager"
    settings = {"batch": args.batch, "dtype": args.dtype, "runtime": runtime, **common.setting(args.device)}
    settings["threads"] = args.threads
    if args.peers:
        settings["timm"] = common.version("timm")
    report = common.Report(settings, COLUMNS, args.json, args.limit)
    setting = Setting(args.device, args.batch, getattr(torch, args.dtype), args.threads, Path())
    setting.prepare()
    measure([*args.model, *args.peers], sorted(args.sides), setting, args, report)
    print(f"\n{slopes(report.results)}")
    if args.figure:
        draw(report.results, settings, args.figure)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
