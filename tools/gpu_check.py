"""Runs every check that needs a GPU, in one command, without a network and within ten minutes.

    python tools/gpu_check.py                  # all stages
    python tools/gpu_check.py tests kernels    # only these
    python tools/gpu_check.py --rehearse       # without a GPU, up to the launches

When a stage ends, its result replaces its earlier one in benchmarks/results/DEVICE.json and in the table DEVICE.md.
Its whole output is in DEVICE-STAGE.log. A failure does not stop the stages that follow.
Exit status: 0 if no stage failed, 1 if one did, 2 without a GPU.

A rehearsal shows that no stage ends at a mistake in a program before a kernel runs. The programs run as they are, on a
GPU that tools/rehearsal pretends: their tensors have no data, and their figures mean nothing. Tests are collected only,
the sanitizer and ncu are left out, and the results go to a temporary folder.
"""

import argparse
import concurrent.futures
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = ROOT / "tools" / "rehearsal"
OUTCOMES = ("passed", "failed", "error", "skipped")  # of a test
Result = dict[str, Any]

PROBE = """
import json, torch
facts = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    facts |= {"gpu": device.name, "capability": f"{device.major}.{device.minor}", "memory": device.total_memory}
print(json.dumps(facts))
"""


@dataclass
class Stage:
    """What a stage has: a limit in seconds, a log, facts about the GPU, and whether that is pretended."""

    limit: float
    log: Path
    gpu: Mapping[str, Any]
    rehearsal: bool = False

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.limit
        self.log.write_text("")

    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def run(
        self, *command: object, limit: float | None = None, on_gpu: bool = True, **environment: str
    ) -> tuple[int | None, str]:
        """Exit status (None: stopped at the time limit) and output, which is also appended to the log."""
        limit = min(self.left(), limit or self.left())
        if self.rehearsal and on_gpu:
            environment |= rehearsed()
        with self.log.open("a+") as log:
            print("$", *command, file=log, flush=True)
            start = log.tell()
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and its children
                    process.wait()
            log.seek(start)
            return status, log.read()


def rehearsed() -> dict[str, str]:
    """Variables of a process that has a pretended GPU, as do those that it starts."""
    return {"PYTHONPATH": os.pathsep.join([str(REHEARSAL), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def ended(status: int | None) -> str:
    return "time limit reached" if status is None else f"exit status {status}"


def tail(output: str, lines: int = 25) -> list[str]:
    return output.splitlines()[-lines:]


# Stages --------------------------------------------------------------------------------------------------------------


def build(stage: Stage) -> Result:
    """Builds the library, for this GPU's arch only."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-v")
    settings = {"TORCH_CUDA_ARCH_LIST": stage.gpu["capability"], "FORCE_CUDA": "1", "MAX_JOBS": str(os.cpu_count())}
    status, output = stage.run(sys.executable, "-m", "pip", "install", *options, "-e", ".", on_gpu=False, **settings)
    if status != 0:
        return {"status": "failed", "summary": f"pip install: {ended(status)}", "output": tail(output)}
    warnings = re.findall(r"^.*(?:csrc/.*warning|ptxas.*warning|nvcc warning).*$", output, re.M)
    status, output = stage.run(sys.executable, "-m", "mobilemamba", "info", on_gpu=False)
    built = re.search(r"^.*CUDA.*sm_.*$", output, re.M)
    if status != 0 or built is None:
        return {"status": "failed", "summary": f"mobilemamba info: {ended(status)}", "output": tail(output)}
    summary = f"{built[0].strip()}; {len(warnings)} warnings"
    return {"status": "passed", "summary": summary, "warnings": warnings[:20]}


def tests(stage: Stage) -> Result:
    """Runs the tests that need a GPU, then the tests of operators and models on it."""
    missing = [name for name in ("pytest", "hypothesis", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        return {"status": "failed", "summary": f"not installed: {', '.join(missing)}; expected mobilemamba[test]"}
    names = ("operators", "packed_conv", "ffn", "mrffi", "patches", "parity", "model", "graphs")
    files = [f"tests/test_{name}.py" for name in names]
    cores = os.cpu_count() or 1
    parallel = ["-n", str(min(8, cores))] if importlib.util.find_spec("xdist") and cores > 1 else []
    groups = (["tests/test_cuda.py", "tests/test_cuda_models.py"], 0.4), (["--device", "cuda", *files], 1.0)
    if stage.rehearsal:
        return collect(stage, [arguments for arguments, _ in groups])
    total = dict.fromkeys(OUTCOMES, 0)
    failures: list[str] = []
    endings: list[str] = []
    output: list[str] = []
    for arguments, share in groups:
        options = ("-v", "--tb=short", "-p", "no:cacheprovider", *parallel)
        status, printed = stage.run(
            sys.executable, "-m", "pytest", *options, *arguments, limit=share * stage.left(), OMP_NUM_THREADS="2"
        )
        counts, failed, unfinished = read_pytest(printed)
        total = {outcome: total[outcome] + count for outcome, count in counts.items()}
        failures += failed
        if status != 0:
            output += tail(printed, 50)
        if status not in (0, 1):
            endings.append(f"{arguments[-1]}: {ended(status)}" + (f" in {unfinished}" if unfinished else ""))
    good = total["passed"] and not failures and not endings
    summary = ", ".join([*(f"{count} {outcome}" for outcome, count in total.items() if count), *endings])
    result = {"status": "passed" if good else "failed", "summary": summary, **total, "failures": failures}
    return result if good else {**result, "output": output}


def collect(stage: Stage, groups: list[list[str]]) -> Result:
    """Imports the files with the tests and counts these."""
    counts: list[str] = []
    for arguments in groups:
        options = ("--collect-only", "-q", "-p", "no:cacheprovider")
        status, printed = stage.run(sys.executable, "-m", "pytest", *options, *arguments)
        found = re.search(r"^(\d+)(?:/\d+)? tests? collected|^no tests collected", printed, re.M)
        if status not in (0, 5) or found is None:  # 5: all files are skipped, as without CUDA kernels
            return {"status": "failed", "summary": f"{arguments[-1]}: {ended(status)}", "output": tail(printed)}
        counts.append(f"{found[1] or 0} of {arguments[0] if arguments[0].startswith('tests') else 'all others'}")
    return {"status": "passed", "summary": f"collected: {', '.join(counts)}"}


def read_pytest(output: str) -> tuple[dict[str, int], list[str], str]:
    """From the output of ``pytest -v``: counts, names of failures, and the test that was running when pytest died."""
    outcomes = dict(re.findall(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.M))
    in_processes = re.findall(r"^\[gw\d+\] .*?\b(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+?::.+?) *$", output, re.M)
    outcomes |= {name: outcome for outcome, name in in_processes}
    counts = {what: sum(outcome == what.upper() for outcome in outcomes.values()) for what in OUTCOMES}
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    broken = re.findall(r"^ERROR (tests/[^:\s]+)(?: - .*)?$", output, re.M)  # files that pytest could not collect
    counts["error"] += len(broken)
    failed += broken
    started = [] if in_processes else re.findall(r"^(tests/\S+?::.+?) ?$", output, re.M)
    started += re.findall(r"crashed while running '(.+?)'", output)
    unfinished = [name for name in started if name not in outcomes]
    return counts, failed, unfinished[-1] if unfinished else ""


def sanitizer(stage: Stage) -> Result:
    """Runs small calls of every operator under compute-sanitizer; each tensor has an allocation of its own."""
    program = find_tool("compute-sanitizer")
    if program is None and not stage.rehearsal:
        return {"status": "absent", "summary": "no compute-sanitizer beside nvcc or on PATH"}
    calls = (sys.executable, ROOT / "tools" / "operator_calls.py")

    def run(tool: str) -> tuple[int | None, str]:
        log = stage.log.with_name(f"{stage.log.stem}-{tool}.log")
        own = ("--own",) if tool == "initcheck" else ()
        watched = () if stage.rehearsal else (program, "--tool", tool, "--error-exitcode", "9")
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        alone = Stage(stage.left(), log, stage.gpu, stage.rehearsal)
        return alone.run(*watched, *calls, *own, **environment)

    tools = ("memcheck", "initcheck") if stage.rehearsal else ("memcheck", "racecheck", "synccheck", "initcheck")
    with concurrent.futures.ThreadPoolExecutor(len(tools)) as pool:
        done = dict(zip(tools, pool.map(run, tools), strict=True))
    found: dict[str, str] = {}
    for tool, (status, output) in done.items():
        if "Device not supported" in output:
            return {"status": "absent", "summary": "compute-sanitizer: device not supported", "output": tail(output)}
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        found[tool] = summary[1] if summary else ended(status)
    summary = "; ".join(f"{tool}: {text}" for tool, text in found.items())
    result = {"status": "passed", "summary": summary, **found}
    failed = [line for status, output in done.values() if status != 0 for line in tail(output, 30)]
    return {**result, "status": "failed", "output": failed} if failed else result


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, beside nvcc or on PATH."""
    sys.path.insert(0, str(ROOT / "build_backend"))
    from mobilemamba_toolkit import find_nvcc

    nvcc = find_nvcc(os.environ)
    folders = [nvcc.parent, nvcc.resolve().parent, nvcc.resolve().parents[1] / name] if nvcc else []
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def kernels(stage: Stage) -> Result:
    """Times every operator at s6's sizes against a copy of its bytes and against plain PyTorch."""
    return benchmark(stage, "operators.py", "--batch", 256, 1, "--dtype", "bfloat16", "float32", "float16")


def models(stage: Stage) -> Result:
    """Times s6 against its plain PyTorch rendition, and a training step; batch 1 as CUDA graphs too."""
    options = ("--batch", 1, 256, "--train", 256, "--dtype", "bfloat16", "float32", "float16")
    alone = ("--no-peers", "--runtimes", "torch")  # compiling takes longer than the limit
    return benchmark(stage, "models.py", *options, "--rounds", 1 if stage.rehearsal else 9, *alone)


def layers(stage: Stage) -> Result:
    """Times the layers of a fused s6."""
    rounds = 1 if stage.rehearsal else 5
    return benchmark(stage, "models.py", "--profile", "--batch", 256, "--dtype", "bfloat16", "--rounds", rounds)


def passes(stage: Stage) -> Result:
    """Times each kernel of a fused s6, beside the prediction where there is one; with ncu, its counters too."""
    program = ROOT / "tools" / "kernel_times.py"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        status, output = stage.run(sys.executable, program, "--json", path)
        figures = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    if status != 0:
        return {"status": "failed", "summary": ended(status), "output": tail(output), **figures}
    result = {"status": "passed", "summary": f"{len(figures['rows'])} rows", **figures}
    ncu = find_tool("ncu")
    if ncu is None and not stage.rehearsal:
        return {**result, "summary": f"{result['summary']}; no ncu beside nvcc or on PATH"}
    sys.path.insert(0, str(ROOT / "tools"))
    from kernel_times import METRICS, read_ncu

    options = ("--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off")
    watched = () if stage.rehearsal else (ncu, *options, "--metrics", ",".join(METRICS))
    status, output = stage.run(*watched, sys.executable, program, "--batch", 256, "--once")
    counted = read_ncu(output)
    if status != 0 or not (counted or stage.rehearsal):  # ncu needs rights that a machine may not give
        return {**result, "summary": f"{result['summary']}; ncu: {ended(status)}", "ncu": tail(output)}
    columns = ["kernel", "launches", *METRICS.values()]
    return {**result, "summary": f"{result['summary']}; ncu: {len(counted)} kernels", "counters": [columns, *counted]}


def peers(stage: Stage) -> Result:
    """Times s6 against networks of timm, eager and as CUDA graphs, one of them compiled too."""
    if importlib.util.find_spec("timm") is None:
        return {"status": "absent", "summary": "timm is not installed"}
    rivals = ("--peers", "shvit_s3", "levit_192", "--compile", "shvit_s3", "--runtimes", "torch", "compile")
    rounds = 1 if stage.rehearsal else 9
    return benchmark(stage, "models.py", "--batch", 256, 1, "--dtype", "float16", "--rounds", rounds, *rivals)


def benchmark(stage: Stage, name: str, *options: object) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = (sys.executable, ROOT / "benchmarks" / name, "--device", "cuda", "--model", "s6", *options)
        status, output = stage.run(*command, "--json", measured, "--limit", max(1.0, stage.left() - 15))
        figures = json.loads(measured.read_text()) if measured.is_file() else {"rows": []}
    figures.pop("results", None)  # single measurements; the rows have their medians and spreads
    rows = len(figures["rows"])
    summary = f"{rows} rows, {figures.get('failed', 0)} failed, {figures.get('left_out', 0)} cases left out"
    if status == 0 and rows:
        return {"status": "passed", "summary": summary, **figures}
    return {"status": "failed", "summary": f"{summary}; {ended(status)}", "output": tail(output), **figures}


#: The stages in order, each with its share of the time. Later stages share the time that a stage does not use.
STAGES: dict[str, tuple[Callable[[Stage], Result], float]] = {
    "build": (build, 6.0),  # all other stages need it
    "tests": (tests, 3.0),
    "sanitizer": (sanitizer, 1.5),
    "kernels": (kernels, 1.5),
    "layers": (layers, 0.3),
    "passes": (passes, 0.7),
    "models": (models, 1.0),
    "peers": (peers, 2.0),  # compiling takes most of it
}

# Results -------------------------------------------------------------------------------------------------------------


def device_name(gpu: str) -> str:
    """A name for files: h200 for "NVIDIA H200", a100 for "NVIDIA A100-SXM4-80GB", geforce-rtx-4090."""
    words = re.findall(r"[a-z0-9]+", gpu.lower().replace("nvidia", ""))
    models = [word for word in words if re.fullmatch(r"[a-z]{1,2}\d+[a-z]*", word)]
    return models[0] if models else "-".join(words)


def merge(path: Path, gpu: str, stage: str, result: Result) -> None:
    """Replace a stage's result in the JSON file, and write the table beside it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # no file yet, or a damaged one
        content = {}
    before = content.get("stages", {}) if content.get("gpu") == gpu else {}
    stages = {name: {**before, stage: result}[name] for name in STAGES if name in before or name == stage}
    content = {"gpu": gpu, "stages": stages}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(content))


def markdown(content: Mapping[str, Any]) -> str:
    lines = [
        f"# {content['gpu']}",
        "",
        "Written by `python tools/gpu_check.py` from the JSON file beside it.",
        "",
    ]
    columns = ("stage", "result", "seconds", "summary", "commit", "date", "torch", "CUDA", "driver")
    stages = content["stages"]
    rows = [
        [name, *(str(result.get(key.lower() if key != "result" else "status", "")) for key in columns[1:])]
        for name, result in stages.items()
    ]
    lines += table(columns, rows)
    for name, result in stages.items():
        if result.get("rows"):
            notes = [f"{key} {result[key]}" for key in ("model", "pixels", "tf32") if key in result]
            lines += ["", f"## {name}", "", *([", ".join(notes), ""] if notes else [])]
            lines += table(result["columns"], result["rows"])
        if result.get("counters"):
            columns, *counted = result["counters"]
            lines += ["", f"## {name}: what ncu counted, batch 256", "", *table(columns, counted)]
        if result["status"] == "failed":
            failures = result.get("failures", [])
            shown = [f"- `{failure}`" for failure in failures[:50]]
            shown += [f"- and {len(failures) - 50} more"] if len(failures) > 50 else []
            lines += ["", f"## {name}: what failed", "", *([*shown, ""] if shown else [])]
            lines += ["```text", *result.get("output", [result["summary"]]), "```"]
    return "\n".join(lines) + "\n"


def table(columns: Any, rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def printed_by(*command: str, **environment: str) -> str:
    """What a command prints; nothing if it fails."""
    variables = {**os.environ, **environment}
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all, in order)")
    parser.add_argument("--limit", type=float, default=560, help="seconds for all stages together (default: 560)")
    parser.add_argument("--results", type=Path, help="folder to write to (default: benchmarks/results)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, up to the first launch")
    parser.add_argument("--commit", help="commit of the sources (default: git describe)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}, expected some of {', '.join(STAGES)}")
    end = time.monotonic() + args.limit
    environment = rehearsed() if args.rehearse else {}
    facts = json.loads(
        printed_by(sys.executable, "-c", PROBE, **environment) or '{"gpu": null, "torch": "that cannot be imported"}'
    )
    if facts["gpu"] is None:
        print(f"gpu_check: no CUDA GPU (torch {facts['torch']}); expected one, and a torch with CUDA", file=sys.stderr)
        return 2

    versions = {
        "commit": args.commit or printed_by("git", "describe", "--always", "--dirty") or "unknown",
        "torch": facts["torch"],
        "cuda": facts["cuda"],
        "driver": printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
    }
    default = Path(tempfile.mkdtemp(prefix="rehearsal-")) if args.rehearse else ROOT / "benchmarks" / "results"
    args.results = args.results or default
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results.resolve() / f"{device_name(facts['gpu'])}.json"
    chosen = [name for name in STAGES if name in args.stages or not args.stages]
    failed = False
    for i, name in enumerate(chosen):
        work, share = STAGES[name]
        limit = max(1.0, end - time.monotonic()) * share / sum(STAGES[other][1] for other in chosen[i:])
        start = time.monotonic()
        try:
            result = work(Stage(limit, path.with_name(f"{path.stem}-{name}.log"), facts, args.rehearse))
        except Exception as error:  # one stage must not lose the results of the others
            result = {"status": "failed", "summary": f"{type(error).__name__}: {error}"}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        head = {"status": result.pop("status"), "summary": result.pop("summary")}
        result = {**head, "seconds": round(time.monotonic() - start, 1), "date": date, **versions, **result}
        merge(path, facts["gpu"], name, result)
        print(f"{name}: {result['status']} in {result['seconds']} s: {result['summary']}", flush=True)
        failed |= result["status"] == "failed"
    print(f"{path}\n{path.with_suffix('.md')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
