"""Times training steps, forward and backward, against plain PyTorch, eager and compiled, alternating; and their memory.

    python benchmarks/training.py --json FILE
    python benchmarks/training.py --model nano --batch 128 --threads 1

The rival is the network in plain PyTorch as well as we can write it: images and weights channels last, one matrix
product or convolution for each layer, and a scan that is vectorised over positions: log2(L) steps, each of which joins
every state with the one 1, 2, 4 ... positions before it. Under torch.compile inductor fuses what is between products.

A step is the loss and its gradients, without an optimizer, which is the same for all. "Saved MiB" is what autograd
keeps between the forward and the backward pass, each memory counted once, parameters not at all. "Peak MiB" is the most
that tensors take at a time during the step, beyond what is there before. ``--cpu-time`` times the processor's time
instead of the clock's, for machines that others use: with one thread only.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import common
import models
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobilemamba
from mobilemamba import weights

COLUMNS = ["model", "batch", "training step", "ms, median", "ms, least", "images/s", "against the rival"]
COLUMNS += ["saved MiB", "peak MiB"]
OURS, LEAN = "mobilemamba", "mobilemamba, grad_checkpointing"
RIVAL, COMPILED = "plain PyTorch", "plain PyTorch, compiled"


def rival() -> AbstractContextManager[None]:
    """Inside this context the model is the rival."""
    return reference.plain_pytorch(reference.doubling_scan)


Step = Callable[[], Tensor]  # returns the loss; its gradients are computed by the caller


def steps_of(name: str, batch: int, which: list[str]) -> tuple[nn.Module, dict[str, Step]]:
    """The model, and the forward pass of each contestant; all have the same parameters and images."""
    torch.manual_seed(0)
    side, channels = weights.entry(name).preprocessing.crop, mobilemamba.PRESETS[name].get("in_chans", 3)
    model = mobilemamba.create_model(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(model.num_classes, (batch,))
    compiled = torch.compile(model, dynamic=False)  # not the sizes of the model before, made variable

    def loss(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(images), labels)

    def ours() -> Tensor:
        return loss(model)

    def lean() -> Tensor:
        model.set_grad_checkpointing(True)
        try:
            return loss(model)
        finally:
            model.set_grad_checkpointing(False)

    def plain() -> Tensor:
        with rival():
            return loss(model)

    def plain_compiled() -> Tensor:
        with rival():
            return loss(compiled)

    steps = {OURS: ours, LEAN: lean, RIVAL: plain, COMPILED: plain_compiled}
    return model, {what: step for what, step in steps.items() if what in which}


def run(step: Step, model: nn.Module) -> None:
    step().backward()
    model.zero_grad()


def saved_mebibytes(step: Step) -> float:
    sizes: dict[int, tuple[int, Tensor]] = {}  # with the tensors, so that no memory is used again

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            memory = x.untyped_storage()
            sizes[memory.data_ptr()] = (memory.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(size for size, _ in sizes.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["s6", "nano"], choices=mobilemamba.list_models())
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128], help="one for each model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="+", default=[], choices=[LEAN, RIVAL, COMPILED])
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len(args.batch) != len(args.model):
        parser.error(f"--batch: expected one for each of the {len(args.model)} models, got {len(args.batch)}")
    if args.cpu_time and args.threads != 1:
        parser.error(f"--cpu-time: expected --threads 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    settings = {**common.setting(torch.device("cpu")), "time": "the processor's" if args.cpu_time else "the clock's"}
    report = common.Report(settings, COLUMNS, args.json, None)
    for name, batch in zip(args.model, args.batch, strict=True):
        model, steps = steps_of(
            name, batch, [what for what in (OURS, LEAN, RIVAL, COMPILED) if what not in args.without]
        )
        times: dict[str, list[float]] = {what: [] for what in steps}
        for i in range(args.rounds + 2):  # two rounds to compile and to warm up
            for what, step in steps.items():
                start = clock()
                run(step, model)
                if i >= 2:
                    times[what].append((clock() - start) * 1e3)
        for what, step in steps.items():
            median, least = statistics.median(times[what]), min(times[what])
            against = f"{median / statistics.median(times[RIVAL]):.2f}" if RIVAL in times else "-"
            saved = saved_mebibytes(step)
            peak = models.peak_mebibytes(partial(run, step, model), torch.device("cpu"))
            row = [name, str(batch), what, f"{median:.0f}", f"{least:.0f}", f"{batch / median * 1e3:.0f}", against]
            result = {"model": name, "batch": batch, "step": what, "ms": times[what], "saved MiB": saved}
            report.add([*row, f"{saved:.0f}", f"{peak:.0f}"], {**result, "peak MiB": peak})
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
