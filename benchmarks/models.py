"""Times the models against their plain PyTorch rendition and against their peers, under every runtime, by turns.

    python benchmarks/models.py --model s6 --batch 1 32 --dtype float32 bfloat16
    python benchmarks/models.py --model t2 t4 s6 b1 b2 b4 --batch 1 --front front.svg
    python benchmarks/models.py --device cuda --batch 1 256 --dtype float32 bfloat16 float16 --train 256
    python benchmarks/models.py --model t2 s6 b1 --peers efficientvmamba_t efficientvmamba_s --plot mambas.svg
    python benchmarks/models.py --device cuda --protocol paper --model s6 b1 b4 --peers efficientvmamba_t localvim_t
    python benchmarks/models.py --no-peers --profile

Prints a table of medians with their spread; ``--json FILE`` writes the same with versions and settings, ``--plot FILE``
draws published top-1 against measured images/s. ``--front FILE`` draws our presets beside the peers' front and prints
our time over the front's at the same accuracy (front.py). ``--profile`` prints where a fused model's time goes instead.

The runtimes are torch, eager; torch.compile, on the CPU with inductor's freezing, on CUDA in the mode max-autotune,
with CUDA graphs; and on the CPU ONNX Runtime and OpenVINO, on files that torch.onnx.export writes, and at batch 1
ExecuTorch and LiteRT, on files that are written the same way as ours. Each runtime has a process of its own. In each
round every process has a turn, and in it every contestant: one call, after the others have used the caches, as in a
program that does other things as well; or with ``--turn N`` one that is not timed and N that are, as in a program that
does nothing else. At batch 1 that makes a difference of several ms.

The peers (peers.py) are timm's, each at the resolution of its weights, with BatchNorm fused where timm does it,
channels last; on the CPU eager only with ``--runtimes torch``: at batch 1 in float32 eager takes 2 to 4 times as long
as the file. Those that timm does not have (efficientvmamba.py, localvim.py) are there where ``--peers`` names them.
16-bit types are the type of weights and images; for OpenVINO they are its hint of the precision, and its input stays
float32. The other runtimes of files are timed in float32 only: ONNX Runtime has no bfloat16 products for CPUs. Ours are
fused, scripted too, as C++ programs run them. The first model, or those of ``--exported``, are also there as files of
``mobilemamba export``, and the first in plain PyTorch: ``mobilemamba.deploy.portable``, eager and compiled, with two
forms of the scan. "against plain" is against the fastest of these. With ``--int8`` ours are there quantized too, beside
an input in the type of the case, and files with convolutions in 8 bits: by NNCF for OpenVINO, and by each other
runtime's own means. They stay out of the front, which is of other accuracies.

``--protocol paper`` measures as the published script does: a batch of 256 in float32, not channels last, BatchNorm
fused, nothing compiled; each network alone, without a pause: 50 calls, then one time for 20 (on the CPU 2, then 5).
TF32 is as torch has it by default: in cuDNN's convolutions, not in matrix products.

MACs are torch's flop counter's, halved. Peak MiB is what the tensors take that one call allocates, weights not
included: on the CPU as torch's allocator tells the profiler, where libraries' own buffers do not show, nor what mrffi's
threads allocate for their images. On CUDA every call is waited for, and batch 1 is also replayed by ``CUDAGraphs``.
``--train`` times training steps, with AdamW.
"""

import argparse
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import common
import contestants
import front
import layers
import peers
import plot
import runtimes
import torch
from contestants import Setting
from runtimes import Call, Worker

import mobilemamba

Key = TypeVar("Key")
Turn = Callable[[], list[float] | None]  # the milliseconds of its calls; None where it failed


def turn_of(call: Call, turn: int, device: torch.device, clock: str = "perf_counter") -> list[float]:
    """Milliseconds of each timed call, by this function of ``time``."""
    now = getattr(time, clock)
    wait: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    time.sleep(runtimes.PAUSE)
    if turn > 1:
        call()  # brings weights and code back into the caches
    times = []
    for _ in range(turn):
        wait()
        start = now()
        call()
        wait()
        times.append((now() - start) * 1e3)
    return times


def block_of(call: Call, warm_up: int, calls: int, device: torch.device) -> list[float]:
    """Milliseconds of one call, from one time for ``calls`` of them: the published protocol."""
    wait: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warm_up):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return [(time.perf_counter() - start) * 1e3 / calls]


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


def by_turns(turns: Mapping[Key, Turn], rounds: int, warm_up: int = 2) -> dict[Key, list[float]]:
    """Milliseconds of each contestant's calls, from ``rounds`` turns after ``warm_up`` others."""
    times: dict[Key, list[float]] = {name: [] for name in turns}
    for i in range(warm_up + rounds):
        for name, turn in turns.items():
            figures = turn() or []
            times[name] += figures if i >= warm_up else []
    return times


#: Of the published script: calls before, and calls that are timed.
PAPER = {"cuda": (50, 20), "cpu": (2, 5)}


FOR_16_BITS = ("torch", "compile", "openvino")
COLUMNS = ["batch", "dtype", "model", "pixels", "top-1 (distilled)", "MMACs"]
COLUMNS += ["ms, median", "min to max", "images/s", "against plain", "peak MiB", "file MB"]


def compare(
    plans: dict[str, runtimes.Makers], setting: Setting, args: argparse.Namespace, report: common.Report
) -> None:
    """One case. ``plans`` has what each runtime makes."""
    label = [str(setting.batch), str(setting.dtype).removeprefix("torch.")]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(f"batch {label[0]}, {label[1]}, {runtime}", made, setting.prepare)))
            for runtime, made in plans.items()
        ]
        how = partial(turn_of, turn=args.turn, device=setting.device, clock=clock_of(args))
        if args.protocol == "paper":
            warm_up, calls = PAPER[setting.device.type]
            how = partial(block_of, warm_up=warm_up, calls=calls, device=setting.device)
        turns = {name: partial(worker.measure, name, how) for worker in workers for name in worker.facts}
        times = by_turns(turns, args.rounds, 0 if args.protocol == "paper" else 2)
        peaks: dict[str, float] = {}
        for runtime, worker in zip(plans, workers, strict=True):
            for name in worker.facts:
                # graphs hold their memory throughout, and other libraries do not tell
                if runtime == "torch" and "CUDA graph" not in name and name not in worker.errors:
                    peaks[name] = worker.measure(name, partial(peak_mebibytes, device=setting.device))
    for runtime, worker in zip(plans, workers, strict=True):
        for what, error in worker.errors.items():
            row = [*label, f"{what}, {runtime}", *["-"] * (len(report.columns) - 3)]
            report.fail(row, {"batch": setting.batch, "dtype": label[1], "model": what}, RuntimeError(error))
    facts = {name: worker.facts[name] for worker in workers for name in worker.facts if name not in worker.errors}
    medians = {name: statistics.median(times[name]) for name in facts}
    plain: dict[str, float] = {}  # by network
    for name, fact in facts.items():
        if fact.get("plain"):
            plain[fact["network"]] = min(medians[name], plain.get(fact["network"], medians[name]))
    first = next(iter(plain.values()), None)
    for name, fact in facts.items():
        median = medians[name]
        per_image, base = fact.get("MMACs"), plain.get(fact["network"], first)
        accuracies = [
            form.format(fact[key]) for key, form in (("top1", "{}"), ("top1, distilled", "({})")) if key in fact
        ]
        row = [
            *label,
            name,
            str(fact["pixels"]),
            " ".join(accuracies) or "-",
            f"{per_image:.0f}" if per_image else "-",
            f"{median:.1f}",
            f"{min(times[name]):.1f} to {max(times[name]):.1f}",
            f"{setting.batch / median * 1e3:.0f}",
            f"{base / median:.2f}x" if base else "-",
            f"{peaks[name]:.0f}" if peaks.get(name) else "-",
            f"{fact['MB']:.1f}" if "MB" in fact else "-",
        ]
        figures = {"ms": times[name], "median ms": median, "peak MiB": peaks.get(name)}
        report.add(row, {"batch": setting.batch, "dtype": label[1], "model": name, **fact, **figures})


def plans_of(args: argparse.Namespace, rivals: list[str], setting: Setting) -> dict[str, runtimes.Makers]:
    """What each runtime makes in this case."""
    plans = {}
    for runtime in args.runtimes:
        if runtime not in FOR_16_BITS and setting.dtype != torch.float32:
            continue
        if runtime in runtimes.FOR_ONE_IMAGE and setting.batch != 1:
            continue
        chosen = args.compile if runtime == "compile" and args.compile is not None else [*args.model, *rivals]
        ours, peer = contestants.our_contestants, contestants.peer_contestants
        first = args.model[0]
        names = args.exported or [first] if runtime in runtimes.ON_FILES else args.model
        made = [(name, partial(ours, name, runtime, setting, name == first)) for name in names]
        if runtime != "torch" or args.device.type == "cuda" or args.runtimes == ["torch"]:
            made += [(name, partial(peer, name, runtime, setting)) for name in rivals]
        plans[runtime] = [(name, make) for name, make in made if name in chosen]
    return plans


def clock_of(args: argparse.Namespace) -> str:
    return "process_time" if args.processor_time else "perf_counter"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["s6"], choices=mobilemamba.list_models())
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--peers", nargs="+", choices=list(peers.PEERS), metavar="PEER", help="(default: timm's)")
    chosen.add_argument("--no-peers", action="store_true")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--protocol", choices=["turns", "paper"], default="turns", help="how it is measured")
    parser.add_argument("--batch", type=int, nargs="+", help="(default: 1 and 32; the paper's is 256)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--runtimes", nargs="+", choices=list(runtimes.TITLES), help="(default: all that are installed)"
    )
    parser.add_argument("--compile", nargs="+", metavar="NETWORK", help="which are compiled (default: all)")
    text = "which of --model are files of other runtimes too (default: the first)"
    parser.add_argument("--exported", nargs="+", metavar="NETWORK", help=text)
    parser.add_argument("--int8", action="store_true", help="on the CPU, products in 8 bits too")
    parser.add_argument("--train", type=int, nargs="+", default=[], metavar="BATCH", help="training steps as well")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 15; the paper's is 1)")
    parser.add_argument("--turn", type=int, default=1, help="calls timed in a turn (default: 1, on cold caches)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    text = "processor time of one thread instead of time on the clock: for a machine whose cores others use, too"
    parser.add_argument("--processor-time", action="store_true", help=text)
    parser.add_argument("--limit", type=float, help="seconds after which the remaining cases are left out")
    parser.add_argument("--files", type=Path, metavar="DIR", help="keep the ONNX files there, and use those that are")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure, svg or png; needs matplotlib")
    parser.add_argument("--front", type=Path, metavar="FILE", help="another: ours and the peers' front")
    parser.add_argument("--profile", action="store_true", help="the time by layer of the fused models, instead")
    args = parser.parse_args()
    if args.peers and not peers.is_available():
        parser.error("--peers needs timm, which is not installed: pip install '.[bench]'")
    if (args.plot or args.front) and not plot.is_available():
        parser.error("--plot and --front need matplotlib, which is not installed: pip install '.[bench]'")
    paper, on_cpu = args.protocol == "paper", args.device.type == "cpu"
    args.batch = args.batch or ([256] if paper else [1, 32])
    args.rounds = args.rounds or (1 if paper else 15)
    if paper:
        if args.dtype != ["float32"] or args.runtimes not in (None, ["torch"]) or args.turn != 1 or args.train:
            parser.error("--protocol paper: expected neither --dtype, --runtimes, --turn nor --train")
        args.runtimes = ["torch"]
    if args.processor_time and (args.threads != 1 or not on_cpu or paper):
        parser.error("--processor-time: expected --threads 1 on the CPU, and turns")
    for runtime in args.runtimes or ():
        if lacking := runtimes.missing(runtime):
            extra = runtime if runtime in runtimes.FOR_ONE_IMAGE else "bench"
            parser.error(f"--runtimes {runtime}: {', '.join(lacking)} not installed: pip install '.[{extra}]'")
        if runtime in runtimes.ON_FILES and not on_cpu:
            parser.error(f"--runtimes {runtime}: expected --device cpu, got {args.device}")
    if args.runtimes is None:
        usable = [name for name in runtimes.TITLES if on_cpu or name not in runtimes.ON_FILES]
        args.runtimes = [name for name in usable if not runtimes.missing(name)]
    if args.int8 and not on_cpu:
        parser.error(f"--int8: expected --device cpu, got {args.device}")
    if args.int8 and "openvino" in args.runtimes and importlib.util.find_spec("nncf") is None:
        parser.error("--int8: nncf is not installed: pip install '.[bench]'; or leave openvino out of --runtimes")
    if unknown := [name for name in args.exported or () if name not in args.model]:
        parser.error(f"--exported: expected networks of --model, got {' '.join(unknown)}")
    known = [*args.model, *peers.PEERS]
    if unknown := [name for name in args.compile or () if name not in known]:
        parser.error(f"--compile: expected networks of --model and --peers, got {' '.join(unknown)}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    settings = {"model": " ".join(args.model), "calls in a turn": args.turn, "clock": clock_of(args)}
    settings |= common.setting(args.device)
    if args.protocol == "paper":
        settings |= {"protocol": "the paper's", "calls in a turn": "{} + {}".format(*PAPER[args.device.type])}
    dtypes = [getattr(torch, name) for name in args.dtype]
    if args.profile:
        raise SystemExit(profile(args, settings, dtypes))
    settings |= {
        name: common.version(runtimes.PACKAGES.get(name, name)) for name in args.runtimes if name in runtimes.ON_FILES
    }
    rivals = [] if args.no_peers else args.peers or peers.IN_TIMM
    if rivals and not peers.is_available():
        settings["peers"], rivals = "left out, timm is not installed (pip install '.[bench]')", []
    elif rivals:
        settings |= {"timm": common.version("timm"), "top-1": f"published; the peers' from {peers.sources(rivals)}"}
    report = common.Report(settings, COLUMNS, args.json, args.limit)
    if args.files:
        args.files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cases: Iterable[tuple[bool, int]] = [*((False, n) for n in args.batch), *((True, n) for n in args.train)]
        for (train, batch), dtype in itertools.product(cases, dtypes):
            if report.time_is_up():
                continue
            files, paper = args.files or Path(folder), args.protocol == "paper"
            setting = Setting(args.device, batch, dtype, args.threads, files, args.int8, channels_last=not paper)
            if train:
                made = [(name, partial(contestants.training_contestants, name, setting)) for name in args.model]
                plans: dict[str, runtimes.Makers] = {"torch": made}
            else:
                plans = plans_of(args, rivals, setting)
            compare(plans, setting, args, report)
    if args.plot:
        plot.draw(report.results, settings, args.plot)
    if args.front:
        print(front.table(report.results))
        front.draw(report.results, settings, args.front)
    raise SystemExit(report.close())


def profile(args: argparse.Namespace, settings: dict[str, Any], dtypes: list[torch.dtype]) -> int:
    report = common.Report(settings, ["model", "batch", "dtype", *layers.COLUMNS], args.json, args.limit)
    for name, batch, dtype in itertools.product(args.model, args.batch, dtypes):
        if report.time_is_up():
            continue
        model, channels, side = contestants.make_model(name)
        x = Setting(args.device, batch, dtype, args.threads, Path()).images(channels, side).to(dtype)
        label = [name, str(batch), str(dtype).removeprefix("torch.")]
        for row, result in layers.profile(model.fuse().to(dtype), x, args.rounds):
            report.add([*label, *row], {**dict(zip(report.columns, label, strict=False)), **result})
    return report.close()


if __name__ == "__main__":
    main()
