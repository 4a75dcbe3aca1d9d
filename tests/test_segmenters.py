"""Segmenters as models: their call, loss, initial values, fused and scripted forms, files, published checkpoints."""

import copy
import io
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import figures
import pytest
import torch
import torch.nn.functional as F
from downstream_figures import Case
from torch import Tensor, nn

import mobilemamba
from mobilemamba import downstream
from mobilemamba.data import Preprocessing
from mobilemamba.downstream import Segmenter, segmentation_loss
from mobilemamba.downstream.segmentation_heads import PSPHead, cell_means

KINDS = ("semantic_fpn", "deeplabv3", "pspnet")
FIGURES = {"semantic_fpn": "semfpn"}
BODY = {"widths": (16, 24, 32), "depths": (1, 1, 1), "patch_strides": (2, 2), "in_chans": 3}  # strides 4, 8, 16
PREPROCESSING = Preprocessing(resize=48, crop=40)


def make(kind: str, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    model: Segmenter = downstream.create_model(kind, "nano", 5, backbone_options=BODY, channels=16, **options)
    return model


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest) -> Segmenter:
    """With statistics of its own, in evaluation."""
    model = make(request.param)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 48, 48))
    return model.eval()


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1)])
@torch.no_grad()
def test_logits_of_every_pixel(model: Segmenter, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    outputs = model(images)
    assert isinstance(outputs, OrderedDict)
    assert list(outputs) == (["out"] if model.aux_classifier is None else ["out", "aux"])
    assert all(logits.shape == (2, 5, *size) for logits in outputs.values())
    assert model.num_classes == 5
    classes = model.predict(images)
    assert classes.dtype == torch.int64
    assert torch.equal(classes, outputs["out"].argmax(1))
    assert model.predict(images, (50, 70)).shape == (2, 50, 70)


@torch.no_grad()
def test_fused(model: Segmenter) -> None:
    """The fused copy has no BatchNorm, no auxiliary head, and the backbone's one operator."""
    images = torch.randn(2, 3, 50, 41)
    fused = model.fuse()
    outputs = fused(images)
    assert list(outputs) == ["out"]
    torch.testing.assert_close(outputs["out"], model(images)["out"], rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert fused.network().fused
    assert not any(p.requires_grad for p in fused.parameters())
    with torch.autograd.profiler.profile() as profile:
        fused(images)
    assert sum(event.name == "mobilemamba::backbone" for event in profile.function_events) == 1


@torch.no_grad()
@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.full), "fused"])
def test_torchscript_and_fx(model: Segmenter, form: str) -> None:
    network = model.fuse() if form == "fused" else model
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    for other in (torch.jit.load(file), torch.fx.symbolic_trace(network)):
        for size in ((40, 48), (33, 17)):
            images = torch.randn(2, 3, *size)
            expected, found = network(images), other(images)
            assert found.keys() == expected.keys()
            for name, logits in found.items():
                torch.testing.assert_close(logits, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "format",
    ["torchscript", pytest.param("aoti", marks=pytest.mark.full), pytest.param("onnx", marks=pytest.mark.full)],
)
def test_exported_file_has_the_logits(model: Segmenter, format: str, tmp_path: Path) -> None:
    """:func:`mobilemamba.export` compares them too, for two sizes, and refuses a file that differs."""
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    if format == "aoti" and not isinstance(model.classifier, PSPHead):
        pytest.skip("compiling takes a minute or two each; PSPNet's head depends most on the image size")
    path = tmp_path / f"segmenter.{'onnx' if format == 'onnx' else 'pt2'}"
    labels = [f"class {i}" for i in range(5)]
    dynamic = format == "onnx"
    assert mobilemamba.export(model, path, format, preprocessing=PREPROCESSING, labels=labels, dynamic=dynamic) < 1e-4
    if format == "torchscript":
        records = {"mobilemamba.task": "", "mobilemamba.labels": ""}
        images = torch.randn(1, 3, 37, 52)
        found = torch.jit.load(str(path), _extra_files=records)(images)
        with torch.no_grad():
            torch.testing.assert_close(found, model(images)["out"], rtol=1e-4, atol=1e-5)
        assert records["mobilemamba.task"] in (b"segment", "segment")


@pytest.mark.full
def test_onnx_file_of_one_size_has_the_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model = make("semantic_fpn").eval()
    assert mobilemamba.export(model, tmp_path / "x.onnx", "onnx", preprocessing=PREPROCESSING) < 1e-4


def test_export_refuses_labels_of_other_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 5 labels, got 2"):
        mobilemamba.export(
            make("pspnet"), tmp_path / "x.pt", "torchscript", preprocessing=PREPROCESSING, labels=["a", "b"]
        )


def test_loss_counts_all_pixels() -> None:
    """A quarter of the pixels has no class: PyTorch's mean over the others is 4/3 of the published loss."""
    torch.manual_seed(0)
    outputs = {"out": torch.randn(2, 5, 8, 6), "aux": torch.randn(2, 5, 8, 6)}
    labels = torch.randint(0, 5, (2, 8, 6))
    labels[:, :2] = 255
    main, aux = (F.cross_entropy(outputs[name], labels, ignore_index=255) for name in ("out", "aux"))
    torch.testing.assert_close(segmentation_loss(outputs, labels), 0.75 * (main + 0.4 * aux))
    torch.testing.assert_close(segmentation_loss({"out": outputs["out"]}, labels), 0.75 * main)
    labels[labels == 255] = -1
    torch.testing.assert_close(segmentation_loss(outputs, labels, ignore_index=-1), 0.75 * (main + 0.4 * aux))
    assert float(segmentation_loss(outputs, torch.full_like(labels, 255))) == 0  # and not NaN


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 4, 6, dtype=torch.int64), r"labels: expected int64 of shape \[2, 8, 6\], got .*\[2, 4, 6\]"),
        (torch.zeros(2, 8, 6, dtype=torch.uint8), "labels: expected int64 of shape .*, got torch.uint8"),
    ],
)
def test_loss_refuses_labels_that_do_not_fit(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_loss({"out": torch.randn(2, 5, 8, 6)}, labels)


def test_every_parameter_learns(model: Segmenter) -> None:
    network = copy.deepcopy(model).train()
    segmentation_loss(network(torch.randn(4, 3, 48, 48)), torch.randint(0, 5, (4, 48, 48))).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_initial_values_are_the_published_ones() -> None:
    model = downstream.deeplabv3("nano", 40, backbone_options=BODY, channels=64)
    for head in (model.classifier, model.aux_classifier):
        assert float(head.classify[1].weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert not head.classify[1].bias.any()
    conv = model.classifier.bottleneck[0]  # Kaiming-normal with the fan out: 64 channels x 3 x 3
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert model.classifier.branches[1][0].dilation == (12, 12)
    assert model.classifier.classify[0].p == 0.1


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6), (13, 4)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_cell_means_are_adaptive_pooling(size: tuple[int, int], bins: int) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(cell_means(x, bins), F.adaptive_avg_pool2d(x, bins))


def test_aux_head_may_be_left_out() -> None:
    model = make("pspnet", aux=False)
    assert model.aux_classifier is None
    assert list(model(torch.randn(2, 3, 33, 32))) == ["out"]


def test_backbone_of_ones_own() -> None:
    features = mobilemamba.feature_extractor("nano", norm_eval=True, frozen_stages=1, **BODY)
    model = downstream.semantic_fpn(features, 3, pyramid_channels=8, channels=8)
    assert model.network() is features.body
    with pytest.raises(ValueError, match="backbone: expected feature maps of 3 stages, got 2"):
        downstream.deeplabv3(mobilemamba.feature_extractor("nano", stages=(0, 1)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": 0}, "channels: expected an integer of at least 1"),
        ({"num_classes": 0}, "num_classes: expected an integer of at least 1"),
        ({"dropout": 1.0}, "dropout: expected a number"),
        ({"dilations": ()}, "dilations: expected a tuple"),
        ({"aux": 1}, "aux: expected True or False"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        downstream.deeplabv3("nano", backbone_options=BODY, **wrong)


@torch.no_grad()
def test_predict_resizes_logits_of_16_bits_in_32(model: Segmenter) -> None:
    """In bfloat16 the interpolated logits of two classes are often equal."""
    images = torch.randn(1, 3, 24, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)["out"]
        classes = model.predict(images, (50, 70))
    expected = F.interpolate(logits.float(), (50, 70), mode="bilinear").argmax(1)
    assert torch.equal(classes, expected)


def test_predict_refuses_training() -> None:
    with pytest.raises(ValueError, match=re.escape("got one in training mode; call eval()")):
        make("pspnet").train().predict(torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def published_backbone() -> dict[str, Tensor]:
    """A published T2 without its head, as the segmenters' checkpoints have the backbone."""
    (t2,) = figures.small_cases()
    return {f"backbone.{key}": value for key, value in t2.state_dict().items() if not key.startswith("head")}


@pytest.mark.parametrize("kind", KINDS)
def test_published_checkpoint_loads(kind: str, published_backbone: dict[str, Tensor], tmp_path: Path) -> None:
    """As mmengine writes it; every key fills a parameter or a statistic, and a missing or further key is refused."""
    from mobilemamba.downstream.published import rename

    case = Case.load(FIGURES.get(kind, kind))
    model: Segmenter = downstream.create_model(kind, "t2")
    own = model.state_dict()
    heads = {key: figures.parameter(key, tuple(own[rename(model, key)].shape)) for key in case.keys}
    state = {**published_backbone, **heads}
    path = tmp_path / "iter_80000.pth"
    torch.save({"meta": {"iter": 80000}, "state_dict": state, "message_hub": {}}, path)
    for tensor in own.values():
        tensor.fill_(7)
    downstream.load_published(model, path)
    assert not [name for name, tensor in model.state_dict().items() if (tensor == 7).all()]
    for key, tensor in heads.items():
        assert torch.equal(model.state_dict()[rename(model, key)], tensor), key
    stem = published_backbone["backbone.patch_embed.0.c.weight"]
    assert torch.equal(model.network().patch_embed[0].conv.weight, stem)  # type: ignore[union-attr]

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for wrong, message in (
        ({**state, "decode_head.further.weight": torch.zeros(1)}, "1 unexpected: .*further.weight"),
        ({key: value for key, value in state.items() if "conv_seg.bias" not in key}, r"missing: .*classify\.1\.bias"),
        ({**state, "decode_head.conv_seg.bias": torch.zeros(3)}, r"1 mis-shaped: .*\[3\] instead of \[150\]"),
    ):
        with pytest.raises(ValueError, match=message):
            downstream.load_published(model, wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
