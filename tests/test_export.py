"""Files for programs without Python: what is in them, that they compute the same, what is refused. C++: tests/cpp."""

import importlib.util
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mobilemamba
from mobilemamba import cli, weights
from mobilemamba.deploy import export, exporting

NANO = weights.entry("nano")


@pytest.fixture
def model() -> mobilemamba.MobileMamba:
    return mobilemamba.nano(pretrained=True).eval()


def records(path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        found = {name.partition("/extra/mobilemamba.")[2]: name for name in archive.namelist()}
        return {name: archive.read(entry).decode() for name, entry in found.items() if name}


@pytest.mark.parametrize("dtype", exporting.DTYPES)
def test_torchscript(model, tmp_path, dtype):
    path = tmp_path / "nano.pt"
    export(model, path, "torchscript", preprocessing=NANO.preprocessing, labels=NANO.labels, dtype=dtype)
    images = torch.randn(3, 1, 37, 19).to(getattr(torch, dtype))
    torch.testing.assert_close(torch.jit.load(path)(images), model.fuse().to(images)(images))
    assert records(path) == {
        "version": "1",
        "dtype": dtype,
        "device": "cpu",
        "labels": "\n".join(NANO.labels),
        "resize": "28",
        "crop": "28",
        "interpolation": "bicubic",
        "mean": "0.286",
        "std": "0.353",
    }


def test_trainable_file_has_batchnorm_and_learns(model, tmp_path):
    path = tmp_path / "nano.pt"
    export(model, path, "torchscript", preprocessing=NANO.preprocessing, fuse=False)
    loaded = torch.jit.load(path).train()
    before = dict(loaded.named_buffers())["network.head.norm.running_mean"].clone()
    loaded(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert not torch.equal(dict(loaded.named_buffers())["network.head.norm.running_mean"], before)
    assert records(path)["labels"] == ""


def test_without_the_library_torchscript_says_what_to_link(model, tmp_path):
    export(model, tmp_path / "nano.pt", "torchscript", preprocessing=NANO.preprocessing)
    code = "import torch; torch.jit.load('nano.pt')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown builtin op: mobilemamba::" in done.stderr
    assert "needs libmobilemamba: link MobileMamba::mobilemamba (C++), or import mobilemamba (Python)" in done.stderr


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nano", [(1, 28, 28), (5, 37, 19), (2, 1, 1)]),
        pytest.param("s6", [(1, 224, 224), (3, 160, 97), (1, 30, 33)], marks=pytest.mark.full),
    ],
)
def test_onnx(tmp_path, request, name, sizes):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    model = mobilemamba.create_model(name, pretrained=name == "nano").eval()
    if name != "nano":
        for module in model.modules():  # as after training: branches that are not zero
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 0.8)
                nn.init.normal_(module.running_mean, 0, 0.1)
    entry = weights.entry(name)
    export(model, tmp_path / "model.onnx", "onnx", preprocessing=entry.preprocessing, labels=entry.labels, dynamic=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch, height, width in sizes:
        images = torch.randn(batch, model.in_chans, height, width)
        with torch.inference_mode():
            expected = model(images)
        actual = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    check_other_readers(tmp_path / "model.onnx", images.numpy(), actual, run=request.config.option.full)
    stored = session.get_modelmeta().custom_metadata_map
    assert stored["mobilemamba.labels"] == "\n".join(entry.labels)
    assert stored["mobilemamba.crop"] == str(entry.preprocessing.crop)


def check_other_readers(path, images, expected, run):
    """OpenVINO, and what ONNX Runtime does before quantization, read fewer forms of loops and paddings.

    With ``run`` they read the file, which takes seconds.
    """
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    model = onnx.load(path)
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    bodies = [attribute.g for loop in loops for attribute in loop.attribute if attribute.name == "body"]
    paddings = [node for graph in (model.graph, *bodies) for node in graph.node if node.op_type == "Pad"]
    assert len(bodies) == len(loops) > 0
    assert all(trips and condition for trips, condition, *_ in (loop.input for loop in loops))
    assert len(paddings) == 5 * len(loops)  # four in a loop, one before a Haar transform
    assert all(len(node.input) == 3 and all(node.input) for node in paddings)  # the data, pads of all axes, the value

    if not run:
        return
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    inferred = SymbolicShapeInference.infer_shapes(model, auto_merge=True)
    (logits,) = inferred.graph.output
    assert [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim] == ["batch", expected.shape[1]]

    if importlib.util.find_spec("openvino"):
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}  # by default bfloat16, where the processor has it
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(compiled([images])[0]), expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> str:
    """A file of weights for images of five channels, and nothing else."""
    path = tmp_path_factory.mktemp("five") / "five.pt"
    torch.manual_seed(0)
    torch.save(mobilemamba.nano(in_chans=5).state_dict(), path)
    return str(path)


def test_preprocessing_has_the_channels_of_the_model(five, tmp_path, capsys):
    target = str(tmp_path / "out.pt")
    command = ["export", "--format", "torchscript", "--checkpoint", five, target]
    assert cli.main(command) == 2
    message = "images of 5 channels, but mean and std are known for 1; state --mean and --std with 5 values each"
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"preprocessing: expected mean and std with 5 values, .* got 1"):
        export(mobilemamba.nano(in_chans=5), target, "torchscript", preprocessing=NANO.preprocessing)
    assert list(tmp_path.iterdir()) == []

    stated = ["--mean", "0.1,0.2,0.3,0.4,0.5", "--std", "1,1,1,1,2", "--resize", "20", "--crop", "16"]
    assert cli.main([*command, *stated, "--interpolation", "bilinear"]) == 0
    found = records(target)
    assert (found["mean"], found["std"]) == ("0.1 0.2 0.3 0.4 0.5", "1.0 1.0 1.0 1.0 2.0")
    assert (found["resize"], found["crop"], found["interpolation"]) == ("20", "16", "bilinear")
    assert torch.jit.load(target)(torch.randn(2, 5, 16, 16)).shape == (2, 10)

    capsys.readouterr()
    assert cli.main(["classify", "a.png", "--checkpoint", five, *stated]) == 2
    assert capsys.readouterr().err == (
        "mobilemamba classify: error: image files are read into 1 (grey) or 3 (RGB) channels; the model takes 5\n"
    )


def test_what_contradicts_the_model_is_refused(model, tmp_path):
    target = tmp_path / "nano.pt"
    with pytest.raises(ValueError, match="expected 10 labels, got 1"):
        export(model, target, "torchscript", preprocessing=NANO.preprocessing, labels=["a"])
    pruned = mobilemamba.nano(num_classes=2)
    prune.random_unstructured(pruned.stages[1].transition[2].squeeze_excite.reduce, "weight", 0.5)
    with pytest.raises(ValueError, match=r"squeeze_excite\.reduce has hooks, .*prune\.remove"):
        export(pruned, target, "torchscript", preprocessing=NANO.preprocessing)
    with pytest.raises(ValueError, match="expected a model with values, got one on the device meta"):
        export(model.to("meta"), target, "torchscript", preprocessing=NANO.preprocessing)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_not_kept(model, tmp_path, monkeypatch):
    def wrong(model, network, path, records):
        path.touch()
        return lambda images: model(images) + 1

    monkeypatch.setattr(exporting, "_torchscript", wrong)
    with pytest.raises(ValueError, match="the logits of the torchscript file differ from the model's by"):
        export(model, tmp_path / "nano.pt", "torchscript", preprocessing=NANO.preprocessing)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--format", "torchscript", "nano.pt"]) == 0
    assert capsys.readouterr().out.startswith("nano.pt: torchscript, float32, ")
    assert records("nano.pt")["labels"].splitlines() == list(NANO.labels)
    (tmp_path / "names").write_text("".join(f"name {i}\n" for i in range(10)))
    assert cli.main(["export", "--format", "torchscript", "--labels", "names", "nano.pt"]) == 0
    assert records("nano.pt")["labels"].startswith("name 0\nname 1\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "aoti", "nano.pt"], "expected a name that ends with .pt2"),
        (
            ["--format", "onnx", "--dtype", "bfloat16", "nano.onnx"],
            "expected float32 or float16 for onnx, got bfloat16",
        ),
        (["--format", "onnx", "--trainable", "nano.onnx"], "torchscript for a module that can be trained, got onnx"),
        (["--format", "torchscript", "none/nano.pt"], "none: no such folder"),
        (["--format", "torchscript", "--checkpoint", "none.pt", "nano.pt"], "none.pt: no such checkpoint file"),
        (["--format", "torchscript", "--labels", "/dev/null", "nano.pt"], "expected 10 labels, one per line, got 0"),
        (["--format", "torchscript", "--crop", "29", "nano.pt"], "expected a crop of 1 to resize=28 pixels, got 29"),
        (["--format", "torchscript", "--mean", "0,0,0", "nano.pt"], "mean and std with a value for each channel, got"),
        (["--format", "executorch", "nano.onnx"], "expected a name that ends with .pte"),
        (["--format", "coreml", "nano.onnx"], "expected a name that ends with .mlpackage"),
        (["--format", "litert", "nano.onnx"], "expected a name that ends with .tflite"),
        (["--format", "litert", "--dtype", "bfloat16", "x.tflite"], "float32 or float16 for litert, got bfloat16"),
        (["--format", "executorch", "--dtype", "float16", "nano.pte"], "expected float32 for executorch, got float16"),
        (["--format", "torchscript", "--size", "32", "nano.pt"], "a torchscript file takes any size"),
        (["--format", "onnx", "--dynamic", "--size", "32", "nano.onnx"], "dynamic: expected onnx in float32 without"),
        (["--format", "onnx", "--features", "0,3", "nano.onnx"], "numbers of stages from 0 to 2, got"),
        (["--format", "executorch", "--int8", "nano.pte"], "expected --int8 and --data together"),
        (["--format", "onnx", "--int8", "--data", "digits", "nano.onnx"], "int8 is for executorch, got onnx"),
        (["--format", "executorch", "--int8", "--data", "folder:none", "nano.pte"], "none: expected a folder"),
    ],
)
def test_refusals(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
