"""Times the kernels of one forward pass on a GPU, and sums what ncu counted of them, beside what was predicted.

    python tools/kernel_times.py --batch 256 1 --json FILE        # torch's profiler: launches and microseconds
    ncu ... python tools/kernel_times.py --batch 256 --once       # one pass between the profiler's start and stop

gpu_check.py calls both. Predictions are those of benchmarks/results/counters.md, where it is.
"""

import argparse
import csv
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PREDICTIONS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "counters.md"
COLUMNS = ["batch", "kernel", "launches", "µs, median", "of the pass", "predicted, µs", "measured over predicted"]
#: What ncu counts: its name, and that in the table.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "smsp__inst_executed.sum": "warp instructions",
    "sm__inst_executed_pipe_tensor.sum": "tensor-core instructions",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared-memory wavefronts",
    "l1tex__t_sectors.sum": "L1 sectors",
    "lts__t_sectors.sum": "L2 sectors",
    "dram__bytes.sum": "DRAM bytes",
}


def short_name(kernel: str) -> str:
    """scan_kernel of ``void mobilemamba::cuda::(anonymous namespace)::scan_kernel<float, 1>(Parameters)``."""
    kernel = kernel.replace("(anonymous namespace)::", "").removeprefix("void ").strip("` ")
    return re.split(r"[<(]", kernel, maxsplit=1)[0].split("::")[-1].strip() or kernel


def tables(text: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The Markdown tables of a text: the last heading before each, and its rows by column."""
    heading, columns, rows = "", [], []  # type: ignore[var-annotated]
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not columns:
                columns = cells
            elif not set("".join(cells)) <= set("-: "):
                rows.append(dict(zip(columns, cells, strict=False)))
            continue
        if columns:
            yield heading, rows
            columns, rows = [], []
        heading = line if line.startswith("#") else heading


def predicted(text: str, batch: int) -> dict[str, float]:
    """Microseconds by kernel, summed over the rows of the tables with a column "kernel" and one of predictions in µs.

    The batch is a column of the table, or stands in the heading before it: "batch 256".
    """
    found: dict[str, float] = defaultdict(float)
    for heading, rows in tables(text):
        in_heading = re.search(r"batch (\d+)", heading)
        for row in rows:
            column = next((name for name in row if "predicted" in name and re.search(r"\b[µu]s\b", name)), None)
            of = row.get("batch") or (in_heading[1] if in_heading else "")
            if column and "kernel" in row and of == str(batch) and re.fullmatch(r"[\d.]+", row[column]):
                found[short_name(row["kernel"])] += float(row[column])
    return dict(found)


def read_ncu(text: str) -> list[list[str]]:
    """From the output of ``ncu --csv --page raw``: for each kernel its launches and the sums of ``METRICS``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    sums: dict[str, list[float]] = {}
    for row in csv.DictReader(lines[start:]):
        if row["ID"]:  # not the units
            values = [float((row.get(name) or "0").replace(",", "")) for name in METRICS]
            before = sums.setdefault(short_name(row["Kernel Name"]), [0.0] * (1 + len(METRICS)))
            sums[short_name(row["Kernel Name"])] = [a + b for a, b in zip(before, [1.0, *values], strict=True)]
    return [[name, *(f"{value:.0f}" for value in values)] for name, values in sums.items()]


def measure(batch: int, rounds: int, once: bool) -> list[list[str]]:
    """Rows of the table: the kernels of a fused s6 in bfloat16."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import mobilemamba

    torch.manual_seed(0)
    model = mobilemamba.s6().to("cuda").eval().fuse().to(torch.bfloat16)
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    times: list[dict[str, float]] = []
    launches: dict[str, int] = {}
    with torch.inference_mode():
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        if once:
            torch.cuda.profiler.start()
            model(x)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            return []
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                model(x)
                torch.cuda.synchronize()
            found: dict[str, float] = defaultdict(float)
            launches = defaultdict(int)
            for event in profiler.events() or ():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    found[short_name(event.name)] += event.device_time_total
                    launches[short_name(event.name)] += 1
            times.append(found)
    medians = {name: statistics.median(found[name] for found in times) for name in times[-1]}
    guesses = predicted(PREDICTIONS.read_text(), batch) if PREDICTIONS.is_file() else {}
    total = sum(medians.values())
    rows = []
    for name in sorted(medians, key=lambda name: -medians[name]):
        guess = guesses.get(name)
        beside = [f"{guess:.1f}", f"{medians[name] / guess:.2f}"] if guess else ["-", "-"]
        share = f"{medians[name] / total:.1%}"
        rows.append([str(batch), name, str(launches[name]), f"{medians[name]:.1f}", share, *beside])
    guess = sum(guesses.values())
    beside = [f"{guess:.1f}", f"{total / guess:.2f}"] if guess else ["-", "-"]
    return [*rows, [str(batch), "all", str(sum(launches.values())), f"{total:.1f}", "100 %", *beside]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="one pass, for ncu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for batch in args.batch for row in measure(batch, args.rounds, args.once)]
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if args.json:
        args.json.write_text(json.dumps({"columns": COLUMNS, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
