"""``mobilemamba info``: prints what a bug report needs: versions, build, devices, threads, the weights cache."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from .. import _native, weights
from .options import Parser

HELP = "Print what a bug report needs: versions, build, devices, paths."


def add_options(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> None:
    collected = collect()
    print(json.dumps(collected, indent=2) if args.json else format_text(collected))


def collect() -> dict[str, Any]:
    """The facts as a dict for ``json.dumps``. :func:`format_text` lays them out for people."""
    build, library = _native.BUILD, torch.ops.mobilemamba.build_facts()
    return {
        "mobilemamba": {
            "version": build["version"],
            "commit": build["commit"],
            "path": str(_native.LIBRARY.parent),
        },
        "built": {
            "torch": build["torch"],
            "for": build["why"],
            "compiler": library["compiler"],
            "cxx flags": " ".join(build["cxx_flags"]),
            "nvcc flags": " ".join(build["nvcc_flags"]) or None,
        },
        "backends": {
            "CPU": f"{torch.ops.mobilemamba.cpu_kernels()} kernels",
            "CUDA": f"{library['cuda']}, {library['archs'].replace(',', ' ')}" if "cuda" in library else "not built",
        },
        "running": {
            "torch": str(torch.__version__),
            "torch CUDA": torch.version.cuda,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "numpy": _version("numpy"),
            "pillow": _version("pillow"),
            "safetensors": _version("safetensors"),
            "system": f"{_system()}, {platform.machine()}",
        },
        "hardware": {
            "CPU capability": torch.backends.cpu.get_cpu_capability(),
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
            "GPUs": _gpus(),
        },
        "weights cache": str(weights.cache_dir()),
    }


def format_text(facts: dict[str, Any]) -> str:
    """The facts of :func:`collect` as aligned lines, with a heading for each group."""
    lines = []
    for group, entries in facts.items():
        if not isinstance(entries, dict):
            lines.append(f"{group}: {entries}")
            continue
        lines.append(f"{group}:")
        width = max(map(len, entries))
        for name, value in entries.items():
            text = "; ".join(value) if isinstance(value, list) else value
            lines.append(f"  {name:<{width}}  {text or 'none'}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{device.name} (sm_{device.major}{device.minor}, {device.total_memory >> 30} GiB)" for device in devices]
