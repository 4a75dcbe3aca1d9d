"""Files for phones' runtimes as calls: ExecuTorch and LiteRT, on the CPU; and forms of files in 8 bits.

The ranges of 8 bits come from random images, which matters for the accuracy but not for the time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobilemamba.deploy import executorch_files, litert_files

__all__ = ["executorch", "export", "litert", "quantize_litert", "quantize_onnx"]


def export(model: nn.Module, images: Tensor, path: Path, int8: bool) -> None:
    """Write ``model``, of operators of torch, as ``.pte`` or ``.tflite`` for one image of ``images``."""
    if path.suffix == ".pte":
        executorch_files.write(model, images[:1], path, {}, images if int8 else None)
    else:
        litert_files.write(model, images[:1], ["logits"], path, "float32")


def executorch(path: Path, threads: int) -> Callable[[], Any]:
    """The file with a random image."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(str(path)).load_method("forward")
    assert method is not None
    images = torch.randn(*method.metadata.input_tensor_meta(0).sizes())
    return lambda: method.execute([images])


def litert(path: Path, threads: int) -> Callable[[], Any]:
    """The file with a random image."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (images,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    pixels = torch.randn(*images["shape"].tolist()).numpy()

    def call() -> Any:
        interpreter.set_tensor(images["index"], pixels)
        interpreter.invoke()
        return interpreter.get_tensor(logits["index"])

    return call


def quantize_litert(path: Path, target: Path) -> None:
    """Write the file with convolutions and the classifier in 8 bits."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import qtyping, quantizer

    (images,) = Interpreter(model_path=str(path)).get_input_details()
    made = quantizer.Quantizer(path.read_bytes())
    names = qtyping.TFLOperationName
    for name in (names.CONV_2D, names.DEPTHWISE_CONV_2D, names.FULLY_CONNECTED):
        made.add_static_config(".*", name, activation_num_bits=8, weight_num_bits=8)
    pixels = torch.randn(*images["shape"].tolist()).numpy()
    ranges = made.calibrate({"serving_default": [{"images": pixels}]})
    target.write_bytes(made.quantize(ranges).quantized_model)


def quantize_onnx(path: Path, target: Path) -> None:
    """Write the file with convolutions and the classifier in 8 bits, for ONNX Runtime."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            (feed,) = onnxruntime.InferenceSession(str(path)).get_inputs()
            sizes = [size if isinstance(size, int) else 1 for size in feed.shape]
            self.batches = iter([{feed.name: torch.randn(*sizes).numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    ready = target.with_suffix(".ready.onnx")
    quant_pre_process(str(path), str(ready))
    quantize_static(
        str(ready),
        str(target),
        Images(),
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        reduce_range=True,  # sums of 8-bit products saturate on processors without VNNI
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()
