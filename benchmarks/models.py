"""Times the models against a plain PyTorch rendition of the same network and against their peers, alternating.

    python benchmarks/models.py --model s6 --batch 1 32 --dtype float32 bfloat16
    python benchmarks/models.py --device cuda --batch 1 256 --dtype float32 bfloat16 float16 --train 256
    python benchmarks/models.py --no-peers --profile

Prints a table of medians with their spread; ``--json FILE`` writes the same with versions and settings, ``--plot FILE``
draws published top-1 against measured images/s. ``--profile`` prints where a fused model's time goes instead.

In each round every contestant has a turn: one call, after the others have used the caches, as in a program that does
other things as well; or with ``--turn N`` one that is not timed and N that are, as in a program that does nothing else.
At batch 1 that makes a difference of several ms. The peers (peers.py) are timm's, each at its own resolution, with
BatchNorm fused where timm does it, channels last, which was the faster layout of every one of them; eager, and under
torch.compile: on the CPU with inductor's freezing, which folds BatchNorm for the others too, on CUDA in the mode
max-autotune, with CUDA graphs. The fused network is there as a TorchScript module too, as C++ programs run it. 16-bit
types are the type of weights and images, but autocast's for the plain rendition and in training.

MACs are torch's flop counter's, halved. Peak MiB is what the tensors take that one call allocates, weights not
included: on the CPU as torch's allocator tells the profiler, where libraries' own buffers do not show, nor what mrffi's
threads allocate for their images. On CUDA every call is waited for, and batch 1 is also replayed as a CUDA graph.
``--train`` times training steps, with AdamW.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import layers
import peers
import plot
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mobilemamba
from mobilemamba import weights

Call = Callable[[], Any]


@dataclass
class Contestant:
    """What is called in turn, by the name in the table; ``facts`` go into the JSON."""

    name: str
    call: Call
    base: str  # the contestant that it is compared with
    macs: float = 0  # of the whole batch
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One case of the comparison, the same for all contestants."""

    device: torch.device
    batch: int
    dtype: torch.dtype
    compiled: str  # which are measured under torch.compile as well: none, peers or all

    def images(self, channels: int, side: int) -> Tensor:
        return torch.randn(self.batch, channels, side, side).contiguous(memory_format=torch.channels_last)

    def compile(self, model: nn.Module) -> nn.Module:
        options = {"mode": "max-autotune"} if self.device.type == "cuda" else {"options": {"freezing": True}}
        return torch.compile(model, fullgraph=True, dynamic=False, **options)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Give BatchNorm the statistics of random images, so that no branch is zero and no number denormal."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # many start as zero
            nn.init.normal_(norm.bias, std=0.1)
            norm.momentum = 1.0
    model.train()(images)
    return model.eval()


def macs_of(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def forward(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(x)


def our_contestants(name: str, setting: Setting) -> Iterator[Contestant]:
    """The network in plain PyTorch, as it is trained, and fused."""
    torch.manual_seed(0)
    entry = weights.entry(name)
    side, channels = entry.preprocessing.crop, mobilemamba.PRESETS[name].get("in_chans", 3)
    model = calibrate(mobilemamba.create_model(name), torch.randn(4, channels, side, side))
    images = setting.images(channels, side)
    autocast = autocast_of(setting.device, setting.dtype)

    def plain() -> Tensor:
        with reference.plain_pytorch(), autocast():
            return forward(model, images)

    x = images.to(setting.dtype)
    native, fused = copy.deepcopy(model).to(setting.dtype), model.fuse().to(setting.dtype)
    facts = {"network": name, "family": "MobileMamba", "pixels": side}
    if entry.labels is None:  # ImageNet-1k's
        facts["top1"] = entry.top1
    if any(other.preset == name and other.variant == "distilled" for other in weights.ENTRIES):
        facts["top1, distilled"] = weights.entry(name, distilled=True).top1
    base = f"plain PyTorch {name}"
    make = partial(Contestant, base=base, macs=macs_of(model, images), facts=facts)
    contestants = [make(base, plain)]
    make = partial(make, macs=macs_of(fused, x))
    contestants.append(make(f"mobilemamba.{name}()", partial(forward, native, x)))
    contestants.append(make(f"mobilemamba.{name}().fuse()", partial(forward, fused, x)))
    yield from contestants
    if setting.device.type == "cuda" and setting.batch == 1:
        for eager in contestants:
            yield make(f"{eager.name}, CUDA graph", graph_of(eager.call))
    if setting.compiled == "all":
        yield make(f"mobilemamba.{name}().fuse(), scripted", partial(forward, torch.jit.script(fused), x))
        yield make(f"mobilemamba.{name}().fuse(), compiled", partial(forward, setting.compile(fused), x))


def peer_contestants(name: str, setting: Setting, base: str) -> Iterator[Contestant]:
    """A network of timm, eager and compiled."""
    torch.manual_seed(0)
    peer = peers.PEERS[name]
    model = calibrate(peers.build(name), torch.randn(4, 3, peer.pixels, peer.pixels))
    model = peers.fuse(model).to(setting.dtype, memory_format=torch.channels_last)
    x = setting.images(3, peer.pixels).to(setting.dtype)
    top1 = {"top1, distilled" if peer.distilled else "top1": peer.top1}
    facts = {"network": f"timm {name}", "family": peer.family, "pixels": peer.pixels, **top1}
    make = partial(Contestant, base=base, macs=macs_of(model, x), facts=facts)
    yield make(peer.title, partial(forward, model, x))
    if setting.compiled != "none":
        yield make(f"{peer.title}, compiled", partial(forward, setting.compile(model), x))


def training_contestants(name: str, setting: Setting) -> Iterator[Contestant]:
    """Training steps."""
    torch.manual_seed(0)
    side, channels = weights.entry(name).preprocessing.crop, mobilemamba.PRESETS[name].get("in_chans", 3)
    model = mobilemamba.create_model(name)
    x, labels = setting.images(channels, side), torch.randint(model.num_classes, (setting.batch,))
    optimizer = torch.optim.AdamW(model.parameters())
    autocast = autocast_of(setting.device, setting.dtype)
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)

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

    base = f"plain PyTorch {name}, training"
    facts = {"network": name, "family": "MobileMamba", "pixels": side, "training": True}
    yield Contestant(base, plain, base, facts=facts)
    yield Contestant(f"mobilemamba.{name}(), training", native, base, facts=facts)


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


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(calls: dict[str, Call], rounds: int, turn: int, wait: Call) -> dict[str, list[float]]:
    """Milliseconds per call, for each contestant a list with ``turn`` figures per round; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):  # two rounds to warm up
        for name, call in calls.items():
            if turn > 1:
                call()  # brings weights and code back into the caches
            for _ in range(turn):
                wait()
                start = time.perf_counter()
                call()
                wait()
                if i >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def peak_mebibytes(call: Call, device: torch.device) -> float:
    """The most that the tensors which ``call`` allocates take at a time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0) / 2**20


def ready(makers: dict[str, Iterator[Contestant]], report: common.Report, label: list[str]) -> list[Contestant]:
    """The contestants, each called once, which compiles it; what fails is reported and left out."""
    contestants = []
    for what, made in makers.items():
        start = time.monotonic()
        try:
            for contestant in made:
                contestant.call()
                contestants.append(contestant)
        except RuntimeError as error:  # the others are worth their own figures
            row = [*label, what, *["-"] * (len(report.columns) - 3)]
            report.fail(row, {"batch": label[0], "dtype": label[1], "model": what}, error)
        print(f"batch {label[0]}, {label[1]}: {what} ready, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return contestants


COLUMNS = ["batch", "dtype", "model", "pixels", "top-1 (distilled)", "MMACs"]
COLUMNS += ["ms, median", "min to max", "images/s", "against plain", "peak MiB"]


def compare(
    makers: dict[str, Iterator[Contestant]], setting: Setting, rounds: int, turn: int, report: common.Report
) -> None:
    label = [str(setting.batch), str(setting.dtype).removeprefix("torch.")]
    on_cuda = setting.device.type == "cuda"
    torch.compiler.reset()  # what earlier cases compiled
    contestants = ready(makers, report, label)
    try:
        calls = {contestant.name: contestant.call for contestant in contestants}
        times = measure(calls, rounds, turn, torch.cuda.synchronize if on_cuda else lambda: None)
        # graphs hold their memory throughout
        eager = [name for name in calls if not (on_cuda and ("graph" in name or "compiled" in name))]
        peaks = {name: peak_mebibytes(calls[name], setting.device) for name in eager}
    except RuntimeError as error:  # the other cases are worth their own figures
        row = [*label, *["-"] * (len(report.columns) - 2)]
        report.fail(row, {"batch": label[0], "dtype": label[1]}, error)
        return
    medians = {name: statistics.median(values) for name, values in times.items()}
    for contestant in contestants:
        name, facts, median = contestant.name, contestant.facts, medians[contestant.name]
        per_image = contestant.macs / setting.batch / 1e6
        accuracies = [
            form.format(facts[key]) for key, form in (("top1", "{}"), ("top1, distilled", "({})")) if key in facts
        ]
        row = [
            *label,
            name,
            str(facts["pixels"]),
            " ".join(accuracies) or "-",
            f"{per_image:.0f}" if per_image else "-",
            f"{median:.1f}",
            f"{min(times[name]):.1f} to {max(times[name]):.1f}",
            f"{setting.batch / median * 1e3:.0f}",
            f"{medians[contestant.base] / median:.2f}x" if contestant.base in medians else "-",
            f"{peaks[name]:.0f}" if name in peaks else "-",
        ]
        figures = {"ms": times[name], "median ms": median, "MMACs": per_image or None, "peak MiB": peaks.get(name)}
        report.add(row, {"batch": setting.batch, "dtype": label[1], "model": name, **facts, **figures})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["s6"], choices=mobilemamba.list_models())
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--peers", nargs="+", choices=list(peers.PEERS), metavar="PEER", help="(default: all of them)")
    chosen.add_argument("--no-peers", action="store_true")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", default="all", choices=["none", "peers", "all"], help="(default: all)")
    parser.add_argument("--train", type=int, nargs="+", default=[], metavar="BATCH", help="training steps as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=int, default=1, help="calls timed in a turn (default: 1, on cold caches)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, help="seconds after which the remaining cases are left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure, svg or png; needs matplotlib")
    parser.add_argument("--profile", action="store_true", help="the time by layer of the fused models, instead")
    args = parser.parse_args()
    if args.peers and not peers.is_available():
        parser.error("--peers needs timm, which is not installed: pip install '.[bench]'")
    if args.plot and not plot.is_available():
        parser.error("--plot needs matplotlib, which is not installed: pip install '.[bench]'")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    settings = {"model": " ".join(args.model), "calls in a turn": args.turn, **common.setting(args.device)}
    dtypes = [getattr(torch, name) for name in args.dtype]
    if args.profile:
        raise SystemExit(profile(args, settings, dtypes))
    rivals = [] if args.no_peers else args.peers or list(peers.PEERS)
    if rivals and not peers.is_available():
        settings["peers"], rivals = "left out, timm is not installed (pip install '.[bench]')", []
    elif rivals:
        settings |= {"timm": common.version("timm"), "top-1": f"published; the peers' from {peers.SOURCE}"}
    report = common.Report(settings, COLUMNS, args.json, args.limit)
    for batch, dtype in itertools.product(args.batch, dtypes):
        if report.time_is_up():
            continue
        setting = Setting(args.device, batch, dtype, args.compile)
        makers = {name: our_contestants(name, setting) for name in args.model}
        base = f"plain PyTorch {args.model[0]}"
        makers |= {name: peer_contestants(name, setting, base) for name in rivals}
        compare(makers, setting, args.rounds, args.turn, report)
    for batch, dtype in itertools.product(args.train, dtypes):
        if report.time_is_up():
            continue
        setting = Setting(args.device, batch, dtype, "none")
        makers = {name: training_contestants(name, setting) for name in args.model}
        compare(makers, setting, args.rounds, args.turn, report)
    if args.plot:
        plot.draw(report.results, settings, args.plot)
    raise SystemExit(report.close())


def profile(args: argparse.Namespace, settings: dict[str, Any], dtypes: list[torch.dtype]) -> int:
    report = common.Report(settings, ["model", "batch", "dtype", *layers.COLUMNS], args.json, args.limit)
    for name, batch, dtype in itertools.product(args.model, args.batch, dtypes):
        if report.time_is_up():
            continue
        torch.manual_seed(0)
        side, channels = weights.entry(name).preprocessing.crop, mobilemamba.PRESETS[name].get("in_chans", 3)
        model = calibrate(mobilemamba.create_model(name), torch.randn(4, channels, side, side)).fuse().to(dtype)
        x = Setting(args.device, batch, dtype, "none").images(channels, side).to(dtype)
        label = [name, str(batch), str(dtype).removeprefix("torch.")]
        for row, result in layers.profile(model, x, args.rounds):
            report.add([*label, *row], {**dict(zip(report.columns, label, strict=False)), **result})
    return report.close()


if __name__ == "__main__":
    main()
