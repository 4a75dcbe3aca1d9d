"""ExecuTorch files, lowered to XNNPACK: float32, or int8 after calibration."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import needing

__all__ = ["load", "write"]

Run = Callable[[Tensor], tuple[Tensor, ...]]

#: The products that are computed in int8.
IN_INT8 = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


def write(model: nn.Module, images: Tensor, path: Path, records: dict[str, str], calibration: Tensor | None) -> Run:
    """Write a model in standard operators (``portable(model, basic=True)``) for the shape of ``images``.

    ``records`` get ``executorch.delegated``: how many operators XNNPACK runs, of how many.

    Args:
        images: an example ``(B, C, H, W)``.
        calibration: images ``(N, C, H, W)`` as the model expects them; then products are computed in int8.

    Raises:
        ValueError: a package is missing, or an operator cannot be lowered; the message names it.
    """
    with needing("executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, (images,), strict=False)
    if calibration is not None:
        program = torch.export.export(_in_int8(program.module(), images, calibration), (images,), strict=False)
    _check_operators(program)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    inside, outside = _delegated(edge.exported_program())
    records["executorch.delegated"] = f"{inside} of {inside + sum(outside.values())}"
    if outside:
        records["executorch.not_delegated"] = ", ".join(f"{name} ({count})" for name, count in outside.most_common())
    with path.open("wb") as file:
        edge.to_executorch().write_to_file(file)
    return load(path)


def load(path: Path) -> Run:
    """The outputs of a file, for images of its shape.

    Raises:
        ValueError: a package is missing.
    """
    with needing("executorch"):
        from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")
    assert method is not None

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.clone() for output in method.execute([images.cpu().contiguous()]))

    return run


def _check_operators(program: torch.export.ExportedProgram) -> None:
    """Refuse operators of other libraries than torch: no runtime on a phone has them."""
    called = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    others = sorted(str(op) for op in called if op.namespace not in ("aten", "quantized_decomposed"))
    if others:
        raise ValueError(f"ExecuTorch cannot lower the model: it has no operator {', '.join(others)}")


def _delegated(program: torch.export.ExportedProgram) -> tuple[int, Counter[str]]:
    """How many operators XNNPACK runs, and the others by name."""
    inside, outside = 0, Counter[str]()
    for node in program.graph.nodes:
        if node.op != "call_function" or "getitem" in str(node.target):
            continue
        if node.target is torch.ops.higher_order.executorch_call_delegate:
            lowered: Any = getattr(program.graph_module, node.args[0].target)
            nodes = lowered.original_module.graph.nodes
            inside += sum(inner.op == "call_function" and "getitem" not in str(inner.target) for inner in nodes)
        else:
            outside[getattr(node.target, "__name__", str(node.target))] += 1
    return inside, outside


def _in_int8(module: Any, images: Tensor, calibration: Tensor) -> nn.Module:
    """The module with int8 products: 8-bit weights per channel, 8-bit activations with the range seen."""
    with needing("executorch"):
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    # Not set_global: it would also quantize every concatenation, and so the states of the scan.
    quantizer = XNNPACKQuantizer()
    for product in IN_INT8:
        quantizer.set_operator_type(product, get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(_is_in_int8)
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for batch in calibration.split(len(images)):
            if len(batch) == len(images):
                prepared(batch)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def _is_in_int8(node: torch.fx.Node) -> bool:
    """All products but those of the scan with matrices, whose errors its states would carry along the image: the
    selection, and the means of LayerNorm."""
    names = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    in_scan = any("selective" in name.split(".") for name in names)
    return not (in_scan and node.target is torch.ops.aten.linear.default)
