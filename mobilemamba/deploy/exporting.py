"""Writes a model for programs without Python, in one of the formats. Runs the file and compares it with the model."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Preprocessing
from ..downstream import Segmenter
from ..models import MobileMamba, checks
from ..models.folded import check_foldable
from ..models.global_part import WaveletMixer
from ..weights.files import atomic_write, naming
from . import coreml_files, executorch_files, litert_files, onnx_files
from .reading import VERSION
from .standard import FeatureMaps, Logits, SegmenterLogits, portable

__all__ = ["DTYPES", "FORMATS", "export"]

Run = Callable[[Tensor], tuple[Tensor, ...]]

DTYPES = ("float32", "bfloat16", "float16")
#: The formats, and the types that each can have; the first is its default.
FORMATS = {
    "torchscript": DTYPES,
    "aoti": DTYPES,
    "onnx": ("float32", "float16"),
    "executorch": ("float32",),
    "coreml": ("float16", "float32"),
    "litert": ("float32", "float16"),
}
STANDARD = ("onnx", "executorch", "coreml", "litert")  # in standard operators, for one image size
#: That the format's readers require.
SUFFIXES = {"aoti": ".pt2", "executorch": ".pte", "coreml": ".mlpackage", "litert": ".tflite"}
WITH_JSON = ("executorch", "litert")  # the records are in a file beside it


def export(
    model: MobileMamba | Segmenter,
    path: str | os.PathLike[str],
    format: str,
    *,
    preprocessing: Preprocessing,
    labels: Sequence[str] | None = None,
    dtype: str | None = None,
    fuse: bool = True,
    size: int | tuple[int, int] | None = None,
    dynamic: bool = False,
    features: Sequence[int] = (),
    calibration: Tensor | None = None,
) -> float:
    """Write ``model`` for inference on the device that it is on.

    The file takes images ``(B, in_chans, H, W)`` and returns logits: ``(B, num_classes)`` of a classifier,
    ``(B, num_classes, H, W)`` of a segmenter, whose auxiliary head is left out. It also holds the facts that
    a program needs, as text records: ``mobilemamba.version``, ``.dtype``, ``.device``, ``.labels`` (one per line, empty
    without labels), and the fields of :class:`Preprocessing`. They are extra files in a TorchScript or ``.pt2``
    archive, and metadata in ONNX and Core ML; for ExecuTorch and LiteRT they are in a JSON file beside it,
    ``PATH.json``. That of a segmenter has ``mobilemamba.task`` too, which is ``segment``; that of a file for one image
    size ``.size``, its height and width.

    Args:
        model: it is copied, and stays as it is.
        path: the file to write. Its name ends with ``.pt2`` for ``"aoti"``, ``.pte`` for ``"executorch"``, ``.tflite``
            for ``"litert"`` and ``.mlpackage`` for ``"coreml"``, which is a folder.
        format: one of ``FORMATS``. With LibTorch and this package's library: ``"torchscript"``; ``"aoti"``, a ``.pt2``
            package that AOTInductor compiles for this machine's processor or GPU. In standard operators, each with
            the extra of its name: ``"onnx"``; and for one image ``"executorch"``, lowered to XNNPACK; ``"litert"``;
            ``"coreml"``, which Apple's systems run: it is not run here.
        preprocessing: how the model expects its images; a value of mean and std for each channel of the model.
        labels: names of the classes.
        dtype: type of parameters, images and logits: one of ``FORMATS[format]``, the first one by default. Images and
            logits of Core ML and LiteRT are float32.
        fuse: False keeps BatchNorm as it is, so that the module can be trained (TorchScript only).
        size: height and width of the images in pixels, for formats in standard operators; by default the crop of the
            preprocessing. The others take any size.
        dynamic: an ONNX file for any image size, with a loop for the scan. It is slower, and not all readers take it.
        features: numbers of stages, from 0: the outputs are their feature maps, ``(B, C, h, w)``, instead of logits.
            For a classifier's network in standard operators.
        calibration: normalised images ``(N, in_chans, H, W)``, with which the ranges of 8-bit products are chosen: of
            all convolutions for ExecuTorch; for TorchScript and AOTInductor as
            :meth:`mobilemamba.MobileMamba.quantize` does. Classifiers only.

    Returns:
        The largest difference between the outputs of the file and of the model, over the largest output of the model;
        of Core ML, the portable network's instead of the file's.

    Raises:
        ValueError: the model is a detector, or has another mixer than the scan and the format is not TorchScript; the
            options exclude each other or do not fit the model; ``fuse`` refuses the model; a package is missing; or the
            outputs of the file differ too much from the model's: by more than 1e-4 in float32, 0.1 in a 16-bit type,
            0.5 in int8. No file is written then.
    """
    path = Path(path)
    dtype = _checked_options(path, format, dtype, fuse, size, dynamic, features, calibration)
    if not isinstance(model, (MobileMamba, Segmenter)):
        raise ValueError(
            f"model: expected a classifier or a segmenter, got {type(model).__name__}; "
            "a detector is written by torch.jit.script(model.fuse()).save(path)"
        )
    network = model.network() if isinstance(model, Segmenter) else model
    for part in network.modules():
        if isinstance(part, WaveletMixer) and format != "torchscript":
            name = type(part.mixer).__name__
            raise ValueError(f"expected torchscript for a model with the mixer {name}, got {format}")
    if features and isinstance(model, Segmenter):
        raise ValueError("features: expected a classifier's network, got a segmenter")
    stages = checks.integers("features", features, least=0) if features else ()
    if any(stage >= len(network.stages) for stage in stages):
        raise ValueError(f"features: expected numbers of stages from 0 to {len(network.stages) - 1}, got {features}")
    preprocessing.check_channels(network.in_chans)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("expected a model with values, got one on the device meta")
    if labels and len(labels) != model.num_classes:
        raise ValueError(f"expected {model.num_classes} labels, got {len(labels)}")
    fixed = format in STANDARD and not dynamic
    height, width = _height_and_width(size, preprocessing) if fixed else (preprocessing.crop, preprocessing.crop)
    if calibration is not None and isinstance(model, Segmenter):
        raise ValueError("calibration: expected a classifier to quantize, got a segmenter")
    if calibration is not None and tuple(calibration.shape[1:]) != (network.in_chans, height, width):
        raise ValueError(
            f"calibration: expected images of shape (N, {network.in_chans}, {height}, {width}), got "
            f"{list(calibration.shape)}"
        )
    records = _records(model, preprocessing, labels, "int8" if calibration is not None and fixed else dtype)
    if fixed:
        records["mobilemamba.size"] = f"{height} {width}"

    # ONNX of any size takes the unfused layers: the operators of fused ones have no translation.
    fuse = fuse and not (format == "onnx" and dynamic)
    if fuse:
        check_foldable(model)  # before the copy, which fails with torch's words on a pruned model
    eager = _with_outputs(copy.deepcopy(model).eval(), stages)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"mobilemamba{SUFFIXES.get(format, '')}"  # the archive stores the name
        with naming(folder):
            if fixed:
                written = _with_outputs(portable(model, basic=format == "executorch"), stages)
                run = _fixed(
                    written, format, dtype, (network.in_chans, height, width), stages, file, records, calibration
                )
                dtype_of_images = torch.float16 if format == "onnx" and dtype == "float16" else torch.float32
                batches = (1, 3) if format == "onnx" else (1,)
                shapes = [(batch, network.in_chans, height, width) for batch in batches]
            else:
                own = copy.deepcopy(model).eval()
                if calibration is not None and isinstance(own, MobileMamba):
                    own = own.quantize(calibration.split(64))
                form = _with_outputs(own.fuse() if fuse else own, ())
                dtype_of_images = getattr(torch, dtype)
                run = _any_size(form.to(dtype_of_images), network, format, file, records)
                # two sizes that were not the example's
                shapes = [(1, network.in_chans, height, width), (3, network.in_chans, height + 1, width // 2 + 1)]
        examples = [_random(shape) for shape in shapes] if calibration is None else list(calibration[:8].split(1))
        difference = _difference(eager, run, examples, dtype_of_images)
        limit = 0.5 if calibration is not None else 1e-4 if dtype == "float32" else 0.1
        if not difference <= limit:
            what = "feature maps" if stages else "logits"
            raise ValueError(
                f"the {what} of the {format} file differ from the model's by {difference:.1e} of the largest"
            )
        _moved(file, path)
        if format in WITH_JSON:
            text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
            atomic_write(f"{path}.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return difference


def _checked_options(
    path: Path,
    format: str,
    dtype: str | None,
    fuse: bool,
    size: object,
    dynamic: bool,
    features: Sequence[int],
    calibration: Tensor | None,
) -> str:
    """The dtype, of options that do not exclude each other."""
    if format not in FORMATS or (dtype is not None and dtype not in DTYPES):
        raise ValueError(f"expected one of {', '.join(FORMATS)} in {', '.join(DTYPES)}, got {format} in {dtype}")
    dtype = dtype or FORMATS[format][0]
    if dtype not in FORMATS[format]:
        raise ValueError(f"expected {' or '.join(FORMATS[format])} for {format}, got {dtype}")
    suffix = SUFFIXES.get(format, "")
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path}: expected a name that ends with {suffix}: the readers of {format} require it")
    if not fuse and format != "torchscript":
        raise ValueError(f"expected torchscript for a module that can be trained, got {format}")
    if dynamic and (format != "onnx" or size is not None or features or dtype != "float32"):
        raise ValueError(
            "dynamic: expected onnx in float32 without a size and without features, got "
            f"{format} in {dtype}, size {size}, features {tuple(features)}"
        )
    if format not in STANDARD and (size is not None or features):
        raise ValueError(f"size and features are for {', '.join(STANDARD)}; a {format} file takes any size")
    if calibration is not None and (format not in ("executorch", "torchscript", "aoti") or not fuse):
        raise ValueError(
            f"calibration: expected executorch, torchscript or aoti of a fused model, got {format}; an onnx file is "
            "quantized by ONNX Runtime"
        )
    return dtype


def _height_and_width(size: int | tuple[int, int] | None, preprocessing: Preprocessing) -> tuple[int, int]:
    if size is None:
        return preprocessing.crop, preprocessing.crop
    both = (size, size) if isinstance(size, int) else size
    if len(both) != 2:
        raise ValueError(f"size: expected a number of pixels or height and width, got {size}")
    return checks.integer("size", both[0]), checks.integer("size", both[1])


def _records(
    model: MobileMamba | Segmenter, preprocessing: Preprocessing, labels: Sequence[str] | None, dtype: str
) -> dict[str, str]:
    device = next(model.parameters()).device.type
    if any("\n" in label for label in labels or ()):
        raise ValueError("expected labels of one line each, got a label with a line break")
    facts = {"version": VERSION, "dtype": dtype, "device": device, **preprocessing.to_dict()}
    records = {
        f"mobilemamba.{name}": " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in facts.items()
    }
    records["mobilemamba.labels"] = "\n".join(labels or ())
    if isinstance(model, Segmenter):
        records["mobilemamba.task"] = "segment"
    return records


def _with_outputs(model: nn.Module, stages: Sequence[int]) -> nn.Module:
    """The model with tensors as outputs: logits, or the maps of the stages."""
    if isinstance(model, Segmenter):
        return SegmenterLogits(model).eval()
    return FeatureMaps(model, stages).eval() if stages and isinstance(model, MobileMamba) else model


def _fixed(
    model: nn.Module,
    format: str,
    dtype: str,
    shape: tuple[int, int, int],
    stages: Sequence[int],
    file: Path,
    records: dict[str, str],
    calibration: Tensor | None,
) -> Run:
    """Write a network in standard operators for images of ``shape``."""
    outputs = [f"stage{stage}" for stage in stages] or ["logits"]
    images = _random((2 if format == "onnx" else 1, *shape))
    if format == "onnx":
        if dtype == "float16":
            model, images = model.half(), images.half()
        return onnx_files.one_size(model, images, outputs, file, records, batch=True)
    if isinstance(model, MobileMamba):
        model = Logits(model).eval()
    if format == "executorch":
        return executorch_files.write(model, images, file, records, calibration)
    if format == "litert":
        return litert_files.write(model, images, outputs, file, dtype)
    coreml_files.write(model, images, outputs, file, records, dtype)
    return lambda images: _as_tuple(model(images.cpu()))


def _any_size(model: nn.Module, network: MobileMamba, format: str, file: Path, records: dict[str, str]) -> Run:
    if format == "onnx":
        images, _ = _example(model, network)
        smallest = network.feature_info[-1]["reduction"] + 1
        return onnx_files.any_size(model, images, smallest, ["logits"], file, records)
    run = (_torchscript if format == "torchscript" else _aoti)(model, network, file, records)
    return lambda images: _as_tuple(run(images))


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


@torch.no_grad()
def _difference(eager: nn.Module, run: Run, examples: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest difference of an output, over the largest value of that output."""
    device = next(eager.parameters()).device
    worst = 0.0
    for images in examples:
        images = images.to(device)
        for expected, actual in zip(_as_tuple(eager(images)), run(images.to(dtype)), strict=True):
            worst = max(worst, float((actual.to(expected) - expected).abs().max() / expected.abs().max()))
    return worst


def _moved(file: Path, path: Path) -> None:
    """Puts a finished file at its place; a Core ML package, a folder, replaces an older package."""
    if not file.is_dir():
        atomic_write(path, lambda temporary: shutil.copyfile(file, temporary))
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into")
    if path.exists() and not (path / "Manifest.json").is_file():
        raise ValueError(f"{path}: expected no file or an older Core ML package in this place")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.copytree(file, beside)
    if path.exists():
        shutil.rmtree(path)
    os.replace(beside, path)


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
