"""Files in standard operators run where this package is not known: ONNX Runtime, OpenVINO, ExecuTorch, LiteRT."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_portable import trained
from torch import Tensor

import mobilemamba
from mobilemamba import cli, weights
from mobilemamba.data import Preprocessing
from mobilemamba.deploy import coreml_files, executorch_files, export, litert_files, onnx_files, open_exported, portable

NANO = weights.entry("nano")
#: Smaller than nano's own size, so that the graph, and the time to compile it, are small.
SIDE = 16
CLASSES = [f"class {i}" for i in range(10)]
SMALL = Preprocessing(SIDE, SIDE, NANO.preprocessing.mean, NANO.preprocessing.std)


@pytest.fixture(scope="module")
def model() -> mobilemamba.MobileMamba:
    torch.manual_seed(0)
    return mobilemamba.nano(pretrained=True).eval()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ONNX


@pytest.fixture(scope="module")
def onnx_file(model: mobilemamba.MobileMamba, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    path = tmp_path_factory.mktemp("onnx") / "nano.onnx"
    assert export(model, path, "onnx", preprocessing=SMALL, labels=CLASSES) < 1e-4
    return path


@torch.inference_mode()
def test_onnx_has_no_loop_and_runs_in_onnx_runtime_and_openvino(model, onnx_file: Path) -> None:
    import onnx
    import onnxruntime

    stored = onnx.load(onnx_file)
    found = Counter(node.op_type for node in stored.graph.node)
    assert found["LayerNormalization"] == found["Log"] / 2 == 4  # a norm for each mixer, two directions
    assert not {"Loop", "Scan", "If", "Where", "Shape", "Expand"} & set(found)
    assert {entry.key: entry.value for entry in stored.metadata_props}["mobilemamba.size"] == f"{SIDE} {SIDE}"
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    compiled = None
    if importlib.util.find_spec("openvino"):
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}  # by default bfloat16, where the processor has it
        compiled = openvino.Core().compile_model(str(onnx_file), "CPU", settings)
    for batch in (1, 5):
        images = torch.randn(batch, 1, SIDE, SIDE)
        assert_near(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model(images))
        if compiled is not None:
            assert_near(torch.from_numpy(compiled([images.numpy()])[0]), model(images))


@torch.inference_mode()
def test_onnx_runtime_quantizes_the_file(model, onnx_file: Path, tmp_path: Path) -> None:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(0)
            self.batches = iter([torch.randn(4, 1, SIDE, SIDE, generator=generator) for _ in range(4)])

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quant_pre_process(str(onnx_file), str(tmp_path / "ready.onnx"))
    quantize_static(
        str(tmp_path / "ready.onnx"),
        str(tmp_path / "int8.onnx"),
        Reader(),
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        reduce_range=True,  # sums of 8-bit products saturate on processors without VNNI
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * onnx_file.stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(8, 1, SIDE, SIDE)
    expected = model(images)
    error = torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) - expected
    assert float(error.square().mean().sqrt()) < 0.3 * float(expected.square().mean().sqrt())  # as for any noise


@torch.inference_mode()
def test_onnx_in_float16_with_feature_maps(model, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    path = tmp_path / "maps.onnx"
    export(model, path, "onnx", preprocessing=SMALL, dtype="float16", features=(1, 2), size=(8, 12))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["stage1", "stage2"]
    images = torch.randn(2, 1, 8, 12)
    maps = session.run(None, {"images": images.half().numpy()})
    for actual, expected in zip(maps, model.forward_stages(images)[1:], strict=True):
        assert actual.dtype == "float16"
        assert_near(torch.from_numpy(actual).float(), expected, tolerance=0.05)


#: Of our operators those that onnx-tensorrt, the parser of TensorRT, documents as supported (docs/operators.md,
#: TensorRT 10.0). There Slice, Pad and ReduceMean need constant axes, and LayerNormalization has one output.
IN_TENSORRT = frozenset(
    "Abs Add Concat Conv Exp Gemm LayerNormalization Log MatMul Mul Neg Pad ReduceMean Relu Reshape Sigmoid Slice Sub "
    "Transpose".split()
)


def test_tensorrt_documents_every_operator_of_the_file(onnx_file: Path) -> None:
    import onnx

    graph = onnx.load(onnx_file).graph
    constants = {entry.name for entry in graph.initializer}
    assert {node.op_type for node in graph.node} <= IN_TENSORRT
    for node in graph.node:
        assert node.domain == ""
        if node.op_type in ("Slice", "Pad", "ReduceMean"):
            assert set(filter(None, node.input[1:])) <= constants
        if node.op_type == "LayerNormalization":
            assert len(node.output) == 1


@torch.no_grad()
def test_onnx_export_of_torch_takes_a_portable_model(model, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    path = tmp_path / "own.onnx"
    images = torch.randn(2, 1, 8, 12)
    torch.onnx.export(portable(model), (images,), path, dynamic_shapes=({0: "batch"},), verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 1, 8, 12)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_near(torch.from_numpy(logits), model(images), tolerance=1e-5)


@torch.no_grad()
def test_evaluate_runs_the_exported_file(model, onnx_file: Path, tmp_path: Path, capsys) -> None:
    file = open_exported(onnx_file)
    assert (file.preprocessing, file.labels) == (SMALL, CLASSES)
    images = torch.randn(3, 1, SIDE, SIDE)
    assert_near(file(images), model(images))
    generator = torch.Generator().manual_seed(0)
    right = 0
    for number, label in enumerate(CLASSES):
        (tmp_path / "val" / label).mkdir(parents=True)
        path = tmp_path / "val" / label / "image.png"
        pixels = torch.randint(256, (SIDE, SIDE), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
        right += int(model(SMALL.transforms()(path)[None]).argmax()) == number
    command = ["evaluate", "--exported", str(onnx_file), "--data", f"folder:{tmp_path}", "--workers", "0"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"({right} of 10 images)" in printed
    assert "(nano.onnx, batches of 64)" in printed


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("x.pt", None, "x.pt: expected a file of onnx, executorch or litert"),
        ("none.pte", None, "none.pte: no such exported file"),
        ("x.pte", None, "x.pte.json: no such file; mobilemamba export writes it"),
        ("x.pte", "{", "x.pte.json: expected JSON of mobilemamba export"),
    ],
)
def test_files_that_cannot_be_evaluated_are_refused(name, facts, message, tmp_path: Path, capsys) -> None:
    if not name.startswith("none"):
        (tmp_path / name).touch()
    if facts is not None:
        (tmp_path / f"{name}.json").write_text(facts)
    assert cli.main(["evaluate", "--exported", str(tmp_path / name), "--data", "digits"]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["evaluate", "--exported", name, "--model", "nano", "--data", "digits"]) == 2
    assert "expected either --exported or --model, got both" in capsys.readouterr().err


# ExecuTorch


def executorch_output(path: Path, images: Tensor) -> list[Tensor]:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(str(path)).load_method("forward").execute([images])


@pytest.mark.full
def test_executorch_runs_all_operators_in_xnnpack(model, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--format", "executorch", "--size", "12", "nano.pte"]) == 0
    records = json.loads(Path("nano.pte.json").read_text())
    inside, total = map(int, records["executorch.delegated"].split(" of "))
    assert inside == total > 100
    assert f"XNNPACK runs {total} of {total} operators\n" in capsys.readouterr().out
    assert records["mobilemamba.labels"].splitlines() == list(NANO.labels)
    assert (records["mobilemamba.crop"], records["mobilemamba.size"]) == ("12", "12 12")
    images = torch.randn(1, 1, 12, 12)
    (logits,) = executorch_output(Path("nano.pte"), images)
    with torch.no_grad():
        assert_near(logits, model(images), tolerance=1e-5)


@pytest.mark.full
def test_executorch_int8_is_small_and_all_in_xnnpack(model, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    calibration = torch.randn(16, 1, 4, 4)  # maps of one position: the smallest graph
    difference = export(
        model, tmp_path / "int8.pte", "executorch", preprocessing=SMALL, size=4, calibration=calibration
    )
    assert 0 < difference < 0.5
    weights_in_float32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "int8.pte").stat().st_size < 0.5 * weights_in_float32
    records = json.loads((tmp_path / "int8.pte.json").read_text())
    assert records["mobilemamba.dtype"] == "int8"
    assert "executorch.not_delegated" not in records


@pytest.mark.full
def test_onnx_of_s6(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    entry = weights.entry("s6")
    model = trained(mobilemamba.s6())
    assert export(model, tmp_path / "s6.onnx", "onnx", preprocessing=entry.preprocessing) < 1e-5


# LiteRT


@torch.no_grad()
def test_litert_runs_the_file(model, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("litert_torch", reason="the extra litert is not installed")
    from ai_edge_litert.interpreter import Interpreter

    monkeypatch.chdir(tmp_path)
    # maps of 4x4, 2x2 and 1x1 positions
    assert cli.main(["export", "--format", "litert", "--size", "16", "nano.tflite"]) == 0
    assert "nano.tflite: litert, float32, " in capsys.readouterr().out
    records = json.loads(Path("nano.tflite.json").read_text())
    assert records["mobilemamba.labels"].splitlines() == list(NANO.labels)
    assert (records["mobilemamba.dtype"], records["mobilemamba.size"]) == ("float32", "16 16")
    images = torch.randn(1, 1, 16, 16)
    found = Interpreter(model_path="nano.tflite").get_signature_runner()(images=images.numpy())
    assert set(found) == {"logits"}
    assert_near(torch.from_numpy(found["logits"]), model(images), tolerance=1e-5)


@pytest.mark.full
@torch.no_grad()
def test_litert_in_float16_with_feature_maps(model, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="the extra litert is not installed")
    from ai_edge_litert.interpreter import Interpreter

    path = tmp_path / "maps.tflite"
    export(model, path, "litert", preprocessing=SMALL, dtype="float16", features=(0, 2), size=(8, 12))
    assert path.stat().st_size < 0.8 * 4 * sum(parameter.numel() for parameter in model.parameters())
    images = torch.randn(1, 1, 8, 12)
    found = Interpreter(model_path=str(path)).get_signature_runner()(images=images.numpy())
    assert set(found) == {"stage0", "stage2"}
    maps = model.forward_stages(images)
    for stage in (0, 2):
        assert_near(torch.from_numpy(found[f"stage{stage}"]), maps[stage], tolerance=0.01)


# Core ML


def test_coreml_package_has_known_operators(model, tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools", reason="the extra coreml is not installed")
    path = tmp_path / "nano.mlpackage"
    for _ in range(2):  # the second package replaces the first
        export(model, path, "coreml", preprocessing=SMALL, labels=NANO.labels, size=8)
    stored = coremltools.models.MLModel(str(path), skip_model_load=True)
    facts = stored.user_defined_metadata
    assert facts["mobilemamba.labels"].splitlines() == list(NANO.labels)
    kinds = {entry.rpartition(" ")[0] for entry in facts["coreml.operators"].split(", ")}
    assert {"conv", "softplus", "layer_norm", "silu", "concat"} <= kinds
    assert [output.name for output in stored.get_spec().description.output] == ["logits"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["nano.mlpackage"]


# Bad input


@pytest.mark.parametrize("value", ["0", "-3", "1x2x3", "a"])
def test_sizes_that_are_none_are_refused(value: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "--format", "onnx", f"--size={value}", "nano.onnx"])
    assert "--size: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("format", "package", "name"),
    [
        ("onnx", "onnxruntime", "x.onnx"),
        ("executorch", "executorch", "x.pte"),
        ("coreml", "coremltools", "x.mlpackage"),
        ("litert", "litert_torch", "x.tflite"),
    ],
)
def test_a_missing_package_is_named_with_its_line(model, format, package, name, tmp_path, monkeypatch) -> None:
    for module in [loaded for loaded in sys.modules if loaded.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"need the extra {format}: pip install 'mobilemamba\[{format}\]'"):
        export(model, tmp_path / name, format, preprocessing=SMALL)
    assert list(tmp_path.iterdir()) == []


class Ours(torch.nn.Module):
    """Has an operator that only this package's library has."""

    def forward(self, images: Tensor) -> Tensor:
        return mobilemamba.ops.haar_conv2d(images, torch.ones(4, 1, 3, 3))


@pytest.mark.parametrize("format", ["onnx", "executorch", "coreml", "litert"])
def test_an_operator_that_cannot_be_lowered_is_named(format: str, tmp_path: Path) -> None:
    package = {"onnx": "onnxscript", "executorch": "executorch", "coreml": "coremltools", "litert": "litert_torch"}[
        format
    ]
    pytest.importorskip(package, reason=f"the extra {format} is not installed")
    images = torch.randn(2, 1, 6, 6)
    write = {
        "onnx": lambda: onnx_files.one_size(Ours(), images, ["logits"], tmp_path / "x.onnx", {}, batch=True),
        "executorch": lambda: executorch_files.write(Ours(), images, tmp_path / "x.pte", {}, None),
        "coreml": lambda: coreml_files.write(Ours(), images, ["logits"], tmp_path / "x.mlpackage", {}, "float16"),
        "litert": lambda: litert_files.write(Ours(), images, ["logits"], tmp_path / "x.tflite", "float32"),
    }[format]
    with pytest.raises(ValueError, match=r"(?s)cannot .*haar_conv2d"):
        write()
