"""The parts of tools/gpu_check.py that need no GPU: arguments, results, their table, and reading pytest's output."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools").is_dir():
    pytest.skip("not in a checkout: no tools/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402
import kernel_times  # noqa: E402


def test_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(["kernels", "modles"])
    assert caught.value.code == 2
    message = f"unknown stage 'modles', expected some of {', '.join(gpu_check.STAGES)}"
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_no_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--results", str(tmp_path / "results")]) == 2
    out, err = capfd.readouterr()
    assert err == f"gpu_check: no CUDA GPU (torch {torch.__version__}); expected one, and a torch with CUDA{os.linesep}"
    assert not out
    assert not (tmp_path / "results").exists()


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reports a GPU."""
    facts = {"torch": "2.11.0+cu130", "cuda": "13.0", "gpu": "NVIDIA H200", "capability": "9.0"}
    monkeypatch.setattr(gpu_check, "PROBE", f"print({json.dumps(json.dumps(facts))})")


def test_stages_run_in_order_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], h200: None
) -> None:
    limits = {}

    def stage(name: str, result: dict | Exception):
        def run(stage: gpu_check.Stage) -> dict:
            limits[name] = stage.limit
            assert stage.gpu["capability"] == "9.0"
            if isinstance(result, Exception):
                raise result
            return dict(result)

        return run, 1.0

    stages = {
        "build": stage("build", ValueError("no nvcc")),
        "tests": stage(
            "tests", {"status": "failed", "summary": "1 failed", "failures": ["tests/a.py::b"], "output": ["E  1"]}
        ),
        "kernels": stage(
            "kernels", {"status": "passed", "summary": "1 rows", "columns": ["a", "b"], "rows": [["x|y", "2"]]}
        ),
    }
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    arguments = ["--results", str(tmp_path), "--limit", "30", "--commit", "abc"]
    assert gpu_check.main(arguments) == 1
    assert list(limits) == list(stages)
    assert [round(limit) for limit in limits.values()] == [10, 15, 30]  # the next stages get the time that one leaves
    content = json.loads((tmp_path / "h200.json").read_text())
    assert content["gpu"] == "NVIDIA H200"
    assert list(content["stages"]) == list(stages)
    assert content["stages"]["build"]["summary"] == "ValueError: no nvcc"
    assert content["stages"]["kernels"].items() >= {"commit": "abc", "torch": "2.11.0+cu130", "cuda": "13.0"}.items()
    text = (tmp_path / "h200.md").read_text()
    assert "| a | b |\n| --- | --- |\n| x\\|y | 2 |\n" in text
    assert "- `tests/a.py::b`\n\n```text\nE  1\n```\n" in text
    assert "kernels: passed in 0.0 s: 1 rows" in capsys.readouterr().out

    stages["tests"] = stage("tests", {"status": "passed", "summary": "7 passed"})
    assert gpu_check.main([*arguments, "tests"]) == 0  # runs this stage again and keeps the others' results
    content = json.loads((tmp_path / "h200.json").read_text())
    assert [stage["status"] for stage in content["stages"].values()] == ["failed", "passed", "passed"]
    assert "tests/a.py::b" not in (tmp_path / "h200.md").read_text()


def test_results_of_another_gpu_or_a_broken_file_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    path.write_text('{"gpu": "NVIDIA H2')
    gpu_check.merge(path, "NVIDIA H200", "tests", {"status": "failed", "summary": "1 failed"})
    assert "## tests: what failed\n\n```text\n1 failed\n```\n" in path.with_suffix(".md").read_text()
    gpu_check.merge(path, "NVIDIA H200 NVL", "build", {"status": "passed"})
    assert json.loads(path.read_text()) == {"gpu": "NVIDIA H200 NVL", "stages": {"build": {"status": "passed"}}}


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA GB200", "gb200"),
    ],
)
def test_device_names(gpu: str, name: str) -> None:
    assert gpu_check.device_name(gpu) == name


def test_a_command_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    stage = gpu_check.Stage(30, tmp_path / "log", {})
    assert stage.run(sys.executable, "-c", "print('one')", SETTING="1") == (0, "one\n")
    start = time.monotonic()
    program = "import time; print('two', flush=True); time.sleep(60)"
    assert stage.run(sys.executable, "-c", program, limit=2) == (None, "two\n")
    assert time.monotonic() - start < 20
    assert "one\n" in stage.log.read_text()


SUITE = """
import os, pytest

@pytest.fixture
def broken():
    raise ValueError

@pytest.mark.parametrize("shape", [(1, 2), (3, 4)], ids=str)
def test_shape(shape): assert shape == (1, 2)
def test_broken(broken): pass
@pytest.mark.skip(reason="no")
def test_skipped(): pass
def test_crash(): os._exit(3)
def test_after(): pass
"""


def test_reading_the_output_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(SUITE)
    (tmp_path / "tests" / "test_unimportable.py").write_text("import no_such_module")

    def run(name: str) -> tuple[dict[str, int], list[str], str]:
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"tests/{name}"]
        return gpu_check.read_pytest(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout)

    counts, failed, unfinished = run("test_it.py")
    assert counts == {"passed": 1, "failed": 1, "error": 1, "skipped": 1}
    assert failed == ["tests/test_it.py::test_shape[(3, 4)]", "tests/test_it.py::test_broken"]
    assert unfinished == "tests/test_it.py::test_crash"
    counts, failed, unfinished = run("test_unimportable.py")
    assert (counts["error"], failed, unfinished) == (1, ["tests/test_unimportable.py"], "")


# The rehearsal


def rehearse(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "gpu_check.py"), "--rehearse", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_rehearsal(tmp_path: Path) -> None:
    done = rehearse("sanitizer", "passes", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [stage["status"] for stage in content["stages"].values()] == ["passed", "passed"]
    assert "| passes | passed |" in (tmp_path / "rehearsal.md").read_text()
    assert "done" in (tmp_path / "rehearsal-sanitizer-memcheck.log").read_text()


@pytest.mark.full
def test_rehearsal_of_all_programs(tmp_path: Path) -> None:
    stages = [name for name in gpu_check.STAGES if name not in ("build", "peers")]
    done = rehearse(*stages, "--results", str(tmp_path), "--limit", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "rehearsal.json").read_text())["stages"]
    assert list(content) == stages
    assert re.search(r"\d{3} of all others", content["tests"]["summary"])
    assert not any(result.get("left_out") for result in content.values())
    assert "mobilemamba.s6().fuse(), CUDA graph" in [row[2] for row in content["models"]["rows"]]


MISTAKES = {  # file, text, text with a mistake that runs on a GPU only, stage, what is printed
    "a function that torch does not have": (
        "benchmarks/operators.py",
        "torch.cuda._sleep(1_000_000)",
        "torch.cuda._slep(1_000_000)",
        "kernels",
        "_slep",
    ),
    "an argument that torch does not have": (
        "benchmarks/operators.py",
        "torch.cuda.Event(enable_timing=True)",
        "torch.cuda.Event(timing=True)",
        "kernels",
        "unexpected keyword argument 'timing'",
    ),
    "a tensor on the CPU among those on CUDA": (
        "tools/kernel_times.py",
        'torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)',
        "torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16)",
        "passes",
        "expected all tensors on one device",
    ),
    "an option that the program does not have": (
        "tools/gpu_check.py",
        '"--profile", "--batch", 256',
        '"--profile", "--batches", 256',
        "layers",
        "unrecognized arguments: --batches",
    ),
    "a name that does not exist": (
        "benchmarks/contestants.py",
        "graphs = CUDAGraphs(network)",
        "graphs = CUDAGraph(network)",
        "models",
        "name 'CUDAGraph' is not defined",
    ),
    "a test file that cannot be imported": ("tests/test_ffn.py", "import pytest", "import pitest", "tests", "pitest"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if i else []) for i, name in enumerate(MISTAKES)]
)
def test_a_rehearsal_finds(name: str, tmp_path: Path) -> None:
    file, old, new, stage, sign = MISTAKES[name]
    for folder in ("benchmarks", "build_backend", "tests", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    text = (tmp_path / file).read_text()
    assert old in text, f"{file} has changed: expected {old!r}"
    (tmp_path / file).write_text(text.replace(old, new))
    done = rehearse(stage, "--results", str(tmp_path / "results"), "--limit", "90", root=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sign in (tmp_path / "results" / f"rehearsal-{stage}.log").read_text()


def test_names_of_kernels() -> None:
    for name in (
        "void mobilemamba::cuda::(anonymous namespace)::scan_kernel<float, 1>(mobilemamba::ScanForward)",
        "scan_kernel(mobilemamba::ScanForward)",
        "`scan_kernel<__half>`",
    ):
        assert kernel_times.short_name(name) == "scan_kernel"


def test_predictions() -> None:
    text = """
# Counters
## batch 256
| kernel | launches | predicted, µs |
|---|---|---|
| `scan<1>` | 5 | 30.5 |
| `scan<2>` | 5 | 10 |
| gate | 5 | - |

| batch | kernel | predicted, us |
|---|---|---|
| 1 | gate | 2.5 |
| 256 | gate | 7 |
"""
    assert kernel_times.predicted(text, 256) == {"scan": 40.5, "gate": 7.0}
    assert kernel_times.predicted(text, 1) == {"gate": 2.5}


def test_reading_the_output_of_ncu() -> None:
    text = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum"
"","","ns","byte"
"0","void scan<float>(P)","1,500","64"
"1","void scan<float>(P)","500","0"
"2","gate(P)","7","8"
"""
    assert kernel_times.read_ncu(text) == [
        ["scan", "2", "2000", "0", "0", "0", "0", "0", "64"],
        ["gate", "1", "7", "0", "0", "0", "0", "0", "8"],
    ]
