"""What models.py times: our networks, their plain PyTorch renditions and the peers, under each runtime."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common  # noqa: F401  # finds reference.py
import mambas
import peers
import phones
import reference
import runtimes
import torch
import torch.nn.functional as F
from runtimes import Call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mobilemamba
from mobilemamba import CUDAGraphs, deploy, weights
from mobilemamba.deploy.standard import mixer

OURS = "MobileMamba"
OF_SCANS = ("Add", "Concat", "MatMul", "Multiply", "Subtract")  # operators of OpenVINO that 8 bits leave in float32


@dataclass
class Contestant:
    """What is called in turn, by the name in the table; ``facts`` go into the JSON."""

    name: str
    call: Call
    facts: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One case of the comparison, the same for all contestants."""

    device: torch.device
    batch: int
    dtype: torch.dtype
    threads: int
    files: Path  # a folder for ONNX files
    int8: bool = False  # forms in 8 bits too
    channels_last: bool = True  # images, and plain PyTorch's weights

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self) -> None:
        """Once in each process."""
        torch.set_num_threads(self.threads)
        torch.set_default_device(self.device)

    def images(self, channels: int, side: int) -> Tensor:
        return torch.randn(self.batch, channels, side, side).contiguous(memory_format=self.layout)

    def compile(self, model: nn.Module) -> nn.Module:
        torch._dynamo.config.recompile_limit = 64  # networks of one family share their code
        options = {"mode": "max-autotune"} if self.device.type == "cuda" else {"options": {"freezing": True}}
        return torch.compile(model, fullgraph=True, dynamic=False, **options)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        # without its cache of casts, which graphs cannot share
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Give BatchNorm the statistics of random images, so that no branch is zero and no number denormal."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # many start as zero
            nn.init.normal_(norm.bias, std=0.1)
            norm.momentum = 1.0
    model.train()(images)
    return model.eval()


def macs_of(model: nn.Module, x: Tensor, formulas: dict[Any, Any] | None = None) -> float:
    """Of one image, in millions; ``formulas`` replace those of the counter."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(x)
    return counter.get_total_flops() / 2e6 / x.size(0)


def forward(network: nn.Module | CUDAGraphs, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(x)


def make_model(name: str) -> tuple[nn.Module, int, int]:
    """A preset with random weights, its channels and the side of its images."""
    torch.manual_seed(0)
    side, channels = weights.entry(name).preprocessing.crop, mobilemamba.PRESETS[name].get("in_chans", 3)
    return calibrate(mobilemamba.create_model(name), torch.randn(4, channels, side, side)), channels, side


def our_facts(name: str, runtime: str) -> dict[str, Any]:
    entry = weights.entry(name)
    facts = {"network": name, "family": OURS, "runtime": runtime, "pixels": entry.preprocessing.crop}
    if entry.labels is None:  # ImageNet-1k's
        facts["top1"] = entry.top1
    if any(other.preset == name and other.variant == "distilled" for other in weights.ENTRIES):
        facts["top1, distilled"] = weights.entry(name, distilled=True).top1
    return facts


# The plain PyTorch rendition -----------------------------------------------------------------------------------------


def doubling(a: Tensor, b: Tensor, backward: bool) -> Tensor:
    """The scan of ``mobilemamba.deploy.portable``, ``(B, H, W, C)``, by another method."""
    return reference.doubling(a.flatten(1, 2), b.flatten(1, 2), backward).view_as(b)


#: Which is faster depends on the batch and on the compiler.
SCANS: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {"rows": mixer.recurrence, "doubling": doubling}


def plain_forward(scan: str, network: nn.Module | CUDAGraphs, x: Tensor) -> Tensor:
    """``network``, made by ``mobilemamba.deploy.portable``, with one of ``SCANS``."""
    with mock.patch.object(mixer, "recurrence", SCANS[scan]):
        return forward(network, x)


def plain_contestants(name: str, runtime: str, setting: Setting) -> Iterator[Contestant]:
    """The network in operators of torch, BatchNorm folded, channels last, with a scan without a loop over positions."""
    model, channels, side = make_model(name)
    x = setting.images(channels, side).to(setting.dtype)
    with torch.device("cpu"):  # where the portable form is made
        network = deploy.portable(model)
    network = network.to(x.device, setting.dtype, memory_format=setting.layout)
    facts = {**our_facts(name, runtime), "plain": True, "MMACs": macs_of(network, x)}
    for scan in SCANS:
        title = f"plain PyTorch {name}, scan by {scan}"
        if runtime == "compile":
            compiled = setting.compile(copy.deepcopy(network))
            yield Contestant(f"{title}, compiled", partial(plain_forward, scan, compiled, x), facts)
        else:
            yield Contestant(title, partial(plain_forward, scan, network, x), facts)


# Ours and the peers --------------------------------------------------------------------------------------------------


def our_contestants(name: str, runtime: str, setting: Setting, with_plain: bool) -> Iterator[Contestant]:
    """A preset fused, scripted and compiled, or from a file; ``with_plain`` in plain PyTorch and as it is trained."""
    title, facts = f"mobilemamba.{name}()", our_facts(name, runtime)
    if runtime in runtimes.ON_FILES:

        def write(path: Path, int8: bool) -> None:
            model, channels, side = make_model(name)
            format = runtime if runtime in runtimes.FOR_ONE_IMAGE else "onnx"
            images = torch.randn(4, channels, side, side) if int8 else None
            preprocessing = weights.entry(name).preprocessing
            deploy.export(model, path, format, preprocessing=preprocessing, calibration=images)

        yield from files_of(name, f"{title}, {runtimes.TITLES[runtime]}", runtime, setting, facts, write)
        return
    plain = list(plain_contestants(name, runtime, setting)) if with_plain else []
    model, channels, side = make_model(name)
    x = setting.images(channels, side).to(setting.dtype)
    fused = model.fuse().to(setting.dtype)
    facts["MMACs"] = macs_of(fused, x)
    make = partial(Contestant, facts=facts)
    if runtime == "compile":
        yield from plain
        yield make(f"{title}.fuse(), compiled", partial(forward, setting.compile(fused), x))
        return
    eager = [*plain, make(f"{title}.fuse()", partial(forward, fused, x))]
    if with_plain:
        eager.insert(-1, make(title, partial(forward, model.to(setting.dtype), x)))
    yield from eager
    if setting.device.type == "cpu":
        yield make(f"{title}.fuse(), scripted", partial(forward, torch.jit.script(fused), x))
        if setting.int8:
            model, _, _ = make_model(name)
            quantized = model.quantize([torch.randn(4, channels, side, side)]).to(setting.dtype)
            scripted = torch.jit.script(quantized)
            facts = {**facts, "int8": True}
            yield Contestant(f"{title}.quantize(), scripted", partial(forward, scripted, x), facts)
    elif setting.batch == 1:
        yield from map(graph_of, eager)


def peer_contestants(name: str, runtime: str, setting: Setting) -> Iterator[Contestant]:
    """A network of timm, or one of those that are made here."""
    peer = peers.PEERS[name]
    top1 = {"top1, distilled" if peer.distilled else "top1": peer.top1}
    network = name if name in peers.HERE else f"timm {name}"
    facts = {"network": network, "family": peer.family, "title": peer.title, "runtime": runtime}
    facts |= {"pixels": peer.pixels, **top1}
    title = peer.title if runtime == "torch" else f"{peer.title}, {runtimes.TITLES[runtime]}"

    def make() -> nn.Module:
        torch.manual_seed(0)
        return peers.fuse(calibrate(peers.build(name), torch.randn(4, 3, peer.pixels, peer.pixels)))

    if runtime in runtimes.ON_FILES:

        def write(path: Path, int8: bool) -> None:
            runtimes.export(make(), torch.randn(2, 3, peer.pixels, peer.pixels), path, int8)

        yield from files_of(name, title, runtime, setting, facts, write)
        return
    model = make().to(setting.dtype, memory_format=setting.layout)
    x = setting.images(3, peer.pixels).to(setting.dtype)
    facts["MMACs"] = macs_of(model, x, mambas.MACS if name in peers.HERE else None)
    made = Contestant(title, partial(forward, setting.compile(model) if runtime == "compile" else model, x), facts)
    yield made
    if runtime == "torch" and setting.device.type == "cuda" and setting.batch == 1:
        yield graph_of(made)


def files_of(
    name: str, title: str, runtime: str, setting: Setting, facts: dict[str, Any], write: Callable[[Path, bool], None]
) -> Iterator[Contestant]:
    """The file of a network in float32, and in 8 bits, from the folder or written by ``write(path, int8)``."""
    for int8 in (False, True) if setting.int8 else (False,):
        path = setting.files / f"{name}{runtimes.suffix(runtime, int8)}"
        if not path.exists():
            make = {"onnxruntime": phones.quantize_onnx, "litert": phones.quantize_litert}.get(runtime)
            if int8 and make is not None:
                make(setting.files / f"{name}{path.suffix}", path)
            else:
                write(path, int8)
        kept = OF_SCANS if name in mobilemamba.list_models() else ()
        call = runtimes.file_call(path, runtime, setting.threads, setting.batch, setting.dtype, int8, kept)
        # OpenVINO makes its 8 bits from the file in float32
        size = {} if int8 and runtime == "openvino" else {"MB": path.stat().st_size / 1e6}
        own = {**facts, **size, **({"int8": True} if int8 else {})}
        yield Contestant(f"{title} int8" if int8 else title, call, own)


def training_contestants(name: str, setting: Setting) -> Iterator[Contestant]:
    """Training steps."""
    model, channels, side = make_model(name)
    model = model.train()
    x, labels = setting.images(channels, side), torch.randint(model.num_classes, (setting.batch,))
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)

    def native() -> None:
        with setting.autocast():
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def plain() -> None:
        with reference.plain_pytorch(reference.doubling_scan):
            native()

    facts = {**our_facts(name, "torch"), "training": True}
    yield Contestant(f"plain PyTorch {name}, training", plain, {**facts, "plain": True})
    yield Contestant(f"mobilemamba.{name}(), training", native, facts)


def graph_of(contestant: Contestant) -> Contestant:
    """The same network replayed as a CUDA graph, with the copies of images and logits that this takes."""
    call = contestant.call
    assert isinstance(call, partial)
    *options, network, x = call.args
    graphs = CUDAGraphs(network)
    call.func(*options, graphs, x)  # captures, with the contestant's own options
    return Contestant(f"{contestant.name}, CUDA graph", partial(forward, graphs, x), contestant.facts)
