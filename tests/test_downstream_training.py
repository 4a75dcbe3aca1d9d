"""Detectors and segmenters in the training loop: they learn, resume to the bit, are measured, stored and exported."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import nn

from mobilemamba import cli, downstream
from mobilemamba.data import shapes
from mobilemamba.data.coco import load_coco
from mobilemamba.data.mask_folder import load_masks
from mobilemamba.downstream.checkpoint import Preparation
from mobilemamba.models.frozen import FrozenBatchNorm, freeze_statistics
from mobilemamba.training import (
    TrainConfig,
    evaluate_detector,
    evaluate_segmenter,
    learning_rate,
    parameter_groups,
    recipe,
    stored_config,
    train,
)
from mobilemamba.training.curves import read_curves
from mobilemamba.training.loop import open_data
from mobilemamba.training.processes import SyncBatchNorm, synchronize_norms
from mobilemamba.training.run import Run

pytest.importorskip("torchvision", reason="needs torchvision: pip install 'mobilemamba[downstream]'")
pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'mobilemamba[downstream]'")

CPU = torch.device("cpu")
BACKBONE = '"backbone_options": {"patch_strides": [2, 2, 2]}'
SMALL = {"widths": (16, 32, 48), "image_size": 48, "batch_size": 4, "warmup_epochs": 0.0, "lr": 2e-3, "epochs": 5}
FEW = '"rpn_pre_nms_top_n_train": 20, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8'


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    shapes.write(folder, images=8, val_images=4, size=48, seed=3)
    return folder


def config(drawn, kind: str, **options) -> TrainConfig:
    if kind in ("semantic_fpn", "deeplabv3"):
        task, data, extra = "segment", f"masks:{drawn}", ', "pyramid_channels": 16, "channels": 16'
    else:
        task, data, extra = "detect", f"coco:{drawn}", ', "pyramid_channels": 16'
        extra += f", {FEW}" if kind == "mask_rcnn" else ', "score_thresh": 0.001'
    arguments = f"{{{BACKBONE}{extra}}}"
    return TrainConfig(task=task, kind=kind, data=data, **{**SMALL, "model_options": arguments, **options})


def entries(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def retinanet(drawn, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run") / "out"
    train(config(drawn, "retinanet"), out, workers=0)
    return out


@pytest.fixture(scope="module")
def semantic_fpn(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train(config(drawn, "semantic_fpn"), out, workers=0)
    return out


def test_a_detector_learns_and_its_export_gives_the_same_boxes(drawn, retinanet, tmp_path):
    log = entries(retinanet)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert {"ema_AP", "ema_AP50", "ema_AP75"} <= log[-2].keys()
    assert {"test_AP", "test_AP50", "test_AP75"} <= log[-1].keys()
    curves = read_curves(retinanet)
    assert (curves.measure, len(curves.accuracy), curves.result) == ("AP", 5, log[-1]["test_AP"])

    model, stored = downstream.open_model(retinanet / "model.pt")
    assert (stored.task, stored.kind, stored.backbone, stored.num_classes) == ("detect", "retinanet", "nano", 5)
    assert (stored.labels, stored.category_ids) == (["circle", "square", "triangle", "star"], [1, 3, 4, 7])
    assert stored.path == retinanet / "model.pt"
    assert not model.training
    image = stored.preparation(drawn / "images/val/000000.jpg")
    fused = model.fuse()
    expected = fused([image])[0]
    assert len(expected["boxes"]) > 0
    torch.jit.script(fused).save(tmp_path / "model.ts")
    _, (found,) = torch.jit.load(tmp_path / "model.ts")([image])
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(found[name], expected[name])
    state, _ = downstream.open_model(retinanet / "last.pt")
    assert state.state_dict().keys() == model.state_dict().keys()


def test_mask_rcnn_learns(drawn, tmp_path):
    train(config(drawn, "mask_rcnn", epochs=2, batch_size=2), tmp_path / "out", workers=0)
    log = entries(tmp_path / "out")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[1] < losses[0]
    assert {"test_AP", "test_mask_AP", "test_mask_AP50"} <= log[-1].keys()


def test_a_segmenter_learns(drawn, semantic_fpn, capsys):
    log = entries(semantic_fpn)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    model, stored = downstream.open_model(semantic_fpn / "model.pt")
    assert stored.labels == ["background", "circle", "square", "triangle", "star"]
    image = stored.preparation(drawn / "images/val/000000.jpg")
    assert model(image[None])["out"].shape == (1, 5, 48, 48)

    spec = ["evaluate", "--checkpoint", str(semantic_fpn / "model.pt"), "--workers", "0", "--data"]
    assert cli.main([*spec, f"masks:{drawn}", "--json", str(semantic_fpn / "all.json")]) == 0
    out = capsys.readouterr().out
    assert f"mIoU           {log[-1]['test_mIoU']:.2%}".replace("%", " %") in out
    facts = json.loads((semantic_fpn / "all.json").read_text())
    assert facts["pixel_accuracy"] == log[-1]["test_pixel_accuracy"]
    assert [row["label"] for row in facts["classes"]] == stored.labels
    assert cli.main([*spec, f"coco:{drawn}"]) == 2
    assert "expected a model for coco:" in capsys.readouterr().err
    assert cli.main([*spec, f"masks:{drawn}", "--distilled"]) == 2
    assert "--distilled is for classifiers; it would have no effect" in capsys.readouterr().err


def test_evaluate_prints_the_ap_of_a_detector(drawn, retinanet, capsys):
    command = ["evaluate", "--checkpoint", str(retinanet / "model.pt"), "--workers", "0", "--data", f"coco:{drawn}"]
    assert cli.main([*command, "--csv", str(retinanet / "classes.csv")]) == 0
    value = f"{entries(retinanet)[-1]['test_AP']:.2%}".replace("%", " %")
    out = capsys.readouterr().out
    assert f"AP             {value}" in out
    assert "(cpu, float32, batches of 8)" in out
    header, *rows = (retinanet / "classes.csv").read_text().splitlines()
    assert header == "label,AP,AP50,AP75"
    assert [row.split(",")[0] for row in rows] == ["circle", "square", "triangle", "star"]


@pytest.mark.parametrize("kind", ["mask_rcnn", "semantic_fpn"])
def test_a_run_that_stopped_in_an_epoch_goes_on_to_the_bit(drawn, tmp_path, kind):
    options = config(drawn, kind, epochs=1, batch_size=2, photometric=True, ema_decay=0.5)
    dataset = open_data(options, False)
    whole = Run(options, dataset, CPU)
    for _ in whole.train_epoch():
        pass
    stopped = Run(options, dataset, CPU)
    steps = stopped.train_epoch()
    next(steps)
    next(steps)
    stopped.save(tmp_path / "last.pt")
    steps.close()
    resumed = Run(options, dataset, CPU, resume=True)
    resumed.load(tmp_path / "last.pt")
    assert (resumed.epoch, resumed.step) == (0, 2)
    for _ in resumed.train_epoch():
        pass
    assert resumed.entry["loss"] == whole.entry["loss"]
    for one, other in ((whole.model, resumed.model), (whole.ema.module, resumed.ema.module)):
        values = other.state_dict()
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, values[name]), name


def torchrun(out, options: TrainConfig, *more: str) -> list[dict]:
    """The log of a run in two processes on the CPU."""
    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    words = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in given.items()
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mobilemamba", "train", *words, *more, "--out", str(out), "--device", "cpu", "--workers", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return entries(out)


def test_two_processes_segment_as_one(drawn, tmp_path):
    options = config(drawn, "semantic_fpn", epochs=2, lr=1e-4)
    train(replace(options, sync_batchnorm=True, flip=False), tmp_path / "one", workers=0)
    first, *log = torchrun(tmp_path / "two", options, "--sync-batchnorm", "--no-flip")
    assert first["processes"] == 2
    one = entries(tmp_path / "one")[1:]
    assert len(log) == len(one) == 3  # two epochs and the result
    for name in ("loss", "ema_mIoU", "test_mIoU"):
        assert [e[name] for e in log if name in e] == pytest.approx([e[name] for e in one if name in e], rel=1e-3)


@pytest.mark.parametrize("kind", ["retinanet", pytest.param("mask_rcnn", marks=pytest.mark.full)])
def test_two_processes_detect(drawn, tmp_path, kind):
    """One log and one file; each process measures a share of the images, and the AP is that of all."""
    _, *log = torchrun(tmp_path / "two", config(drawn, kind, epochs=2))
    assert len(log) == 3
    model, _ = downstream.open_model(tmp_path / "two/model.pt")
    split = load_coco(drawn, masks=kind == "mask_rcnn").test
    measures = evaluate_detector(model, split, 2).measures
    assert {f"test_{name}": value for name, value in measures.items()} == pytest.approx(
        {name: value for name, value in log[-1].items() if name.startswith("test_")}
    )


def test_accumulated_parts_are_the_whole_batch(drawn):
    """The losses of RetinaNet are divided by the positives of a part, so two equal halves have the loss of one."""
    dataset = open_data(config(drawn, "retinanet"), False)
    unknown = config(drawn, "retinanet", model_options='{"neck": 1}')
    with pytest.raises(ValueError, match=r"model_options: \{\"neck\": 1\}: .*unexpected keyword argument 'neck'"):
        Run(unknown, dataset, CPU)
    headed = config(drawn, "retinanet", model_options='{"backbone_options": {"distillation": true}}')
    with pytest.raises(ValueError, match=r"model_options: .*: feature_extractor: expected no distillation"):
        Run(headed, dataset, CPU)
    assert "distillation" not in config(drawn, "retinanet", pretrained="distilled").backbone_options
    runs = [Run(config(drawn, "retinanet", norm_eval=True, accumulate=n), dataset, CPU) for n in (1, 2)]
    picture, target = dataset.train.image(0), dataset.train.target(0)
    images, targets = zip(*[runs[0].task.transform(picture, target) for _ in range(1)] * 2, strict=True)
    parts = [run.task.parts(list(images), list(targets)) for run in runs]
    assert [len(part) for part in parts] == [1, 2]
    losses = [sum(float(run.loss(*part).detach()) for part in each) for run, each in zip(runs, parts, strict=True)]
    assert losses[1] / 2 == pytest.approx(losses[0], rel=1e-5)


class Knowing(nn.Module):
    """A detector that finds the objects it is told, moved by ``shift`` pixels."""

    def __init__(self, targets: list[dict], shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.targets, self.shift = targets, shift

    def fuse(self) -> "Knowing":
        return Knowing(list(self.targets), self.shift)

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        found = [self.targets.pop(0) for _ in images]
        return [
            {
                "boxes": target["boxes"] + self.shift,
                "labels": target["labels"],
                "scores": torch.linspace(1, 0.5, len(target["labels"])),
                "masks": target["masks"][:, None].float(),
            }
            for target in found
        ]


def test_average_precision(drawn):
    split = load_coco(drawn, masks=True).test
    targets = [split.target(i) for i in range(4)]
    right = evaluate_detector(Knowing(targets), split, 3)
    assert set(right.measures) == {"AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"}
    assert all(value == pytest.approx(1) for value in right.measures.values())
    assert (right.count, right.bad) == (4, 0)
    present = set(torch.cat([target["labels"] for target in targets]).tolist())
    assert [row["AP"] is not None for row in right.classes] == [label in present for label in range(1, 5)]
    moved = evaluate_detector(Knowing(targets, 2.0), split, 3).measures
    assert 0 < moved["AP"] < moved["AP50"]
    assert moved["mask_AP"] == pytest.approx(1)
    empty = {name: values[:0] for name, values in targets[0].items()}
    nothing = evaluate_detector(Knowing([empty] * 4), split, 3).measures
    assert set(nothing.values()) == {0.0}
    boxes = Knowing(targets)
    boxes.fuse = lambda: boxes
    boxes.register_forward_hook(lambda *call: [{k: v for k, v in found.items() if k != "masks"} for found in call[-1]])
    with pytest.raises(ValueError, match=r"val\.json: expected a detector of masks for a split with masks, got one of"):
        evaluate_detector(boxes, split, 3)
    others = [{**target, "labels": target["labels"] + 4} for target in map(split.target, range(4))]
    with pytest.raises(ValueError, match=r"val\.json: expected a detector of its 4 classes, got label [5-8]$"):
        evaluate_detector(Knowing(others), split, 3)


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn", "ssdlite", "semantic_fpn"])
def test_evaluation_refuses_outputs_that_are_not_finite(drawn, kind):
    """NaN is above no threshold, and would be an image without objects, or class 0."""
    options = {"size": 320} if kind == "ssdlite" else {} if kind == "semantic_fpn" else {"min_size": 48, "max_size": 48}
    model = downstream.create_model(kind, "nano", 5, backbone_options={"in_chans": 3}, **options)
    next(model.parameters()).data.fill_(float("nan"))
    if kind == "semantic_fpn":
        evaluation = partial(evaluate_segmenter, model, load_masks(drawn).test, Preparation(48, (0.5,) * 3, (0.5,) * 3))
    else:
        evaluation = partial(evaluate_detector, model, load_coco(drawn).test)
    with pytest.raises(FloatingPointError, match="expected finite outputs of the model, got nan"):
        evaluation(2)


class Told(Knowing):
    """A segmenter that answers with masks, of which ``wrong`` becomes class 0."""

    def __init__(self, targets: list, wrong: int = -1) -> None:
        super().__init__(targets, wrong)

    def fuse(self) -> "Told":
        return Told(list(self.targets), self.shift)

    def forward(self, images: torch.Tensor) -> dict:
        masks = torch.stack([self.targets.pop(0)["mask"].long() for _ in images])
        masks[masks == self.shift] = 0
        return {"out": nn.functional.one_hot(masks, 5).permute(0, 3, 1, 2).float()}


def test_mean_iou(drawn):
    split = load_masks(drawn).test
    targets = [split.target(i) for i in range(4)]
    preparation = Preparation(48, (0.5,) * 3, (0.5,) * 3)
    right = evaluate_segmenter(Told(targets), split, preparation, 3)
    assert right.measures == {"mIoU": 1.0, "pixel_accuracy": 1.0}
    pixels = torch.stack([target["mask"] for target in targets]).flatten().long().bincount(minlength=5)
    assert right.confusion.diagonal().tolist() == pixels.tolist()
    wrong = int(pixels[1:].argmax()) + 1
    result = evaluate_segmenter(Told(targets, wrong), split, preparation, 3)
    assert result.iou[wrong] == 0.0
    assert result.iou[0] == pytest.approx(float(pixels[0] / (pixels[0] + pixels[wrong])))
    assert result.measures["pixel_accuracy"] == pytest.approx(float(1 - pixels[wrong] / pixels.sum()))
    with pytest.raises(ValueError, match="val: expected a segmenter of 6 classes, got 5"):
        evaluate_segmenter(Told(targets), replace(split, labels=(*split.labels, "more")), preparation, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detect"}, "data: expected coco:DIR for --task detect, got 'fashion-mnist'"),
        ({"data": "coco:x"}, "data: expected folder:DIR, fashion-mnist or digits for --task classify, got 'coco:x'"),
        ({"task": "detect", "data": "coco:x", "kind": "pspnet"}, "kind must be mask_rcnn or retinanet or ssdlite for"),
        ({"task": "detect", "data": "coco:x", "erase": 0.5}, "erase is for --task classify; it would have no effect"),
        ({"task": "detect", "data": "coco:x", "compile": True}, "compile is for --task classify or segment"),
        ({"task": "segment", "data": "masks:x", "iou_crop": True}, "iou_crop is for --task detect"),
        ({"norm_eval": True}, "norm_eval is for --task detect or segment"),
        ({"task": "detect", "data": "coco:x", "scale": (2.0, 0.5)}, "scale must be a smallest and a largest factor"),
        ({"task": "detect", "data": "coco:x", "model_options": "[1"}, "model_options: expected a JSON object, got"),
        (
            {"task": "detect", "data": "coco:x", "model_options": '{"min_size": 640}'},
            "^model_options: expected no min_size: --image-size determines it$",
        ),
        (
            {"task": "segment", "data": "masks:x", "model_options": '{"backbone_options": {"frozen_stages": 1}}'},
            "^model_options: expected no frozen_stages: --frozen-stages determines it$",
        ),
        (
            {"task": "segment", "data": "masks:x", "model_options": '{"backbone_options": [1]}'},
            r"^model_options: backbone_options: expected a JSON object, got \(1,\)$",
        ),
    ],
)
def test_options_of_other_tasks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_published_recipes():
    for name in ("retinanet", "mask-rcnn", "ssdlite", "semantic-fpn", "deeplabv3", "pspnet"):
        options = recipe(f"published-{name}")
        data = {"detect": "coco:x", "segment": "masks:x"}[options["task"]]
        made = TrainConfig(**{**options, "data": data})
        assert made.kind == name.replace("-", "_")
        assert made.schedule == "late-cosine"
    assert made.image_size == 512
    for name in ("retinanet", "mask-rcnn", "semantic-fpn"):
        options = recipe(f"shapes-{name}")
        made = TrainConfig(**options, data="masks:x" if options["task"] == "segment" else "coco:x")
        assert (made.kind, made.image_size) == (name.replace("-", "_"), 128)
        assert made.arguments["pyramid_channels"] < 256
    assert TrainConfig(**{**recipe("published-ssdlite"), "data": "coco:x"}).image_size == 320


@pytest.mark.parametrize("text", ["unexpected keyword argument 'neck'", "unsupported operand types"])
def test_other_type_errors_are_not_told_as_model_options(drawn, monkeypatch, text):
    def broken(*args, **options):
        raise TypeError(text)

    monkeypatch.setattr(downstream, "create_model", broken)
    with pytest.raises(TypeError, match=text):
        Run(config(drawn, "retinanet"), open_data(config(drawn, "retinanet"), False), CPU)


def test_the_late_cosine():
    rates = [learning_rate(step, 100, 10, 1.0, "late-cosine") for step in range(101)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[10:51] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_groups_with_another_rate_for_heads():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = parameter_groups(model, 0.05, head_lr=10.0)
    assert [(len(group["params"]), group["weight_decay"], group["lr_scale"]) for group in groups] == [
        (1, 0.05, 1.0),
        (1, 0.0, 1.0),
        (1, 0.05, 10.0),
        (1, 0.0, 10.0),
    ]
    decayed, exempt = parameter_groups(model, 0.05, decay_vectors=True)
    assert (len(decayed["params"]), len(exempt["params"])) == (4, 0)
    with pytest.raises(ValueError, match="head_lr: expected a model with parameters to train in rpn or roi, got none"):
        parameter_groups(model, 0.05, head_lr=10.0, heads=("rpn", "roi"))


@pytest.mark.parametrize("kind", ["semantic_fpn", "deeplabv3", "retinanet", "mask_rcnn", "ssdlite"])
def test_the_rate_of_the_head_is_that_of_all_but_backbone_and_pyramid(drawn, kind):
    options = '{"channels": 16}' if kind == "deeplabv3" else ""
    run = Run(config(drawn, kind, head_lr=10.0, model_options=options), open_data(config(drawn, kind), False), CPU)
    faster = {id(each) for group in run.optimizer.param_groups if group["lr_scale"] == 10 for each in group["params"]}
    named = {name for name, parameter in run.model.named_parameters() if id(parameter) in faster}
    assert named == {name for name, _ in run.model.named_parameters() if not name.startswith("backbone.")}


def test_heads_with_a_norm_behind_a_mean_need_two_images(drawn):
    dataset = open_data(config(drawn, "semantic_fpn"), False)
    assert Run(config(drawn, "semantic_fpn", batch_size=1), dataset, CPU).batch_size == 1
    with pytest.raises(ValueError, match="BatchNorm needs at least 2 images in each part of a batch, got 1"):
        Run(config(drawn, "deeplabv3", batch_size=1, model_options='{"channels": 16}'), dataset, CPU)


def test_frozen_norms_stay_frozen_where_norms_are_synchronized():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(3)))
    freeze_statistics(model[1])
    synchronize_norms(model, CPU)
    assert (type(model[0]), type(model[1][0])) == (SyncBatchNorm, FrozenBatchNorm)
    assert not model.train()[1][0].training


@pytest.mark.parametrize("kind", ["semantic_fpn", "retinanet"])
def test_pretrained_backbones_are_restored_with_their_normalisation(drawn, tmp_path, kind):
    few = '{"pyramid_channels": 16}'
    options = config(drawn, kind, widths=None, pretrained="plain", epochs=1, model_options=few)
    dataset = open_data(options, False)
    run = Run(options, dataset, CPU)
    assert run.task.mean == pytest.approx((0.286,) * 3)
    run.save(tmp_path / "last.pt")
    again = Run(options, dataset, CPU, resume=True)
    again.load(tmp_path / "last.pt")
    assert again.task.preparation == run.task.preparation
    assert again.task.meta() == run.task.meta()
    if kind == "retinanet":  # the average, which is evaluated and stored, has a transform of its own
        for model in (again.model, again.ema.module):
            assert (model.transform.image_mean, model.transform.image_std) == (
                pytest.approx(list(run.model.transform.image_mean)),
                pytest.approx(list(run.model.transform.image_std)),
            )
    assert TrainConfig(**json.loads(json.dumps(vars(replace(options, image_size=48))))).image_size == 48


def test_other_files_are_refused(tmp_path, retinanet, drawn):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a detector or segmenter that this package trained"):
        downstream.open_model(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint file"):
        downstream.open_model(tmp_path / "none.pt")
    content = torch.load(retinanet / "model.pt", weights_only=True)
    del content["state_dict"]["head.classification_head.cls_logits.bias"]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt: the weights do not fit a retinanet on nano; 1 missing: head"):
        downstream.open_model(tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"the run has other data: coco:.* \(now masks:"):
        stored_config(retinanet, data=f"masks:{drawn}")
