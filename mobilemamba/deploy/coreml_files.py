"""Core ML packages, by coremltools. They are made on any system, and run on Apple's only."""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from .packages import needing

__all__ = ["operators", "write"]


def write(
    model: nn.Module, images: Tensor, outputs: list[str], path: Path, records: dict[str, str], dtype: str
) -> None:
    """Write a model in standard operators for the shape of ``images``, ``(B, C, H, W)``, as an ML program.

    ``records`` get ``coreml.operators``: the operators of the program.

    Raises:
        ValueError: coremltools is missing, or an operator cannot be converted; the message names it.
    """
    with needing("coreml"):
        import coremltools

    precision = {"float32": coremltools.precision.FLOAT32, "float16": coremltools.precision.FLOAT16}[dtype]
    program = torch.export.export(model, (images,), strict=False).run_decompositions({})
    try:
        converted = coremltools.convert(
            program,
            outputs=[coremltools.TensorType(name=name) for name in outputs],
            convert_to="mlprogram",
            compute_precision=precision,
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
    except NotImplementedError as error:
        raise ValueError(f"Core ML cannot take the model: {error}") from error
    records["coreml.operators"] = ", ".join(f"{name} {count}" for name, count in operators(converted).most_common())
    converted.user_defined_metadata.update(records)
    converted.save(str(path))


def operators(model: object) -> Counter[str]:
    """The operators of a converted model, constants left out."""
    spec = model.get_spec()  # type: ignore[attr-defined]
    found = Counter[str]()
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            found.update(operation.type for operation in block.operations if operation.type != "const")
    return found
