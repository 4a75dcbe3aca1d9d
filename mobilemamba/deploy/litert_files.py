"""LiteRT files, by litert-torch: float32, or with weights in float16."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import needing
from .standard.layers import convolution
from .standard.mixer import SelectiveScan

__all__ = ["load", "write"]

Run = Callable[[Tensor], tuple[Tensor, ...]]


def write(model: nn.Module, images: Tensor, outputs: Sequence[str], path: Path, dtype: str) -> Run:
    """Write a model in standard operators for the shape of ``images``, ``(B, C, H, W)``. The model is changed.

    The input is named ``images``. Input and outputs are float32; in ``float16`` the weights take half the space.

    Raises:
        ValueError: a package is missing, or the model cannot be converted; the message names the operator.
    """
    with needing("litert"):
        import litert_torch

    litert_torch.config.show_progress = False
    for scan in [module for module in model.modules() if isinstance(module, SelectiveScan)]:
        scan.x_proj = OnMaps(scan.x_proj)  # type: ignore[assignment]
        scan.dt_proj = nn.ModuleList(map(OnMaps, scan.dt_proj))
    try:
        converted = litert_torch.convert(Named(model, outputs).eval(), sample_kwargs={"images": images})
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"LiteRT cannot take the model: {error}") from error
    converted.export(str(path))
    if dtype == "float16":
        _in_float16(path)
    return load(path, outputs)


def load(path: Path, outputs: Sequence[str]) -> Run:
    """These outputs of a file, for images of its shape.

    Raises:
        ValueError: a package is missing.
    """
    with needing("litert"):
        from ai_edge_litert.interpreter import Interpreter

    run_file = Interpreter(model_path=str(path)).get_signature_runner()

    def run(images: Tensor) -> tuple[Tensor, ...]:
        found = run_file(images=images.numpy(force=True))
        return tuple(torch.from_numpy(found[name]) for name in outputs)

    return run


def _in_float16(path: Path) -> None:
    """Replaces a file by one with its weights in float16."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    made = quantizer.Quantizer(path.read_bytes())
    made.update_quantization_recipe(
        ".*", qtyping.TFLOperationName.ALL_SUPPORTED, config, algorithm_key=AlgorithmName.FLOAT_CASTING
    )
    path.write_bytes(made.quantize().quantized_model)


class OnMaps(nn.Module):
    """A linear layer on maps ``(B, H, W, C)`` as a 1x1 convolution, which the converter takes for every size of maps.

    It refuses the product of matrices for a map of one position.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.conv = convolution(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Named(nn.Module):
    """The model with its outputs by name, as LiteRT has them in the file."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.model(images)
        return dict(zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True))
