"""What the benchmarks share: where they ran, and their results as a table and as JSON."""

import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for reference.py, the plain PyTorch rendition

import mobilemamba
from mobilemamba import _native


def setting(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, and the commit that the library was built from."""
    facts: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["tf32"] = f"matmul {torch.backends.cuda.matmul.allow_tf32}, cudnn {torch.backends.cudnn.allow_tf32}"
    else:
        facts["cpu"] = torch.backends.cpu.get_cpu_capability() + (" with AMX" if has_amx() else "")
        facts["processor"] = processor()
    if commit := _native.BUILD["commit"]:
        facts["commit"] = commit
    return facts | {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "torch": str(torch.__version__),
        "mobilemamba": mobilemamba.__version__,
    }


def has_amx() -> bool:
    return "amx_bf16" in cpu_info().get("flags", "").split()


def processor() -> str:
    """The processor's name, family and model, as Linux has them."""
    facts = cpu_info()
    name = facts.get("model name", platform.processor() or "unknown")
    numbers = " ".join(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{name} ({numbers})" if numbers else name


def cpu_info() -> dict[str, str]:
    """The first processor's entries in ``/proc/cpuinfo``; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def version(package: str) -> str:
    return importlib.metadata.version(package)


class Report:
    """Rows, printed as a Markdown table as they come; with ``path`` also written as JSON, each time."""

    def __init__(self, settings: dict[str, Any], columns: list[str], path: Path | None, limit: float | None) -> None:
        self.settings, self.columns, self.path = settings, columns, path
        self.end = None if limit is None else time.monotonic() + limit
        self.results: list[dict[str, Any]] = []
        self.rows: list[list[str]] = []
        self.left_out = self.failed = 0
        print(", ".join(f"{key} {value}" for key, value in settings.items()), end="\n\n")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def time_is_up(self) -> bool:
        """Whether the next case has to be left out; it is counted."""
        if self.end is None or time.monotonic() < self.end:
            return False
        self.left_out += 1
        return True

    def add(self, row: list[str], result: dict[str, Any]) -> None:
        self.rows.append(row)
        self.results.append(result)
        print(f"| {' | '.join(row)} |", flush=True)
        self.write()

    def fail(self, row: list[str], result: dict[str, Any], error: Exception) -> None:
        self.failed += 1
        self.add(row, {**result, "error": str(error)})
        print(f"failed: {error}", file=sys.stderr, flush=True)

    def write(self) -> None:
        if self.path:
            content = {**self.settings, "left_out": self.left_out, "failed": self.failed}
            content |= {"columns": self.columns, "rows": self.rows}
            self.path.write_text(json.dumps({**content, "results": self.results}, indent=1) + "\n")

    def close(self) -> int:
        """The exit status."""
        self.write()
        if self.left_out:
            print(f"\nThe time was up: {self.left_out} cases are left out.")
        return 1 if self.failed else 0
