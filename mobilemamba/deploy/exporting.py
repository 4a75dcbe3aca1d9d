"""Writes a classifier or a segmenter for programs without Python: TorchScript, AOTInductor, ONNX. Checks the file."""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Preprocessing
from ..downstream import Segmenter
from ..models import MobileMamba
from ..models.folded import check_foldable
from ..weights.files import atomic_write, naming

__all__ = ["DTYPES", "FORMATS", "export"]

VERSION = 1  # of the text records in the file; a reader refuses a newer version
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("torchscript", "aoti", "onnx")


def export(
    model: MobileMamba | Segmenter,
    path: str | os.PathLike[str],
    format: str,
    *,
    preprocessing: Preprocessing,
    labels: Sequence[str] | None = None,
    dtype: str = "float32",
    fuse: bool = True,
) -> float:
    """Write ``model`` for inference on the device that it is on, for any batch size and image size.

    The file takes images ``(B, in_chans, H, W)`` and returns logits: ``(B, num_classes)`` of a classifier,
    ``(B, num_classes, H, W)`` of a segmenter, whose auxiliary head is left out. It also holds the facts that
    a program needs, as text records: ``mobilemamba.version``, ``.dtype``, ``.device``, ``.labels`` (one per line, empty
    without labels), and the fields of :class:`Preprocessing`. They are extra files in a TorchScript or ``.pt2``
    archive, and metadata in ONNX. That of a segmenter has ``mobilemamba.task`` too, which is ``segment``.

    Args:
        model: it is copied, and stays as it is.
        path: the file to write; for ``"aoti"`` its name ends with ``.pt2``.
        format: ``"torchscript"``; ``"aoti"``, a ``.pt2`` package that AOTInductor compiles for this machine's
            processor or GPU; ``"onnx"``, in standard operators (needs the extra ``onnx``; float32 only).
        preprocessing: how the model expects its images; a value of mean and std for each channel of the model.
        labels: names of the classes.
        dtype: type of parameters, images and logits: one of ``DTYPES``.
        fuse: False keeps BatchNorm as it is, so that the module can be trained (TorchScript only).

    Returns:
        The largest difference between the logits of the file and of the model, over the largest logit of the model.

    Raises:
        ValueError: the model is a detector, the options exclude each other or do not fit the model, ``fuse`` refuses
            the model, or the logits of the file differ too much from the model's: by more than 1e-4 in float32, 0.1 in
            a 16-bit type. No file is written then.
    """
    if format not in FORMATS or dtype not in DTYPES:
        raise ValueError(f"expected one of {', '.join(FORMATS)} in {', '.join(DTYPES)}, got {format} in {dtype}")
    if format == "aoti" and Path(path).suffix != ".pt2":
        raise ValueError(f"{path}: expected a name that ends with .pt2: torch requires it for AOTInductor packages")
    if format == "onnx" and dtype != "float32":
        raise ValueError(f"expected float32 for ONNX, got {dtype}; convert the float32 file with ONNX tools")
    if not fuse and format != "torchscript":
        raise ValueError(f"expected torchscript for a module that can be trained, got {format}")
    if not isinstance(model, (MobileMamba, Segmenter)):
        raise ValueError(
            f"model: expected a classifier or a segmenter, got {type(model).__name__}; "
            "a detector is written by torch.jit.script(model.fuse()).save(path)"
        )
    network = model.network() if isinstance(model, Segmenter) else model
    preprocessing.check_channels(network.in_chans)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("expected a model with values, got one on the device meta")
    if labels and len(labels) != model.num_classes:
        raise ValueError(f"expected {model.num_classes} labels, got {len(labels)}")
    device = next(model.parameters()).device
    records = {
        f"mobilemamba.{name}": " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in {
            "version": VERSION,
            "dtype": dtype,
            "device": device.type,
            **preprocessing.to_dict(),
        }.items()
    }
    if any("\n" in label for label in labels or ()):
        raise ValueError("expected labels of one line each, got a label with a line break")
    records["mobilemamba.labels"] = "\n".join(labels or ())
    if isinstance(model, Segmenter):
        records["mobilemamba.task"] = "segment"

    # ONNX takes the unfused layers: the operators of fused ones have no translation. Its exporter folds BatchNorm.
    fuse = fuse and format != "onnx"
    if fuse:
        check_foldable(model)  # before the copy, which fails with torch's words on a pruned model
    copied = copy.deepcopy(model).eval()
    eager, written = (
        PixelLogits(form) if isinstance(form, Segmenter) else form
        for form in (copied, copied.fuse() if fuse else copied)
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("mobilemamba.pt2" if format == "aoti" else "mobilemamba")  # the archive stores the name
        with naming(folder):
            run = {"torchscript": _torchscript, "aoti": _aoti, "onnx": _onnx}[format](
                copy.deepcopy(written).to(getattr(torch, dtype)), network, file, records
            )
        difference = _difference(eager, run, network.in_chans, preprocessing.crop, getattr(torch, dtype))
        if not difference <= (1e-4 if dtype == "float32" else 0.1):
            raise ValueError(
                f"the logits of the {format} file differ from the model's by {difference:.1e} of the largest"
            )
        atomic_write(path, lambda temporary: shutil.copyfile(file, temporary))
    return difference


@torch.no_grad()
def _difference(
    eager: nn.Module, run: Callable[[Tensor], Tensor], channels: int, pixels: int, dtype: torch.dtype
) -> float:
    """The largest difference of logits over the largest logit, for two sizes that were not the example's."""
    worst = 0.0
    for batch, height, width in ((1, pixels, pixels), (3, pixels + 1, pixels // 2 + 1)):
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, channels, height, width, generator=generator)
        images = images.to(next(eager.parameters()).device)
        expected, actual = eager(images), run(images.to(dtype)).to(images)
        worst = max(worst, float((actual - expected).abs().max() / expected.abs().max()))
    return worst


class PixelLogits(nn.Module):
    """The logits of a segmenter as a tensor: images ``(B, C, H, W)`` -> ``(B, num_classes, H, W)``."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter.without_aux()

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter(images)["out"]


class NeedsLibrary(nn.Module):
    """Is never run. TorchScript loads it first, so that its error without the operators shows the printed text."""

    def forward(self, images: Tensor, weight: Tensor) -> Tensor:
        print("this file needs libmobilemamba: link MobileMamba::mobilemamba (C++), or import mobilemamba (Python)")
        return torch.ops.mobilemamba.haar_conv2d(images, weight)


class Exported(nn.Module):
    """The network, with :class:`NeedsLibrary` before it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.needs = NeedsLibrary()
        self.network = network

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.network(images)


def _torchscript(
    model: nn.Module, network: MobileMamba, path: Path, records: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    with path.open("wb") as file:  # given a path, torch ends the process where the disk is full
        torch.jit.save(torch.jit.script(Exported(model)), file, _extra_files=records)
    return torch.jit.load(str(path), map_location=next(model.parameters()).device)


def _aoti(model: nn.Module, network: MobileMamba, path: Path, records: dict[str, str]) -> Callable[[Tensor], Tensor]:
    from torch.export.pt2_archive._package import package_pt2

    images, shapes = _example(model, network)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        options = {"aot_inductor.package": True}
        files = torch._inductor.aot_compile(program.module(), (images,), options=options)
    assert isinstance(files, list)
    with path.open("wb") as file:  # as above
        package_pt2(file, aoti_files=files, extra_files=records)
    return torch._inductor.aoti_load_package(str(path))


def _onnx(model: nn.Module, network: MobileMamba, path: Path, records: dict[str, str]) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime

        from .onnx_operators import TRANSLATIONS
    except ImportError as error:
        raise ValueError(f"ONNX files need the extra onnx: pip install 'mobilemamba[onnx]' ({error})") from error

    images, shapes = _example(model, network)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=18,
        custom_translation_table=TRANSLATIONS,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(records)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy(force=True)})[0])


def _example(model: nn.Module, network: MobileMamba) -> tuple[Tensor, tuple[dict[int, torch.export.Dim]]]:
    """Example images for tracing, and their dynamic dimensions."""
    # torch.export specialises sizes of 1, so the last map must have at least 2 rows and columns here. The files compute
    # smaller images correctly too: tests/cpp checks it.
    smallest = network.feature_info[-1]["reduction"] + 1
    parameter = next(model.parameters())
    images = torch.randn(
        2, network.in_chans, 2 * smallest, 3 * smallest, dtype=parameter.dtype, device=parameter.device
    )
    varying = {0: torch.export.Dim("batch")}
    varying.update({i: torch.export.Dim(name, min=smallest) for i, name in ((2, "height"), (3, "width"))})
    return images, (varying,)
