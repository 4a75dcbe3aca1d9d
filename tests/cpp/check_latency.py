"""check_latency.py DATA CLASSIFY: s6 from C++ takes no longer than the fused model in Python, on as many threads."""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from expectations import make_model

DATA, CLASSIFY = Path(sys.argv[1]), sys.argv[2]
RUNS, THREADS = 15, 1


def python() -> float:
    model, images = make_model("s6").fuse(), torch.randn(1, 3, 224, 224)
    times = []
    with torch.inference_mode():
        for _ in range(RUNS):
            start = time.perf_counter()
            model(images)
            times.append(1000 * (time.perf_counter() - start))
    return min(times)


def cpp(model: Path) -> float:
    command = [CLASSIFY, model, DATA / "progressive.jpg", "--threads", str(THREADS), "--benchmark", str(RUNS)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"median .* ms, (.*) to .* ms", output)[1])


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    rounds = [(python(), cpp(DATA / "s6-float32.pt"), cpp(DATA / "s6-float32.pt2")) for _ in range(3)]
    eager, *others = (min(times) for times in zip(*rounds, strict=True))  # the least disturbed of all runs
    print(
        f"batch 1, {THREADS} thread: Python {eager:.2f} ms, C++ {others[0]:.2f} (TorchScript), {others[1]:.2f} (AOTI)"
    )
    if max(others) > 1.1 * eager:
        raise SystemExit("C++ takes longer than Python")
