"""What a forward pass of the fused s6 asks of a GPU's memory, counted on the CPU: sectors, shared memory, tensor cores.

python tools/kernel_counters.py           writes the table, benchmarks/results/counters.md
python tools/kernel_counters.py --check   compares with the committed table
python tools/kernel_counters.py --worst   prints the lines of the sources that ask for more than their bytes need
All fail if a hot kernel misses a bar. Needs g++ on x86-64 Linux, but no GPU and no nvcc.

The host compiler builds the kernels (tests/host_library.py), and tests/host_cuda/counters.cpp counts. At batch 256 some
blocks of each launch run and stand for the others; at batch 1 all run.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import counted_pass  # noqa: E402
import host_library  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BATCHES = (1, 256)
FFN = {1: "products", 256: "kernel"}  # the form of all layers; feed-forward layers of 448 channels are two products
SAMPLE = 32  # blocks of a launch at batch 256; test_kernel_counters.py compares a sample with all blocks

# The bars, for kernels that take a hundredth or more of the predicted time.
MOST_SECTORS, MOST_WAVEFRONTS = 1.15, 1.1  # times the fewest
MOST_ACTIVATIONS = 14.0  # MB of an image
HOT = 0.01
MISSED = {  # part of a kernel's name: times the fewest sectors that its loads may ask for, and why
    "line_conv_kernel": (
        2.3,
        "a lane loads elements of 2 bytes, 12 bytes from its neighbour's (3 channels, stride 2). The loads of a step "
        "ask for the same sectors, which stay in L1.",
    ),
    "TileShape<2, 2, 4>, ImagePatches>": (
        1.28,
        "24 channels are 48 bytes. So every other run of 64 bytes begins in the middle of a sector, and takes three "
        "instead of two. Neighbouring patches read the rest of the sector, from L1 or L2.",
    ),
}

# An H100 as the model takes it.
MULTIPROCESSORS, CLOCK = 132, 1.7e9
DRAM, L2 = 3.0e12, 5.5e12  # bytes/s
PRODUCT_CLOCKS = 1.6  # of a multiprocessor for an m16n8k16 product: mma.sync reaches 0.6 of the peak
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction in a clock
LAUNCH = 2e-6  # seconds between the kernels of a graph

# The rows of benchmarks/results/TODO.md's table, and the kernels of each.
MEASURED = {
    "products of matrices": r"packed_conv_kernel.*MatrixRows",
    "stem: one convolution of 3 channels": "line_conv_kernel",
    "stem: three convolutions": "packed_conv_kernel.*ImagePatches",
    "scan": "scan_forward_kernel",
    "depthwise, stride 1": r"depthwise_strip_kernel<\w+, \d, 1",
    "depthwise, stride 2": r"depthwise_strip_kernel<\w+, \d, 2",
    "Haar": "plane_forward_kernel<HaarOp",
    "gate": "gate_forward",
}


def times_of(launch: counted_pass.Launch, bytes: float) -> dict[str, float]:
    """Seconds that each part of the GPU needs for a launch that touches so many bytes."""
    clocks = CLOCK * min(launch.blocks, MULTIPROCESSORS)
    return {
        "DRAM": bytes / DRAM,
        "L2": launch.sectors * 32 / L2,
        "shared": launch.wavefronts / clocks,
        "tensor": launch.products * PRODUCT_CLOCKS / clocks,
        "issue": launch.instructions / SCHEDULERS / clocks,
    }


@dataclass
class Kernel:
    """The sums over the launches of a kernel in a pass."""

    launches: list[counted_pass.Launch] = field(default_factory=list)
    bytes: float = 0
    seconds: float = 0
    bound: dict[str, float] = field(default_factory=dict)  # seconds of the launches that each part bounds

    def add(self, launch: counted_pass.Launch, bytes: float) -> None:
        times = times_of(launch, bytes)
        part = max(times, key=lambda name: times[name])
        self.launches.append(launch)
        self.bytes += bytes
        self.seconds += times[part]
        self.bound[part] = self.bound.get(part, 0) + times[part]

    def sum(self, name: str) -> float:
        return sum(getattr(launch, name) for launch in self.launches)

    def ratio(self, name: str) -> float:
        """Times the fewest; 0 where there are none."""
        return self.sum(name) / max(1, self.sum(f"fewest_{name}"))


@dataclass
class Table:
    """A pass at one batch size."""

    batch: int
    kernels: dict[str, Kernel]
    torch_operators: list[tuple[str, float]]  # names and bytes

    def seconds(self) -> float:
        own = sum(kernel.seconds for kernel in self.kernels.values())
        launches = sum(len(kernel.launches) for kernel in self.kernels.values()) + len(self.torch_operators)
        return own + self.torch_seconds() + launches * LAUNCH

    def torch_seconds(self) -> float:
        return sum(bytes for _, bytes in self.torch_operators) / DRAM

    def is_hot(self, name: str) -> bool:
        return self.kernels[name].seconds >= HOT * self.seconds()


def table_of(batch: int, counted: counted_pass.Pass, one: counted_pass.Pass, two: counted_pass.Pass) -> Table:
    """`one` and `two` images tell the bytes of weights from those of activations, which each image has its own of."""
    table = Table(batch, {}, [(name, bytes * batch) for name, bytes in one.torch_operators])
    for launch, first, second in zip(counted.launches, one.launches, two.launches, strict=True):
        image = second.bytes - first.bytes
        table.kernels.setdefault(launch.kernel, Kernel()).add(launch, first.bytes + (batch - 1) * image)
    return table


def activation_bytes(one: counted_pass.Pass, two: counted_pass.Pass) -> float:
    """Of an image."""
    own = sum(b.bytes - a.bytes for a, b in zip(one.launches, two.launches, strict=True))
    return own + sum(bytes for _, bytes in one.torch_operators)


def missed_bars(tables: Sequence[Table], activations: float) -> list[str]:
    """What misses a bar, but for what MISSED allows."""
    found = []
    for table in tables:
        for name, kernel in table.kernels.items():
            loads = max((most for part, (most, _) in MISSED.items() if part in name), default=MOST_SECTORS)
            bars = {"load_sectors": loads, "store_sectors": MOST_SECTORS, "wavefronts": MOST_WAVEFRONTS}
            for what, most in bars.items():
                if table.is_hot(name) and kernel.ratio(what) > most:
                    times = f"{kernel.ratio(what):.2f} times the fewest {what.replace('_', ' ')}"
                    found.append(f"batch {table.batch}: {name} asks for {times}, at most {most}")
    if activations > MOST_ACTIVATIONS * 1e6:
        found.append(f"{activations / 1e6:.2f} MB of activations an image, at most {MOST_ACTIVATIONS}")
    return found


def short(x: float) -> str:
    return f"{x:.4g}" if x < 1e4 else f"{x / 1e3:.4g}k" if x < 1e6 else f"{x / 1e6:.4g}M"


def rows_of(table: Table) -> list[str]:
    lines = [
        "| kernel | hot | launches | loads | of fewest | stores | of fewest | wavefronts | of fewest | products "
        "| barriers | MB | predicted us | bound by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, k in sorted(table.kernels.items()):
        cells = [
            f"`{name}`",
            "yes" if table.is_hot(name) else "",
            str(len(k.launches)),
            *(
                cell
                for what in ("load_sectors", "store_sectors", "wavefronts")
                for cell in (short(k.sum(what)), f"{k.ratio(what):.2f}" if k.sum(what) else "-")
            ),
            short(k.sum("products")),
            short(k.sum("barriers")),
            f"{k.bytes / 1e6:.2f}",
            f"{k.seconds * 1e6:.1f}",
            max(k.bound, key=lambda part: k.bound[part]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    megabytes = sum(bytes for _, bytes in table.torch_operators) / 1e6
    torch = [str(len(table.torch_operators)), *[""] * 8, f"{megabytes:.2f}", f"{table.torch_seconds() * 1e6:.1f}"]
    lines.append(f"| torch's operators | | {' | '.join(torch)} | DRAM |")
    return lines


def measured() -> dict[str, tuple[str, str]]:
    """Launches and microseconds of the rows of TODO.md's table that MEASURED names."""
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \|", (RESULTS / "TODO.md").read_text(), flags=re.M)
    return {name: (launches, us) for name, launches, us in rows if name in MEASURED}


def measured_pass(batch: int) -> str:
    """Milliseconds of a pass as a CUDA graph."""
    models = json.loads((RESULTS / "h200.json").read_text())["stages"]["models"]
    for row in (dict(zip(models["columns"], row, strict=True)) for row in models["rows"]):
        if (row["batch"], row["dtype"], row["model"]) == (
            str(batch),
            "bfloat16",
            "mobilemamba.s6().fuse(), CUDA graph",
        ):
            return row["ms, median"]
    pass_of_table = rf"Where the ([\d.]+) ms of a fused s6 go, batch {batch}, bfloat16"
    found = re.search(pass_of_table, (RESULTS / "TODO.md").read_text())
    return found[1] if found else "-"


def text_of(tables: Sequence[Table], activations: float, compiler: str) -> str:
    lines = [
        f"""\
# What a forward pass of the fused s6 asks of a GPU

bfloat16, 224 x 224. Written by `python tools/kernel_counters.py`, g++ {compiler}. Counted on the CPU, without a GPU. At
batch 256 {SAMPLE} blocks of a launch ran and stand for the others.

- Loads and stores: the sectors, 32 bytes of global memory, that the instructions of warps ask for, and the fewest that
  the distinct bytes of each instruction need.
- Wavefronts: passes through shared memory, and the fewest without bank conflicts.
- Products: m16n8k16 instructions of a warp.
- Barriers: times that a block waits for its threads.
- MB: each byte once that a launch reads, and each byte once that it writes.

Bars, for hot kernels (a hundredth of the predicted time): {MOST_SECTORS} times the fewest sectors, {MOST_WAVEFRONTS}
times the fewest wavefronts; {MOST_ACTIVATIONS} MB of activations for an image. Activations of an image, with those of
torch's operators: **{activations / 1e6:.2f} MB**.

Missed:
""",
        *(f"- `{name}`, loads at most {most}: {why}" for name, (most, why) in MISSED.items()),
    ]
    for table in tables:
        lines += ["", f"## Batch {table.batch}", "", *rows_of(table)]
    lines.append(
        f"""
## Predicted times

**Predicted, not measured**, for an H100. A launch takes the largest of: its MB at {DRAM / 1e12} TB/s (DRAM); its
sectors at {L2 / 1e12} TB/s, as if none were in L1 (L2); a wavefront in a clock (shared); a product in {PRODUCT_CLOCKS}
clocks (tensor); {SCHEDULERS} instructions in a clock (issue). {MULTIPROCESSORS} multiprocessors, or as many as there
are blocks, at {CLOCK / 1e9} GHz. Each launch adds {LAUNCH * 1e6:.0f} us to the pass. The instructions are those of the
host's compiler, so they are an estimate. Nothing is predicted for waiting: a launch of few blocks takes longer. Beside
it what the H200 took (h200.md, TODO.md); some kernels have changed since.

| batch | predicted ms | measured ms, as a CUDA graph |
|---:|---:|---:|"""
    )
    lines += [f"| {t.batch} | {t.seconds() * 1e3:.2f} | {measured_pass(t.batch)} |" for t in tables]
    lines += [
        "",
        f"| batch {tables[-1].batch} | launches | predicted us | launches measured | measured us |",
        "|---|---:|---:|---:|---:|",
    ]
    on_gpu = measured()
    for row, pattern in MEASURED.items():
        kernels = [kernel for name, kernel in tables[-1].kernels.items() if re.match(pattern, name)]
        launches = sum(len(kernel.launches) for kernel in kernels)
        predicted = sum(kernel.seconds for kernel in kernels) * 1e6
        lines.append(f"| {row} | {launches} | {predicted:.0f} | {' | '.join(on_gpu.get(row, ('-', '-')))} |")
    return "\n".join(lines) + "\n"


def print_worst(tables: Sequence[Table], code: counted_pass.Code) -> None:
    for table in tables:
        for name, kernel in sorted(table.kernels.items()):
            wasted: dict[int, float] = {}
            for launch in kernel.launches:
                for place, more in launch.worst.items():
                    wasted[place] = wasted.get(place, 0) + more
            lines: dict[str, float] = {}  # an unrolled loop has its line several times
            for place in sorted(wasted, key=lambda place: -wasted[place])[:40]:
                line = code.line(place)
                lines[line] = lines.get(line, 0) + wasted[place]
            for line in sorted(lines, key=lambda line: -lines[line])[:5]:
                print(f"batch {table.batch}: {name}: {short(lines[line])} more than needed: {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--worst", action="store_true", help="print the lines that ask for more than needed, no table")
    arguments = parser.parse_args()
    if not host_library.CAN_BUILD:
        print("SKIPPED: needs g++ on x86-64 Linux")
        return 0
    library = host_library.build(counting=True)
    code = counted_pass.Code(library)
    tables = []
    for batch in BATCHES:
        one, two = (counted_pass.count(library, images, code=code, ffn=FFN[batch]) for images in (1, 2))
        counted = one if batch == 1 else counted_pass.count(library, batch, SAMPLE, code, FFN[batch])
        tables.append(table_of(batch, counted, one, two))
    activations = activation_bytes(one, two)  # at batch 256
    if arguments.worst:
        print_worst(tables, code)
        return 0
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    text = text_of(tables, activations, compiler)
    path = RESULTS / "counters.md"
    failed = False
    if not arguments.check:
        path.write_text(text)
        print(text, end="")
    elif f"g++ {compiler}." not in path.read_text():
        print(f"{path.name} is of another g++ than {compiler}: not compared")
    elif path.read_text() != text:
        print(f"{path.name} is not what is counted now; see `git diff` after running this without --check")
        failed = True
    missed = missed_bars(tables, activations)
    print(f"{len(tables[-1].kernels)} kernels, {activations / 1e6:.2f} MB of activations an image", *missed, sep="\n")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
