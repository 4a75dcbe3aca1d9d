"""ONNX files: without loops for one image size, or with loops for any."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import needing

__all__ = ["Run", "any_size", "load", "one_size"]

Run = Callable[[Tensor], tuple[Tensor, ...]]


def one_size(
    model: nn.Module, images: Tensor, outputs: Sequence[str], path: Path, records: dict[str, str], batch: bool
) -> Run:
    """Write a model in standard operators for the size of ``images``, ``(B, C, H, W)`` with B at least 2.

    Args:
        batch: keep the batch size open; otherwise it is that of ``images``.
    """
    with needing("onnx"):
        import onnxruntime  # noqa: F401  # now, not after the export
        from onnxscript import opset18 as op

    def softplus(x, beta=1.0, threshold=20.0):  # type: ignore[no-untyped-def]  # the exporter would guard it by Where
        if images.dtype == torch.float16:  # 1 + exp(x) would lose all steps below 1e-3
            return op.Softplus(x)
        # ONNX Runtime's Softplus is not vectorised: it took a sixth of the time of s6
        return op.Relu(x) + op.Log(op.Exp(op.Neg(op.Abs(x))) + op.Constant(value_float=1.0))

    shapes = ({0: torch.export.Dim("batch")},) if batch else None
    table: dict[Any, Any] = {torch.ops.aten.softplus.default: softplus}
    return _written(model, images, shapes, table, outputs, path, records)


def any_size(
    model: nn.Module, images: Tensor, smallest: int, outputs: Sequence[str], path: Path, records: dict[str, str]
) -> Run:
    """Write a model with this package's operators, unfused, for any batch and any image size.

    Args:
        images: an example ``(B, C, H, W)``; torch.export specialises sizes of 1, so its last map has at least 2 rows
            and columns.
        smallest: the smallest height and width that torch.export promises.
    """
    with needing("onnx"):
        import onnxruntime  # noqa: F401

        from .onnx_operators import TRANSLATIONS

    varying = {0: torch.export.Dim("batch")}
    varying.update({i: torch.export.Dim(name, min=smallest) for i, name in ((2, "height"), (3, "width"))})
    return _written(model, images, (varying,), TRANSLATIONS, outputs, path, records)


def _written(
    model: nn.Module,
    images: Tensor,
    shapes: tuple[dict[int, torch.export.Dim]] | None,
    table: dict[Any, Any],  # operators of torch -> functions of onnxscript
    outputs: Sequence[str],
    path: Path,
    records: dict[str, str],
) -> Run:
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=18,
            custom_translation_table=table,
            input_names=["images"],
            output_names=list(outputs),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:  # the cause names the operator
        raise ValueError(f"ONNX cannot express the model: {error.__cause__ or error}") from error
    assert program is not None
    program.model.metadata_props.update(records)
    program.save(str(path), external_data=False)
    return load(path)[0]


def load(path: Path) -> tuple[Run, dict[str, str]]:
    """The outputs of a file, by ONNX Runtime, and its metadata.

    Raises:
        ValueError: a package is missing.
    """
    with needing("onnx"):
        import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    records = session.get_modelmeta().custom_metadata_map

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy(force=True)})))

    return run, records
