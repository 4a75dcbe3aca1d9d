"""The comparison of models: its plain PyTorch rendition is right, processes take turns, the front is what it says."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_portable import trained

import mobilemamba
from mobilemamba.deploy import portable

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The modules of the folder, whose names are too short to stay."""
    before = set(sys.modules)
    with mock.patch.object(sys, "path", [str(FOLDER), *sys.path]):
        names = ("contestants", "front", "models", "runtimes")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


# The plain rendition


@pytest.mark.parametrize("scan", ["rows", "doubling"])
@pytest.mark.parametrize("size", [(28, 28), (37, 19), (4, 60)], ids=str)
def test_plain_pytorch_computes_the_same(benchmarks, scan: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = trained(mobilemamba.nano())
    images = torch.randn(2, 1, *size)
    expected = benchmarks.contestants.forward(model, images)
    actual = benchmarks.contestants.plain_forward(scan, portable(model), images)
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_each_form_of_the_scan_is_used(benchmarks, monkeypatch) -> None:
    calls = []

    def counted(a, b, backward):
        calls.append(backward)
        return benchmarks.contestants.doubling(a, b, backward)

    monkeypatch.setitem(benchmarks.contestants.SCANS, "counted", counted)
    benchmarks.contestants.plain_forward("counted", portable(mobilemamba.nano().eval()), torch.randn(1, 1, 28, 28))
    assert calls == [False, True] * 4


# Processes


def test_processes_take_turns(benchmarks, tmp_path, capfd) -> None:
    setting = benchmarks.contestants.Setting(torch.device("cpu"), 2, torch.float32, 1, tmp_path)
    make = partial(benchmarks.contestants.our_contestants, runtime="torch", setting=setting, with_plain=True)
    makers = [("nano", partial(make, "nano")), ("none", partial(make, "none"))]
    worker = benchmarks.runtimes.Worker("a test", makers, setting.prepare)
    try:
        assert list(worker.errors) == ["none"]
        assert list(worker.facts) == [
            "plain PyTorch nano, scan by rows",
            "plain PyTorch nano, scan by doubling",
            "mobilemamba.nano()",
            "mobilemamba.nano().fuse()",
            "mobilemamba.nano().fuse(), scripted",
        ]
        how = partial(benchmarks.models.turn_of, turn=3, device=setting.device)
        times = benchmarks.models.by_turns({name: partial(worker.measure, name, how) for name in worker.facts}, 2)
        assert {len(figures) for figures in times.values()} == {6}
        assert all(ms > 0 for figures in times.values() for ms in figures)
        how = partial(benchmarks.models.peak_mebibytes, device=setting.device)
        assert worker.measure("mobilemamba.nano()", how) > 0
    finally:
        worker.close()
    assert worker.process.exitcode == 0
    assert "a test: none failed" in capfd.readouterr().err


def test_the_papers_protocol(benchmarks, tmp_path) -> None:
    """Calls without a pause after those that warm up, one figure for all; rounds are not preceded by others."""
    calls: list[str] = []
    how = partial(benchmarks.models.block_of, warm_up=2, calls=5, device=torch.device("cpu"))
    turns = {name: partial(how, partial(calls.append, name)) for name in "ab"}
    times = benchmarks.models.by_turns(turns, 3, warm_up=0)
    assert "".join(calls) == 3 * (7 * "a" + 7 * "b")
    assert [len(figures) for figures in times.values()] == [3, 3]
    cpu = torch.device("cpu")
    setting = benchmarks.contestants.Setting(cpu, 2, torch.float32, 1, tmp_path, channels_last=False)
    assert setting.images(3, 8).is_contiguous()
    for contestant in benchmarks.contestants.plain_contestants("nano", "torch", setting):
        assert contestant.call().shape == (2, 10)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "executorch", "litert"])
def test_runtimes_run_what_they_are_given(benchmarks, runtime: str, int8: bool, tmp_path) -> None:
    lacking = benchmarks.runtimes.missing(runtime)
    if int8 and runtime == "openvino" and importlib.util.find_spec("nncf") is None:
        lacking.append("nncf")
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten()).eval()
    batch = 1 if runtime in benchmarks.runtimes.FOR_ONE_IMAGE else 5
    setting = benchmarks.contestants.Setting(torch.device("cpu"), batch, torch.float32, 1, tmp_path, int8)

    def write(path, int8: bool) -> None:
        benchmarks.runtimes.export(model, torch.randn(2, 3, 9, 9), path, int8)

    made = list(benchmarks.contestants.files_of("small", "small", runtime, setting, {}, write))
    assert [contestant.facts.get("int8", False) for contestant in made] == [False, True][: 1 + int8]
    torch.manual_seed(1)
    path = tmp_path / f"small{benchmarks.runtimes.suffix(runtime, int8)}"
    result = benchmarks.runtimes.file_call(path, runtime, 1, batch, int8=int8)()
    torch.manual_seed(1)
    expected = model(torch.randn(batch, 3, 9, 9)).detach()
    found = torch.as_tensor(result if runtime == "litert" else result[0])
    # the quadratic mean: values beyond the range of the images that chose it count as its end
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 1e-3 < error < 0.3 if int8 else error < 1e-5


# The front


def result(title: str, top1: float, ms: float, family: str = "F", **more: object) -> dict[str, object]:
    facts = {"batch": 1, "dtype": "float32", "network": title, "title": title, "family": family, "model": title}
    return {**facts, "median ms": ms, "top1": top1, **more}


RESULTS = [
    result("slow", 76.0, 9.0),
    result("a", 75.0, 2.0, model="a, compiled"),
    result("a", 75.0, 3.0),
    result("b", 79.0, 6.0),
    result("c", 80.0, 10.0),
    result("ours", 70.0, 5.0, "MobileMamba", **{"top1, distilled": 78.0}),
    result("ours", 70.0, 1.0, "MobileMamba", plain=True),
    result("best", 81.0, 12.0, "MobileMamba"),
    result("failed", 99.0, 0.1, error="no"),
    result("wide", 75.0, 100.0, batch=32),
]


def test_front(benchmarks) -> None:
    cases = benchmarks.front.cases(RESULTS)
    assert list(cases) == [(1, "float32"), (32, "float32")]
    front = benchmarks.front.front_of(cases[1, "float32"])
    assert [(point.title, point.ms, point.contestant) for point in front] == [
        ("a", 2.0, "a, compiled"),
        ("b", 6.0, "b"),
        ("c", 10.0, "c"),
    ]
    times = [benchmarks.front.time_at(front, top1) for top1 in (74.9, 75.0, 78.0, 79.5, 80.0, 80.1)]
    assert times == [2.0, 2.0, 5.0, 8.0, 10.0, None]


def test_table_and_figure(benchmarks, tmp_path) -> None:
    lines = benchmarks.front.table(RESULTS).splitlines()
    assert lines[0] == "| preset (top-1) | batch 1, float32 | batch 32, float32 |"
    assert lines[2:4] == ["| ours (78.0) | 5.0 / 5.0 = 1.00 | - |", "| best (81.0) | 12.0 / none | - |"]
    assert lines[-2] == "- batch 1, float32: a, compiled (75.0) 2.0; b (79.0) 6.0; c (80.0) 10.0"
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    settings = {"threads": 2, "cpu": "AVX512", "torch": "2", "commit": "abc"}
    benchmarks.front.draw(RESULTS, settings, tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text()
    for label in ("ours: 1.00", "batch 32, float32", "2 threads, AVX512, torch 2, abc"):
        assert label in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runtimes", "onnxruntime", "--device", "cuda"], "--runtimes onnxruntime: expected --device cpu, got cuda"),
        (["--compile", "t2"], "--compile: expected networks of --model and --peers, got t2"),
    ],
)
def test_refusals(benchmarks, words, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["models.py", *words])
    monkeypatch.setattr(benchmarks.runtimes, "missing", lambda runtime: [])
    with pytest.raises(SystemExit, match="2"):
        benchmarks.models.arguments()
    assert message in capsys.readouterr().err
