"""Times the operators at a model's sizes against their unfused forms in plain PyTorch and against a copy of their
bytes, alternating.

    python benchmarks/operators.py --batch 1 32
    python benchmarks/operators.py --device cuda --batch 256 1 --dtype float32 bfloat16 float16

The bytes are those of every input and output tensor, counted once; the copy reads and writes as many together. GFLOP/s
are by the formulas of torch's flop counter (mobilemamba/ops/flops.py). On CUDA
the launches are replayed inside a CUDA graph, on as many sets of tensors as the L2 cache cannot hold (64 at most, which
it does hold at batch 1). 16-bit operators take float32 parameters, as under autocast. Backward is the backward pass by
itself; its plain form is autograd's.
"""

import argparse
import copy
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
import reference
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mobilemamba
from mobilemamba import ops, weights
from mobilemamba.models.folded import fold_batchnorm

Thunk = Callable[[], Any]
NATIVE = torch.ops.mobilemamba
MAX_SETS, LAUNCHES = 64, 16


@dataclass(frozen=True)
class Case:
    """An operator at one place of the model. ``draw(batch, dtype)`` gives its arguments."""

    name: str
    size: str
    draw: Callable[[int, torch.dtype], list[Tensor]]
    forward: Callable[..., Tensor]
    backward: Callable[..., Any] | None  # of the gradient and the arguments; None where training does not use it
    plain: Callable[..., Tensor]
    for_plain: Callable[[list[Tensor]], list[Tensor]] = list  # from these arguments to those of the plain form


def scan_case(size: str, inner: int, length: int, rank: int, state: int) -> Case:
    """Layouts are the model's: channels last, and the rows of delta, B and C in one tensor."""

    def draw(batch: int, dtype: torch.dtype) -> list[Tensor]:
        rows = torch.randn(batch, length, 2 * (rank + 2 * state)).to(dtype).transpose(1, 2).unflatten(1, (2, -1))
        delta, B, C = rows.split([rank, state, state], dim=2)
        u = torch.randn(batch, length, inner).to(dtype).transpose(1, 2)
        A_log, dt_weight = torch.randn(2, inner, state), torch.randn(2, inner, rank) / rank**0.5
        return [u, delta, A_log, B, C, torch.randn(2, inner), dt_weight, torch.randn(2, inner)]

    size = f"{inner} x {size}"
    backward = NATIVE.bidirectional_scan_backward
    return Case("bidirectional_scan", size, draw, ops.bidirectional_scan, backward, reference.doubling_scan)


def image(batch: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, side, side, channels).to(dtype).permute(0, 3, 1, 2)


def haar_case(size: str, channels: int, side: int, kernel: int) -> Case:
    def draw(batch: int, dtype: torch.dtype) -> list[Tensor]:
        return [image(batch, channels, side, dtype), torch.randn(4 * channels, 1, kernel, kernel)]

    def backward(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        return [
            NATIVE.haar_conv2d(grad, weight.flip((2, 3))),
            NATIVE.haar_conv2d_backward_weight(grad, x, kernel),
        ]

    name = f"haar_conv2d, k {kernel}"
    return Case(name, f"{channels} x {size}", draw, ops.haar_conv2d, backward, reference.haar_conv2d)


def depthwise_case(size: str, channels: int, side: int, kernel: int, stride: int, activation: str) -> Case:
    def draw(batch: int, dtype: torch.dtype) -> list[Tensor]:
        return [image(batch, channels, side, dtype), torch.randn(channels, 1, kernel, kernel), torch.randn(channels)]

    def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return NATIVE.depthwise_conv2d_backward(grad, x, weight, bias, stride, activation)

    name = f"depthwise_conv2d, k {kernel}, stride {stride}, {activation}"
    options = {"stride": stride, "activation": activation}
    forward, plain = (partial(module.depthwise_conv2d, **options) for module in (ops, reference))
    return Case(name, f"{channels} x {size}", draw, forward, backward, plain)


def packed_case(size: str, inputs: int, outputs: int, side: int, kernel: int, stride: int, activation: str) -> Case:
    """As a fused model has it on the CPU: weights are of the images' type."""

    def draw_weight() -> Tensor:
        return torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5

    def draw(batch: int, dtype: torch.dtype) -> list[Tensor]:
        weight = ops.pack_conv2d_weight(draw_weight().to(dtype))
        return [image(batch, inputs, side, dtype), weight, torch.randn(outputs)]

    def for_plain(arguments: list[Tensor]) -> list[Tensor]:
        x, _packed, bias = arguments
        weight = draw_weight()
        return [x, weight.flatten(1) if kernel == 1 else weight.contiguous(memory_format=torch.channels_last), bias]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if kernel == 1:
            y = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, weight, bias, stride, kernel // 2)
        return y.relu() if activation == "relu" else y

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.packed_conv2d(x, weight, bias, None, kernel, stride, activation)

    name = f"packed_conv2d, k {kernel}, stride {stride}, {activation}"
    return Case(name, f"{inputs} to {outputs} x {size}", draw, forward, None, plain, for_plain)


def ffn_case(size: str, width: int, side: int, form: str = "") -> Case:
    """As a fused model has it at the end of a block: matrices are packed and of the images' type.

    On CUDA ``form`` makes it the one kernel ("kernel") or two products ("products"), whatever the library would choose.
    """

    def forward(*arguments: Tensor) -> Tensor:
        with mock.patch.dict(os.environ, {"MOBILEMAMBA_CUDA_FORM": form}):
            return ops.ffn(*arguments)

    def draw_weights() -> list[Tensor]:
        shapes = (2 * width, width), (width, 2 * width)
        return [torch.randn(out, inputs) / inputs**0.5 for out, inputs in shapes]

    def draw(batch: int, dtype: torch.dtype) -> list[Tensor]:
        expand, project = (ops.pack_conv2d_weight(w[:, :, None, None].to(dtype)) for w in draw_weights())
        images = [image(batch, width, side, dtype) for _ in range(2)]
        return [*images, expand, torch.randn(2 * width), project, torch.randn(width)]

    def for_plain(arguments: list[Tensor]) -> list[Tensor]:
        x, residual, _expand, expand_bias, _project, project_bias = arguments
        expand, project = draw_weights()
        return [x, residual, expand, expand_bias, project, project_bias]

    def plain(x: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
        hidden = F.linear(x.permute(0, 2, 3, 1), *weights[:2]).relu_()
        return F.linear(hidden, *weights[2:]).permute(0, 3, 1, 2).add_(x).add_(residual)

    name = {"": "ffn", "kernel": "ffn, one kernel", "products": "ffn, two products"}[form]
    return Case(name, f"{width} x {size}", draw, forward if form else ops.ffn, None, plain, for_plain)


def mrffi_case(size: str, mixer: mobilemamba.MRFFI, width: int, side: int) -> Case:
    """As a fused model has it, on the CPU with packed matrices of the images' type; its plain form is not folded."""
    mixer = mixer.to_empty(device=torch.get_default_device()).eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for module in mixer.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()

    def draw(batch: int, dtype: torch.dtype) -> list[Tensor]:
        folded = fold_batchnorm(copy.deepcopy(mixer)).to(dtype)
        if folded.in_weight.device.type == "cpu":
            folded.pack()
        folded.requires_grad_(False)
        captured: list[Tensor] = []
        images = [image(batch, width, side, dtype) for _ in range(2)]
        with mock.patch(
            "mobilemamba.models.mrffi.mrffi", lambda x, residual, weights, eps: captured.extend(weights) or x
        ):
            folded(*images)
        return [*images, *captured]

    def plain(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        with reference.plain_pytorch(reference.doubling_scan):
            return mixer(x.float()) + residual  # 16 bits are autocast's

    def forward(x: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
        return ops.mrffi(x, residual, list(weights))

    return Case("mrffi", f"{width} x {size}", draw, forward, None, plain)


def cases(model_name: str, device: torch.device) -> Iterator[Case]:
    """One of each kind for every stage of the model, at the image size of its weights."""
    with torch.device("meta"):
        model = mobilemamba.create_model(model_name)
    sides = [math.ceil(weights.entry(model_name).preprocessing.crop / f["reduction"]) for f in model.feature_info]
    widths = [f["num_chs"] for f in model.feature_info]
    if device.type == "cpu":  # elsewhere fused models call torch's convolutions and matrix products
        side = weights.entry(model_name).preprocessing.crop
        for conv in (layer.conv for layer in model.patch_embed if hasattr(layer, "conv")):
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            yield packed_case(f"{side} x {side}", conv.in_channels, conv.out_channels, side, kernel, stride, "relu")
            side = math.ceil(side / stride)
    for i, (stage, side, width) in enumerate(zip(model.stages, sides, widths, strict=True)):
        size, mixer = f"{side} x {side}", stage.blocks[0].mixer
        channels, local, _ = mixer.split
        ss2d = mixer.global_part.ss2d
        yield scan_case(size, ss2d.inner, side * side, ss2d.rank, ss2d.d_state)
        yield haar_case(size, channels, side, mixer.global_part.wavelet.weight.shape[-1])
        if local:
            kernel = mixer.local_part.groups[0][0].conv.kernel_size[0]
            yield depthwise_case(size, local, side, kernel, 1, "relu")
        yield depthwise_case(size, ss2d.inner, side, 3, 1, "silu")
        yield depthwise_case(size, width, side, 3, 1, "none")
        yield mrffi_case(size, mixer, width, side)
        for form in ("",) if device.type == "cpu" else ("kernel", "products"):
            yield ffn_case(size, width, side, form)
        if i:
            before, hidden = sides[i - 1], 4 * widths[i - 1]
            if device.type == "cpu":
                yield packed_case(f"{before} x {before}", widths[i - 1], hidden, before, 1, 1, "relu")
                yield packed_case(size, hidden, width, side, 1, 1, "none")
            yield depthwise_case(f"{before} x {before}", hidden, before, 3, 2, "relu")


# Measuring -----------------------------------------------------------------------------------------------------------


def on_cpu(thunks: list[Thunk]) -> Callable[[], float]:
    """Seconds per thunk, each time it is called."""
    thunks[0]()

    def measure() -> float:
        start = time.perf_counter()
        for thunk in thunks:
            thunk()
        return (time.perf_counter() - start) / len(thunks)

    return measure


def on_cuda(thunks: list[Thunk]) -> Callable[[], float]:
    """The same of a CUDA graph, between events; the device is kept busy meanwhile, so that no launch is waited for."""
    for _ in range(2):
        thunks[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for thunk in thunks:
            thunk()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        torch.cuda._sleep(1_000_000)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(thunks)

    return measure


def tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def nbytes(*groups: Any) -> int:
    return sum(x.numel() * x.element_size() for group in groups for x in tensors(group))


def plain_backward(plain: Callable[..., Tensor], grad: Tensor, *arguments: Tensor) -> Thunk:
    leaves = [x.detach().requires_grad_() for x in arguments]
    y = plain(*leaves)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def measure(case: Case, backward: bool, batch: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict:
    """Seconds per call of the operator, a copy and plain PyTorch by turns, as lists; bytes and flops."""

    def draw() -> list[Tensor]:
        arguments = case.draw(batch, dtype)
        return [torch.randn_like(case.forward(*arguments)), *arguments] if backward else arguments

    native = case.backward if backward else case.forward
    first = draw()
    with FlopCounterMode(display=False) as counter:
        moved = nbytes(first, native(*first))
    if device.type == "cuda":
        sets = min(MAX_SETS, max(1, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / moved)))
        launches, timer = max(LAUNCHES, sets), on_cuda
    else:
        sets, launches, timer = 4, 4, on_cpu
    inputs = [first, *(draw() for _ in range(sets - 1))]
    copies = [(torch.randn(moved // 8), torch.empty(moved // 8)) for _ in inputs]  # half is read, half written

    def plain(arguments: list[Tensor]) -> Thunk:
        exact = [x.to(dtype) for x in (arguments if backward else case.for_plain(arguments))]
        if backward:
            return plain_backward(case.plain, *exact)
        return lambda: case.plain(*exact)

    def cycled(thunks: list[Thunk]) -> list[Thunk]:
        return list(itertools.islice(itertools.cycle(thunks), launches))

    timers = {
        "copy": timer(cycled([partial(to.copy_, source) for source, to in copies])),
        "native": timer(cycled([partial(native, *arguments) for arguments in inputs])),
        "plain": timer([plain(arguments) for arguments in inputs[:2]]),
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds):
        for name, timed in timers.items():
            if name != "plain" or i < 5:  # which takes long
                times[name].append(timed())
    return {"bytes": moved, "flops": counter.get_total_flops(), "sets": sets, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s6", choices=mobilemamba.list_models())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default="", help="part of the operator's name")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, help="seconds after which the remaining cases are left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    columns = ["operator", "pass", "channels x size", "batch", "dtype"]
    columns += ["µs, median", "min to max", "GB/s", "of a copy", "GFLOP/s", "plain PyTorch, µs", "against plain"]
    settings = {"model": args.model, **common.setting(args.device)}
    report = common.Report(settings, columns, args.json, args.limit)
    stream = torch.cuda.stream(torch.cuda.Stream()) if args.device.type == "cuda" else nullcontext()
    chosen = [case for case in cases(args.model, args.device) if args.only in case.name]
    if not chosen:
        parser.error(f"--only: no operator has {args.only!r} in its name")
    with stream:
        for batch, dtype, case, backward in itertools.product(args.batch, args.dtype, chosen, (False, True)):
            if backward and case.backward is None:
                continue
            if report.time_is_up():
                continue
            what = [case.name, "backward" if backward else "forward", case.size, str(batch), dtype]
            named = dict(zip(columns, what, strict=False))
            try:
                result = measure(case, backward, batch, getattr(torch, dtype), args.device, args.rounds)
            except RuntimeError as error:  # the other cases are worth their own figures
                report.fail([*what, *"-" * (len(columns) - len(what))], named, error)
                continue
            native, copy, plain = (
                statistics.median(result["seconds"][name]) * 1e6 for name in ("native", "copy", "plain")
            )
            spread = " to ".join(f"{f(result['seconds']['native']) * 1e6:.1f}" for f in (min, max))
            figures = [f"{native:.1f}", spread, f"{result['bytes'] / native / 1e3:.0f}", f"{copy / native:.2f}"]
            figures.append(f"{result['flops'] / native / 1e3:.0f}")
            row = [*what, *figures, f"{plain:.0f}", f"{plain / native:.1f}x"]
            report.add(row, {**named, **result})
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
