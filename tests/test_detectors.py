"""The detectors as users meet them: training, fused and compiled inference, published files, and bad input."""

import dataclasses
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream_figures import Case
from figures import small_cases
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip("torchvision", reason="detectors need torchvision")

from torchvision.ops import box_iou

import mobilemamba
from mobilemamba import cli, downstream
from mobilemamba.data import Preprocessing
from mobilemamba.downstream.boxes import Matcher
from mobilemamba.downstream.published import rename
from mobilemamba.downstream.transform import paste_masks

SMALL = {"widths": (16, 24, 32), "depths": (1, 1, 1)}
DETECTORS = ("mask_rcnn", "retinanet", "ssdlite")


OPTIONS: dict[str, dict[str, float]] = {
    "mask_rcnn": {
        "min_size": 64,
        "max_size": 96,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 2,
        "box_batch_size_per_image": 8,
        "rpn_post_nms_top_n_test": 10,
    },
    "retinanet": {"min_size": 64, "max_size": 96, "score_thresh": 0.0},
    "ssdlite": {"size": 64, "score_thresh": 0.0},
}


def make(kind: str) -> nn.Module:
    """A detector of 3 classes and the background on a small backbone; its scores need no threshold."""
    torch.manual_seed(0)
    return downstream.create_model(kind, "b1", 4, backbone_options=SMALL, **OPTIONS[kind])


@pytest.fixture(params=DETECTORS, scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param)


@pytest.fixture
def images() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]


@pytest.fixture
def targets() -> list[dict[str, Tensor]]:
    """Two boxes in the first image, none in the second one."""
    masks = torch.zeros(2, 50, 70, dtype=torch.uint8)
    masks[0, 5:30, 5:30], masks[1, 20:45, 30:68] = 1, 1
    boxes = torch.tensor([[5.0, 5, 30, 30], [30, 20, 68, 45]])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks},
        {**none, "masks": torch.zeros(0, 80, 60, dtype=torch.uint8)},
    ]


def test_training_reaches_every_parameter(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> None:
    model.train()
    losses = model(images, targets)
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    assert all(x > 0 for x in losses.values())
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    without = [name for (name, _), x in zip(model.named_parameters(), gradients, strict=True) if x is None]
    assert not without
    nothing = model(images[1:] * 2, targets[1:] * 2)  # no box in the whole batch
    assert all(x.isfinite() for x in nothing.values())


@torch.no_grad()
def test_fused(model: nn.Module, images: list[Tensor]) -> None:
    expected, fused = model.eval()(images), model.fuse()
    assert not fused.training
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    for image, reference, found in zip(images, expected, fused(images), strict=True):
        count = len(reference["boxes"])
        assert count > 0
        assert set(reference["labels"].tolist()) <= {1, 2, 3}
        assert (reference["boxes"].amax(0) <= torch.tensor([*image.shape[:0:-1]] * 2) + 1e-3).all()
        assert found.keys() == reference.keys()
        torch.testing.assert_close(found["scores"], reference["scores"], rtol=1e-4, atol=1e-5)
        if "masks" in reference:
            assert reference["masks"].shape == (count, 1, *image.shape[1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("mask_rcnn", marks=pytest.mark.full), "retinanet", "ssdlite"])
def test_torchscript(kind: str, images: list[Tensor], tmp_path: Path) -> None:
    """The file of the fused model finds the same."""
    fused = make(kind).fuse()
    torch.jit.script(fused).save(tmp_path / "model.pt")
    _, found = torch.jit.load(tmp_path / "model.pt")(images)
    assert all(len(x["boxes"]) for x in found)
    torch.testing.assert_close(found, fused(images), rtol=1e-5, atol=1e-4)


def test_boxes_have_32_bits_under_autocast(images: list[Tensor]) -> None:
    """16 bits would round their corners to pixels."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = make("retinanet").eval()(images)
    assert all(x["boxes"].dtype == torch.float32 and x["boxes"].isfinite().all() for x in found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_detectors_of_16_bits(model: nn.Module, images: list[Tensor], dtype: torch.dtype) -> None:
    """Boxes, scores and masks have 32 bits: the heads' outputs alone are rounded."""
    expected = model.eval()(images)
    found = model.fuse().to(dtype)([image.to(dtype) for image in images])
    for reference, half in zip(expected, found, strict=True):
        assert len(half["boxes"]) > 0
        assert all(
            half[name].dtype == torch.float32 and half[name].isfinite().all() for name in reference.keys() - {"labels"}
        )
        count = min(len(half["scores"]), len(reference["scores"]))
        torch.testing.assert_close(half["scores"][:count], reference["scores"][:count], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_16_bits_are_pasted_to_the_pixel(dtype: torch.dtype) -> None:
    """A column beyond 256 has no number of its own in bfloat16, nor one beyond 2048 in float16."""
    masks, boxes = torch.rand(2, 1, 28, 28).to(dtype), torch.tensor([[2950.3, 3.2, 2990.7, 40.1], [300.1, 2, 351.4, 9]])
    pasted = paste_masks(masks, boxes, (48, 3000))
    torch.testing.assert_close(pasted, paste_masks(masks.float(), boxes, (48, 3000)))
    assert paste_masks(masks.double(), boxes, (48, 3000)).dtype == torch.float64


def test_images_without_proposals(images: list[Tensor]) -> None:
    """Every proposal lies outside its image, is clipped to nothing, and is dropped."""
    model = make("mask_rcnn").eval()
    predictor = model.rpn.head.bbox_pred
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]).repeat(3))
        found = model(images)
    for image, result in zip(images, found, strict=True):
        assert result["boxes"].shape == (0, 4)
        assert len(result["scores"]) == len(result["labels"]) == 0
        assert result["masks"].shape == (0, 1, *image.shape[1:])


def test_initial_values() -> None:
    """As published; the spread is measured on at least 2,000 values."""
    mask, retina, ssd = (make(kind) for kind in DETECTORS)
    spread = {
        mask.rpn.head.conv[0][0]: 0.01,
        mask.roi_heads.box_predictor.cls_score: 0.01,
        mask.roi_heads.box_predictor.bbox_pred: 0.001,
        mask.roi_heads.box_head.fc7: math.sqrt(2 / 2048),
        mask.roi_heads.mask_head[0][0]: math.sqrt(2 / (9 * 256)),
        mask.roi_heads.mask_predictor.upsample: math.sqrt(2 / (4 * 256)),
        mask.backbone.neck.output[0]: math.sqrt(2 / (2 * 9 * 256)),
        mask.backbone.neck.upsample[0]: math.sqrt(2 / (4 * 256)),
        retina.backbone.neck.coarser[0]: math.sqrt(2 / (9 * (32 + 256))),
        retina.head.classification_head.cls_logits: 0.01,
        retina.head.regression_head.conv[3][0]: 0.01,
        ssd.head.classification_head.module_list[2][0][0]: 0.001,
        ssd.backbone.neck.levels[0][0][0]: 0.03,
    }
    for layer, expected in spread.items():
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.08), layer
        if layer.bias is not None and layer is not retina.head.classification_head.cls_logits:
            assert not layer.bias.any()
    assert retina.head.classification_head.cls_logits.bias.unique().item() == pytest.approx(-math.log(99))
    norm = ssd.head.regression_head.module_list[0][0][1]
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)


def test_levels_follow_the_strides_of_the_backbone() -> None:
    grey = {"image_mean": [0.5], "image_std": [0.5], "min_size": 28, "max_size": 28}
    assert make("mask_rcnn").backbone.strides == [4, 8, 16, 32, 64]
    assert make("retinanet").backbone.strides == [8, 16, 32, 64, 128]
    assert downstream.ssdlite("b1", 4).backbone.strides == [16, 32, 64, 107, 160, 320]
    nano = downstream.mask_rcnn("nano", 4, **grey).eval()
    assert nano.backbone.strides == [4, 8, 16]
    with torch.no_grad():
        (found,) = nano([torch.rand(1, 28, 28)])
    assert found["masks"].shape[2:] == (28, 28)
    with pytest.raises(ValueError, match=r"^image_mean: expected a value for each of the 1 channels, got None"):
        downstream.mask_rcnn("nano", 4)


def test_norm_eval_follows_the_pretrained_backbone() -> None:
    """Published: statistics are frozen with weights of ImageNet. Without weights there are none to freeze."""

    def trained(model: nn.Module) -> set[bool]:
        return {m.training for m in model.train().backbone.body.modules() if isinstance(m, _BatchNorm)}

    grey = {"image_mean": [0.5], "image_std": [0.5], "num_classes": 4}
    assert trained(downstream.retinanet("nano", pretrained_backbone=True, **grey)) == {False}
    assert trained(downstream.ssdlite("nano", pretrained_backbone=True, **grey)) == {True}
    assert trained(make("retinanet")) == {True}
    extractor = mobilemamba.feature_extractor("b1", norm_eval=True, **SMALL)
    assert trained(downstream.retinanet(extractor)) == {False}


def test_matcher_gives_low_quality_matches_to_their_ground_truth() -> None:
    truth = torch.tensor([[0.0, 0, 100, 100], [0, 0, 10, 10], [200, 200, 201, 201]])
    boxes = torch.tensor([[0.0, 0, 60, 60], [0, 0, 20, 20], [20, 20, 40, 40], [0, 0, 99, 99]])
    iou = box_iou(truth, boxes)
    assert Matcher(0.5, 0.3, least=0.2)(iou).tolist() == [-2, 1, -1, 0]
    assert Matcher(0.5, 0.3, least=0.3)(iou).tolist() == [-2, -1, -1, 0]
    # two boxes are equally good for both ground truths: the later one has them, or the first box only
    twice = torch.tensor([[0.4, 0.4, 0.1], [0.4, 0.4, 0.0]])
    assert Matcher(0.5, 0.3, least=0.0)(twice).tolist() == [1, 1, -1]
    assert Matcher(0.5, 0.3, least=0.0, all_best=False)(twice).tolist() == [1, -2, -1]


def published_file(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A state dict with the published keys and random values: mmdetection's neck and heads, the classifier's T2."""
    own = model.state_dict()
    (t2,) = (case for case in small_cases() if case.name == "T2")
    state_dict = {f"backbone.{key}": value for key, value in t2.state_dict().items()}
    for key in Case.small(name).keys:
        reference = own[rename(model, key)]
        state_dict[key] = torch.rand(reference.shape) if reference.is_floating_point() else torch.tensor(7)
    return state_dict


def test_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as mmengine writes it, with logs of a class that is not installed; the model has two of three stages."""
    model = downstream.ssdlite("t2", 81)
    state_dict = published_file(model, "ssdlite")
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    history = type("HistoryBuffer", (), {"__module__": name, "__qualname__": "HistoryBuffer"})
    sys.modules[name].HistoryBuffer = history  # type: ignore[attr-defined]
    log = history()
    log.max_length, log._log_history = 10, np.array([0.5, 0.25])
    path = tmp_path / "epoch_120.pth"
    meta = {"meta": {"epoch": 120}, "message_hub": {"log_scalars": {"train/loss": log}}}
    torch.save({**meta, "state_dict": state_dict}, path)
    monkeypatch.undo()
    downstream.load_published(model, path)
    own = model.state_dict()
    bias, published = own["head.classification_head.module_list.3.1.bias"], state_dict["bbox_head.cls_convs.3.1.bias"]
    assert torch.equal(bias.view(6, 81)[:, 0], published.view(6, 81)[:, 80])  # the background
    assert torch.equal(bias.view(6, 81)[:, 1:], published.view(6, 81)[:, :80])
    assert torch.equal(
        own["backbone.neck.levels.3.2.0.weight"], state_dict["neck.extra_layers.3.1.pointwise_conv.conv.weight"]
    )
    assert torch.equal(
        own["backbone.body.body.patch_embed.0.conv.weight"], state_dict["backbone.patch_embed.0.c.weight"]
    )
    assert own["backbone.neck.levels.0.0.1.num_batches_tracked"] == 7


def test_published_file_that_does_not_fit(tmp_path: Path) -> None:
    model = downstream.ssdlite("t2", 81)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state_dict = published_file(model, "ssdlite")
    key = "bbox_head.cls_convs.3.1.bias"

    def refused(given: object, message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message) as caught:
            downstream.load_published(model, given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    missing = {name: value for name, value in state_dict.items() if name != key}
    refused(missing, r"do not fit the model; 1 missing: head\.classification_head\.module_list\.3\.1\.bias$")
    refused({**state_dict, "neck.new": torch.zeros(1)}, r"; 1 unexpected: neck\.new$")
    refused(
        {**state_dict, key: torch.zeros(12)}, r"; 1 mis-shaped: .*module_list\.3\.1\.bias \[12\] instead of \[486\]$"
    )
    refused({**state_dict, "backbone.blocks1.0.new": torch.zeros(1)}, r"; 1 unexpected: .*blocks\.0\.new$")
    refused({"meta": 1}, r"^expected a state dict of tensors$")
    refused(tmp_path / "none.pth", r"none\.pth: no such checkpoint file$", FileNotFoundError)
    (tmp_path / "page.pth").write_text("<html>")
    refused(tmp_path / "page.pth", r"page\.pth: expected a checkpoint")
    with pytest.raises(ValueError, match=r"^model: expected one of MaskRCNN, .*, got Linear$"):
        downstream.load_published(nn.Linear(1, 1), state_dict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"boxes": torch.ones(2, 3)},
            r"targets\[0\]\['boxes'\]: expected floating-point values of shape \(N, 4\), got",
        ),
        ({"boxes": torch.ones(2, 4)}, r"targets\[0\]\['boxes'\]: expected x1 < x2 and y1 < y2, got \[1\.0, .*\] at 0$"),
        (
            {"labels": torch.tensor([1])},
            r"targets\[0\]\['labels'\]: expected int64 of shape \(2,\), one for each box, got",
        ),
        (
            {"labels": torch.tensor([1, 4])},
            r"targets\[0\]\['labels'\]: expected 1 to 3 \(0 is the background\), got 4$",
        ),
        (
            {"labels": torch.tensor([0, 1])},
            r"targets\[0\]\['labels'\]: expected 1 to 3 \(0 is the background\), got 0$",
        ),
        ({"labels": torch.ones(2)}, r"targets\[0\]\['labels'\]: expected int64"),
        (
            {"masks": torch.ones(2, 70, 50)},
            r"targets\[0\]\['masks'\]: expected the shape \(2, 50, 70\), one for each box",
        ),
        ({"masks": None}, r"targets\[0\]: expected a tensor 'masks', got NoneType$"),
    ],
)
def test_bad_targets(
    images: list[Tensor], targets: list[dict[str, Tensor]], change: dict[str, Tensor], message: str
) -> None:
    model = MODELS.setdefault("mask_rcnn", make("mask_rcnn")).train()
    targets[0] |= change
    if change.get("boxes", torch.ones(1, 4)).shape[1] != 4:  # torchvision's own check comes first
        message = r"Expected target boxes to be a tensor of shape \[N, 4\]"
    with pytest.raises((ValueError, AssertionError), match=message) as caught:
        model(images, targets)
    assert "\n" not in str(caught.value)


MODELS: dict[str, nn.Module] = {}


def test_bad_images(images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
    model = MODELS.setdefault("mask_rcnn", make("mask_rcnn"))
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got none$"):
        model.eval()([])
    for image in (torch.rand(1, 50, 70), torch.zeros(3, 50, 70, dtype=torch.uint8), torch.rand(3, 0, 70)):
        with pytest.raises(
            ValueError, match=r"^images\[1\]: expected floating-point values \(0\.\.1\) of shape \(3, heig"
        ):
            model.eval()([images[0], image])
    with pytest.raises(ValueError, match=r"^targets: expected one for each of the 2 images, got 1$"):
        model.train()(images, targets[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yolo"}, r"^kind: expected one of mask_rcnn, .*, got 'yolo'$"),
        ({"num_classes": 1}, r"^num_classes: expected an integer of at least 2, got 1$"),
        ({"backbone": nn.Identity()}, r"^backbone: expected the name of a preset or a FeatureExtractor, got Identity$"),
        ({"backbone": "b9"}, r"^unknown model 'b9'"),
        ({"backbone_options": {"stages": (1, 2)}}, r"^backbone: expected feature maps of 3 stages, got 2$"),
        ({"backbone_options": {"patch_strides": (3, 3)}}, r"^backbone: expected a first stride that is a power of two"),
        ({"min_size": 0}, r"^min_size: expected an integer of at least 1, got 0$"),
        ({"min_size": "a"}, r"^min_size: expected an integer of at least 1, got 'a'$"),
        ({"min_size": 64.5}, r"^min_size: expected an integer of at least 1, got 64\.5$"),
        ({"score_thresh": "a"}, r"^score_thresh: expected a number of at least 0, got 'a'$"),
        ({"nms_thresh": 1.5}, r"^nms_thresh: expected a number from 0 to 1, got 1\.5$"),
        (
            {"kind": "mask_rcnn", "box_score_thresh": None},
            r"^box_score_thresh: expected a number of at least 0, got No",
        ),
        ({"kind": "mask_rcnn", "rpn_batch_size_per_image": 0}, r"^rpn_batch_size_per_image: expected an integer"),
        ({"kind": "ssdlite", "detections_per_img": 1.5}, r"^detections_per_img: expected an integer"),
        ({"image_std": [0, 0, 0]}, r"^image_mean and image_std: expected finite means and positive deviations, got "),
        ({"image_mean": ["a", 0, 0]}, r"^image_mean: expected a number"),
        ({"image_std": 1.0}, r"^image_std: expected a value for each of the 3 channels, got 1\.0$"),
        ({"image_std": (1.0,)}, r"^image_std: expected a value for each of the 3 channels, got \(1\.0,\)$"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    given = {"kind": "retinanet", "backbone": "b1", "num_classes": 4, **options}
    extra = given.setdefault("backbone_options", SMALL) if isinstance(given["backbone"], str) else None
    assert extra is None or isinstance(extra, dict)
    with pytest.raises(ValueError, match=message):
        downstream.create_model(**given)  # type: ignore[arg-type]


def test_stored_options_that_do_not_fit(tmp_path: Path) -> None:
    """The message names the file."""
    options = {"backbone_options": SMALL, "size": 64}
    stored = downstream.DownstreamCheckpoint({}, "ssdlite", "b1", 4, options)
    path = tmp_path / "model.pt"
    for wrong, message in (
        ({"colour": 1}, r".*unexpected keyword argument 'colour'$"),
        ({"nms_thresh": -1}, "nms_thresh: expected a number of at least 0, got -1$"),
        ({}, r"the weights do not fit a ssdlite on b1; \d+ missing: backbone\."),
    ):
        downstream.save_model(path, dataclasses.replace(stored, options={**options, **wrong}))
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
            downstream.open_model(path)


@pytest.mark.parametrize("format", ["mobilemamba-downstream", "mobilemamba-training"])
def test_a_detectors_file_is_no_classifiers(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save({"format": format, "version": 1, "meta": {"kind": "ssdlite"}, "state_dict": {}, "ema": {}}, path)
    for command in (["classify", "x.png"], ["export", "--format", "onnx", str(tmp_path / "x.onnx")]):
        assert cli.main([*command, "--checkpoint", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"mobilemamba {command[0]}: error: {path}: expected a classifier's weights, got a detector or segmenter "
            "(ssdlite): use mobilemamba detect or segment, in Python mobilemamba.downstream.open_model\n"
        )


def test_export_refuses_a_detector(model: nn.Module, tmp_path: Path) -> None:
    preprocessing = Preprocessing(resize=64, crop=64)
    message = r"^model: expected a classifier or a segmenter, got \w+; a detector is written by torch\.jit\.script\("
    with pytest.raises(ValueError, match=message):
        mobilemamba.export(model, tmp_path / "x.pt", "torchscript", preprocessing=preprocessing)  # type: ignore[arg-type]


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if re.match(r"torchvision(\.|$)|mobilemamba\.downstream(\.|$)", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    import mobilemamba.downstream as fresh

    for kind in DETECTORS:
        with pytest.raises(
            ImportError, match=r"^a detector needs torchvision: pip install 'mobilemamba\[downstream\]'"
        ):
            fresh.create_model(kind)
    monkeypatch.setattr(mobilemamba, "downstream", downstream)
