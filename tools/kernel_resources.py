"""Registers, spills and shared memory of every CUDA kernel, from the compiler's report. Needs nvcc, but no GPU.

python tools/kernel_resources.py           writes the table, benchmarks/results/kernels.sm_90.md
python tools/kernel_resources.py --check   compares with the committed table
Both fail if a hot kernel spills more than SPILLS allows.

With --log it compiles nothing, and reads the log of a build for sm_90:
NVCC_APPEND_FLAGS=-Xptxas=-v TORCH_CUDA_ARCH_LIST=9.0 pip install -v . >LOG
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1].resolve() / "build_backend"))

import mobilemamba_toolkit as toolkit

ROOT = Path(__file__).parents[1].resolve()
SPILLS = {  # bytes of spill stores that a hot kernel may have, by a part of its name; all others have none
    "scan_forward_kernel<": 8,
    "plane_backward_weight_kernel<HaarOp": 16,  # with a kernel of 7
    "TileShape<2, 2, 4>, ImagePatches>": 4,
    # 112 sums and 32 of hidden activations leave 24 registers; two loads for a slice of about 200 instructions
    "ffn_forward_kernel<__half, 2, 7>": 24,
    "ffn_forward_kernel<__half, 4, 7>": 24,
    "ffn_forward_kernel<__nv_bfloat16, 2, 7>": 24,
    "ffn_forward_kernel<__nv_bfloat16, 4, 7>": 24,
    "depthwise_strip_kernel<__half, 3, 2, 2>": 24,  # for a multiple of 2 channels that is not one of 4
}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:, used (?P<barriers>\d+) barriers)?(?P<rest>[^\n]*)",
    re.S,
)


def compile(nvcc: Path, source: Path, arch: str) -> str:
    """The compiler's report on one source."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc), "-std=c++20", "-O3", "-I", str(ROOT / "csrc"), f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command += [str(source), "-o", str(Path(folder) / "kernels.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def reports_of(log: str) -> dict[str, str]:
    """The compiler's report on each source, from what ninja printed: a numbered command and its output for each."""
    steps = re.split(r"^ *\[\d+/\d+\] ", log, flags=re.M)
    return {match[1]: step for step in steps if (match := re.match(r".*csrc/cuda/(\w+\.cu) -o ", step))}


def kernels_in(report: str) -> list[dict[str, str]]:
    """What ptxas reports about the kernels of one source."""
    kernels = [match.groupdict() for match in ENTRY.finditer(report)]
    names = "\n".join(kernel["name"] for kernel in kernels)
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    for kernel, name in zip(kernels, demangled, strict=True):
        plain = re.sub(r"mobilemamba::|cuda::|\(anonymous namespace\)::|^void ", "", name)
        kernel["name"] = re.sub(r"\([^()]*\)$", "", plain)  # without the parameters
        kernel["shared"] = (re.search(r"(\d+) bytes smem", kernel["rest"]) or ["", "0"])[1]
    return sorted(kernels, key=lambda kernel: kernel["name"])


def is_hot(name: str) -> bool:
    """Whether models spend time in the kernel: all but float64 and scans with more than one state."""
    return "double" not in name and "false" not in name


def spills(kernel: dict[str, str]) -> bool:
    """Whether the kernel has more spills than are allowed."""
    return int(kernel["stores"]) > max((most for part, most in SPILLS.items() if part in kernel["name"]), default=0)


def table(kernels: dict[str, list[dict[str, str]]], version: str, arch: str) -> str:
    lines = [
        f"# Resources of the CUDA kernels on sm_{arch}",
        "",
        f"nvcc {version}, `python tools/kernel_resources.py`. Dynamic shared memory is chosen at launch, see",
        "csrc/cuda/launch.h. A scan's second parameter: whether the state size is 1. That of a plane: kernel size",
        "(0: any). Those of a depthwise convolution: kernel size, stride and channels of a thread, or the last alone.",
        "Those of a TileShape: warps down, warps across, and blocks of 16 rows of a warp. Those of ffn_forward and",
        "gate_product: warps across, and of the former blocks of 16 outputs of a warp.",
        "",
        "| source | kernel | registers | stack | spill stores | spill loads | static shared | barriers |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for source, found in kernels.items():
        for k in found:
            numbers = (k["registers"], k["stack"], k["stores"], k["loads"], k["shared"], k["barriers"] or "0")
            lines.append(f"| {source} | `{k['name']}` | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="compute capability without the dot (default 90)")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--log", type=Path, help="log of a build to read instead of compiling")
    arguments = parser.parse_args()
    nvcc = toolkit.find_nvcc(os.environ)
    if nvcc is None:
        raise SystemExit("no nvcc on PATH or in CUDA_HOME; the table is the compiler's report")
    version = toolkit.ask_nvcc(nvcc).version
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if arguments.log is not None:
        reports = reports_of(arguments.log.read_text())
        missing = [source.name for source in sources if not kernels_in(reports.get(source.name, ""))]
        if missing:
            raise SystemExit(f"{arguments.log} has no report of ptxas on {' '.join(missing)}")
    else:
        with ThreadPoolExecutor() as pool:
            texts = pool.map(lambda source: compile(nvcc, source, arguments.arch), sources)
        reports = {source.name: text for source, text in zip(sources, texts, strict=True)}
    kernels = {source.name: kernels_in(reports[source.name]) for source in sources}
    text = table(kernels, version, arguments.arch)
    path = ROOT / "benchmarks" / "results" / f"kernels.sm_{arguments.arch}.md"
    spilling = [k["name"] for found in kernels.values() for k in found if is_hot(k["name"]) and spills(k)]
    if not arguments.check:
        path.write_text(text)
        print(text, end="")
    elif f"nvcc {version}," not in path.read_text():
        print(f"{path.name} is of another nvcc than {version}: not compared")
    elif path.read_text() != text:
        print(f"{path.name} is not what the compiler says now; see `git diff` after running this without --check")
        return 1
    print(f"{sum(map(len, kernels.values()))} kernels, {len(spilling)} hot ones spill more than allowed", *spilling)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
