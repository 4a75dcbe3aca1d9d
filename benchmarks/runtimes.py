"""Files as calls, under ONNX Runtime, OpenVINO, ExecuTorch and LiteRT; and processes of their own for contestants.

Each runtime has threads of its own, which spin for a while after a call. In one process they would take the cores from
the contestant whose turn is next. So each runtime has its process (``Worker``), and each turn starts after a pause.
"""

import importlib.util
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import phones
import torch
from torch import Tensor, nn

__all__ = ["ON_FILES", "TITLES", "Call", "Timed", "Worker", "export", "file_call", "missing", "suffix"]

Call = Callable[[], Any]

#: The runtimes, by the names of the command line.
TITLES = {
    "torch": "eager",
    "compile": "compiled",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
}
#: Those that run files, by the packages that they need.
ON_FILES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "executorch": ("executorch",),
    "litert": ("litert_torch",),
}
PACKAGES = {"litert": "ai-edge-litert"}  # of a runtime, where it has another name
FOR_ONE_IMAGE = ("executorch", "litert")
PAUSE = 0.02  # seconds before a turn; threads spin for some ms


def missing(runtime: str) -> list[str]:
    """The packages that ``runtime`` needs and that are not installed."""
    return [package for package in ON_FILES.get(runtime, ()) if importlib.util.find_spec(package) is None]


def suffix(runtime: str, int8: bool) -> str:
    """How the name of a network's file ends; OpenVINO is given the file in float32 for 8 bits."""
    ending = {"executorch": ".pte", "litert": ".tflite"}.get(runtime, ".onnx")
    return f"-int8{ending}" if int8 and runtime != "openvino" else ending


def export(model: nn.Module, images: Tensor, path: Path, int8: bool = False) -> None:
    """Write ``model``; ONNX for any batch. ``images``, ``(B, C, H, W)`` with B at least 2, is an example."""
    if path.suffix != ".onnx":
        return phones.export(model, images, path, int8)
    from mobilemamba.deploy.onnx_operators import TRANSLATIONS

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=18,
        custom_translation_table=TRANSLATIONS,
        input_names=["images"],
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def file_call(
    path: Path,
    runtime: str,
    threads: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    in_float32: Sequence[str] = (),
) -> Call:
    """The file with random images; ``int8`` and ``in_float32`` are for OpenVINO, others have files in 8 bits."""
    if runtime == "openvino":
        return openvino(path, threads, batch, dtype, int8, in_float32)
    if runtime == "onnxruntime":
        return onnxruntime(path, threads, batch)
    return {"executorch": phones.executorch, "litert": phones.litert}[runtime](path, threads)


def onnxruntime(path: str | Path, threads: int, batch: int = 1) -> Call:
    """The file with random images; open sizes other than the batch are 224."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0]
    sizes = [size if isinstance(size, int) else batch if i == 0 else 224 for i, size in enumerate(feed.shape)]
    images = torch.randn(*sizes, device="cpu").numpy()
    return lambda: session.run(None, {feed.name: images})


def openvino(
    path: str | Path,
    threads: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    in_float32: Sequence[str] = (),
) -> Call:
    """The same; images are float32, ``dtype`` is OpenVINO's hint for the arithmetic.

    With ``int8`` NNCF quantizes the network on random images, which matters for the accuracy but not for the time; but
    not the operators of OpenVINO that ``in_float32`` names.
    """
    import openvino

    core = openvino.Core()
    precision, name = {
        torch.float32: ("f32", "FP32"),
        torch.bfloat16: ("bf16", "BF16"),
        torch.float16: ("f16", "FP16"),
    }[dtype]
    if name not in (capabilities := core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
        raise RuntimeError(f"OpenVINO has no {name} arithmetic on this processor, only {', '.join(capabilities)}")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    model = core.read_model(path)
    shape = model.inputs[0].partial_shape
    sizes = [size.get_length() if size.is_static else batch if i == 0 else 224 for i, size in enumerate(shape)]
    model.reshape(sizes)
    images = torch.randn(*sizes, device="cpu").numpy()
    if int8:
        import nncf

        nncf.set_log_level("ERROR")
        ignored = nncf.IgnoredScope(types=list(in_float32), validate=False)
        model = nncf.quantize(model, nncf.Dataset([images]), subset_size=1, ignored_scope=ignored)
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([images])


# Processes -----------------------------------------------------------------------------------------------------------


class Timed(Protocol):
    """What a worker calls: a name, the call, and facts that are sent to the parent."""

    name: str
    call: Call
    facts: dict[str, Any]


Makers = Sequence[tuple[str, Callable[[], Iterator[Timed]]]]  # what is made, and how; both can be pickled
Measure = Callable[[Call], Any]


class Worker:
    """A process that makes contestants and measures them when it is told to."""

    def __init__(self, title: str, makers: Makers, setup: Call) -> None:
        self.title = title
        self.facts: dict[str, dict[str, Any]] = {}  # by the names of the contestants
        self.errors: dict[str, str] = {}  # by what was being made
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, makers, setup))
        self.process.start()
        child.close()
        for what, _ in makers:
            start = time.monotonic()
            facts, error = self._receive()
            self.facts |= facts
            if error:
                self.errors[what] = error
            print(
                f"{title}: {what} {'failed' if error else 'ready'}, {time.monotonic() - start:.0f} s", file=sys.stderr
            )

    def measure(self, name: str, how: Measure) -> Any:
        """``how(call)`` of the contestant ``name``, in the process; None where it failed, which ``errors`` has then."""
        self.connection.send((name, how))
        result, error = self._receive()
        if error:
            self.errors[name] = error
        return result

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.title}: the process ended with status {self.process.exitcode}") from None

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def serve(connection: Connection, makers: Makers, setup: Call) -> None:
    """What the process does until the parent closes the connection."""
    setup()
    calls: dict[str, Call] = {}
    for _, make in makers:
        facts: dict[str, dict[str, Any]] = {}
        error = None
        try:
            for contestant in make():
                contestant.call()  # compiles it
                calls[contestant.name], facts[contestant.name] = contestant.call, contestant.facts
        except Exception as raised:  # the others are worth their own figures
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
        connection.send((facts, error))
    while True:
        try:
            name, how = connection.recv()
        except EOFError:
            return
        try:
            connection.send((how(calls[name]), None))
        except RuntimeError as raised:
            connection.send((None, str(raised)))
