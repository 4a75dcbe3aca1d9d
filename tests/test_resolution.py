"""The benchmark of image sizes: its slope and its memory are right, its table and figure have what was measured."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import processes
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def resolution(monkeypatch, one_thread) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("resolution")
    torch.set_default_device(None)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_slope(resolution) -> None:
    assert resolution.slope({128: 1e9, 256: 3.0, 1024: 48.0}) == pytest.approx(2)  # of the two largest sides
    results = [
        {"network": "b1", "pixels": 256, "median ms": 3.0},
        {"network": "b1", "pixels": 512, "median ms": 24.0},
        {"network": "repvit_m1_0", "pixels": 256, "median ms": 1.0},
        {"network": "repvit_m1_0", "pixels": 512, "error": "out of memory"},
    ]
    assert resolution.slopes(results).splitlines()[2:] == ["| b1 | 256 to 512 | 3.00 |"]


MEMORY = """
import torch
import resolution

size = 64 * 2**20 // 4  # 64 MiB: beyond 32 glibc returns memory to the system at once

def call():
    torch.ones(size)
    first, second = torch.ones(size), torch.ones(size)
    del first, second
    torch.ones(size)

call()  # code that runs for the first time takes resident memory too
for measured in (call, lambda: None):
    print(resolution.peak_mebibytes(measured, torch.device("cpu")))
"""


def test_memory_of_a_call() -> None:
    """Of tensors that are there at the same time, not of those that came one after the other.

    In a process of its own, as in the benchmark: what other tests leave in a process changes when memory is given back.
    """
    path = os.pathsep.join(map(str, (BENCHMARKS, processes.TESTS)))
    done = processes.run([sys.executable, "-c", MEMORY], {"PYTHONPATH": path})
    processes.check(done)
    assert [float(line) for line in done.stdout.split()] == pytest.approx([128, 0], abs=16)


def test_run(resolution, tmp_path, monkeypatch, capsys) -> None:
    for name in ("matplotlib", "timm"):
        pytest.importorskip(name, reason="the extra bench is not installed")
    forward = resolution.contestants.forward

    def limited(network, x):
        if x.size(2) > 64 and x.size(1) == 3:
            raise torch.OutOfMemoryError("no memory for 96 pixels")
        return forward(network, x)

    monkeypatch.setattr(resolution.contestants, "forward", limited)
    table, figure = tmp_path / "table.json", tmp_path / "figure.svg"
    words = ["--model", "nano", "--peers", "shvit_s3", "--sides", "96", "64", "32", "--rounds", "1", "--threads", "1"]
    assert resolution.main([*words, "--json", str(table), "--figure", str(figure)]) == 1
    content = json.loads(table.read_text())
    measured = [(row["network"], row["pixels"]) for row in content["results"] if "error" not in row]
    assert measured == [("nano", 32), ("shvit_s3", 32), ("nano", 64), ("shvit_s3", 64), ("nano", 96)]
    assert all(len(row["ms"]) == 1 for row in content["results"] if "error" not in row)
    assert content["failed"] == 1
    captured = capsys.readouterr()
    assert "no memory for 96 pixels" in captured.err
    assert "| nano | 64 to 96 |" in captured.out
    assert "| shvit_s3 | 32 to 64 |" in captured.out
    for text in ("MobileMamba NANO", "SHViT-S3", "peak memory of a call, MiB", "batch 1, float32, eager; 1 threads"):
        assert text in figure.read_text()


@pytest.mark.parametrize("sides", [["0"], ["64", "64"]])
def test_refusals(resolution, sides, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        resolution.main(["--sides", *sides])
    assert f"--sides: expected positive numbers that differ, got {' '.join(sides)}" in capsys.readouterr().err
