"""One forward pass of the fused s6 in bfloat16 on the CUDA sources built for the host, with what each launch counted.

``count`` runs it in a process of its own: this file as a program, python tools/counted_pass.py LIBRARY BATCH. See
tests/host_cuda/counters.cpp for what is counted, and tools/kernel_counters.py for the table.
"""

import bisect
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ELEMENT = 2  # bytes of bfloat16
SIZES = {  # bytes that torch's operators read and write, by the shapes of their arguments
    "copy_": lambda to, _: 2 * elements(to),
    "mean": lambda x, *_: elements(x) + elements(x[:2]),
    "sigmoid": lambda x: 2 * elements(x),
    "mul": lambda x, y: 2 * elements(x) + elements(y),
    "clamp_min": lambda x, *_: 2 * elements(x),
}
# Operators of torch that touch no elements, or only through those above.
VIEWS = re.compile(
    r"empty|view|narrow|select|slice|permute|as_strided|transpose|to$|flatten|movedim|contiguous|split|reshape|"
    r"unsqueeze|expand|clone|_to_copy|resolve_conj|t$"
)


def elements(shape: list[int]) -> int:
    return functools.reduce(int.__mul__, shape, ELEMENT)


@dataclass
class Launch:
    """One launch of a kernel: what its warps did, for all blocks."""

    kernel: str
    blocks: int
    threads: int
    bytes: int  # that it touches, each byte read once and each byte written once; of the blocks that ran
    barriers: float = 0  # times that a block waited at __syncthreads
    products: float = 0  # tensor-core instructions
    instructions: float = 0  # all; an estimate
    # Asked for, and the fewest that the bytes of each instruction need.
    load_sectors: float = 0
    fewest_load_sectors: float = 0
    store_sectors: float = 0
    fewest_store_sectors: float = 0
    wavefronts: float = 0
    fewest_wavefronts: float = 0
    worst: dict[int, float] = field(default_factory=dict)  # places in the library with most sectors and wavefronts

    @property
    def sectors(self) -> float:
        return self.load_sectors + self.store_sectors

    @property
    def fewest_sectors(self) -> float:
        return self.fewest_load_sectors + self.fewest_store_sectors


@dataclass
class Pass:
    launches: list[Launch]
    torch_operators: list[tuple[str, int]]  # name, and bytes that it reads and writes


class Code:
    """The machine code of the library: the names of kernels, and the instructions of a basic block."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.names: dict[int, str] = {}
        for line in run("nm", "-C", "--defined-only", str(library)).splitlines():
            address, _, name = line.split(" ", 2)
            plain = re.sub(r"mobilemamba::|cuda::|\(anonymous namespace\)::|^void ", "", name)
            self.names[int(address, 16)] = plain.split("(")[0]
        # A basic block begins where the compiler calls __sanitizer_cov_trace_pc, and ends where it calls it again or
        # the code jumps away.
        self._begins: list[int] = []
        self._lengths: list[int] = []
        length = 0
        open = False
        calls = re.compile(r"call\w* .*<(?:__tsan|__sanitizer_cov)")
        own_memory = re.compile(r"mov\w* .*\((?:%rsp|%rbp)")  # registers that the host does not have
        for line in run("objdump", "-d", "--no-show-raw-insn", str(library)).splitlines():
            address, _, instruction = line.partition(":\t")
            if not instruction:
                continue
            if "__sanitizer_cov_trace_pc" in instruction and instruction.startswith("call"):
                self._close(length, open)
                self._begins.append(int(address, 16) + 5)  # where the call returns
                length, open = 0, True
            elif calls.match(instruction):
                length -= 1  # the address that it is called with
            elif not own_memory.match(instruction):
                length += 1
                if re.match(r"jmp|ret", instruction):
                    self._close(length, open)
                    open = False
        self._close(length, open)

    def _close(self, length: int, open: bool) -> None:
        if open:
            self._lengths.append(max(length, 1))

    def length(self, place: int) -> int:
        """Instructions of the basic block."""
        at = bisect.bisect_left(self._begins, place)
        if at == len(self._begins) or self._begins[at] != place:
            raise ValueError(f"{self.library} has no basic block at {place:#x}")
        return self._lengths[at]

    def line(self, place: int) -> str:
        """The line of the source, and the lines that it is inlined into."""
        lines = run("addr2line", "-i", "-e", str(self.library), hex(place - 1)).split("\n")
        return " in ".join(line.split("/")[-1].split(" ")[0] for line in lines[:3] if line)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_launch(line: str, code: Code) -> Launch:
    record = json.loads(line)
    launch = Launch(
        code.names[record["kernel"]], record["blocks"], record["threads"], record["read"] + record["written"]
    )
    scale = launch.blocks / record["run"]
    launch.barriers = record["barriers"] * scale
    for place, kind, times, sectors, fewest_sectors, wavefronts, fewest_wavefronts in record["sites"]:
        if kind == "block":
            launch.instructions += code.length(place) * times * scale
        elif kind == "product":
            launch.products += times * scale
        elif kind == "store":
            launch.store_sectors += sectors * scale
            launch.fewest_store_sectors += fewest_sectors * scale
        else:
            launch.load_sectors += sectors * scale
            launch.fewest_load_sectors += fewest_sectors * scale
        launch.wavefronts += wavefronts * scale
        launch.fewest_wavefronts += fewest_wavefronts * scale
        if wasted := sectors - fewest_sectors + wavefronts - fewest_wavefronts:
            launch.worst[place] = wasted * scale
    return launch


def count(
    library: Path, batch: int, sample: int | None = None, code: Code | None = None, ffn: str = "products"
) -> Pass:
    """The launches of a pass. With ``sample``, at most so many blocks of each run, and stand for the others.

    ``ffn``: the form of the feed-forward layers, "products" or "kernel".
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counters"
        settings = {"HOST_CUDA_COUNTERS": str(file), "OMP_NUM_THREADS": "1", "MOBILEMAMBA_CUDA_FORM": ffn}
        if sample is not None:
            settings["HOST_CUDA_SAMPLE"] = str(sample)
        command = [sys.executable, str(Path(__file__).resolve()), str(library), str(batch)]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=os.sep)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        operators = [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]
        code = code or Code(library)
        return Pass([read_launch(line, code) for line in file.read_text().splitlines()], operators)


# In the process of its own ----------------------------------------------------------------------------------------


def torch_operators(events: Any) -> list[tuple[str, int]]:
    """The operators of torch that launch kernels, from a profile: those that no other of them called."""
    found = []
    for event in events:
        name = event.name.removeprefix("aten::")
        if name == event.name or VIEWS.match(name):
            continue
        callers, caller = [], event.cpu_parent
        while caller is not None:
            callers.append(caller.name.removeprefix("aten::"))
            caller = caller.cpu_parent
        if any(caller in SIZES or caller.startswith("empty") for caller in callers):  # empty: see main
            continue
        if name not in SIZES:
            raise SystemExit(f"the pass calls torch's {name}, and SIZES does not say what it reads and writes")
        found.append((name, SIZES[name](*(shape for shape in event.input_shapes if shape))))
    return found


def main(library: str, batch: int) -> None:
    import torch

    import mobilemamba

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: the CPU kernels are overridden
        torch.ops.load_library(library)
    # Memory that no kernel has written is NaN, so that a branch on a value is always the same.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    model = mobilemamba.s6().eval().fuse().to(torch.bfloat16)
    images = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        model(images)
    print(json.dumps(torch_operators(profile.events())))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
