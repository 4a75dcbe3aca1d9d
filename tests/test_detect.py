"""The commands detect and segment: what they print, write and draw."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mobilemamba import cli, downstream
from mobilemamba.cli.drawing import Drawings, class_color, class_colors
from mobilemamba.data.masks import run_lengths
from mobilemamba.downstream.checkpoint import DownstreamCheckpoint, Preparation, read_checkpoint, save_model

pytest.importorskip("torchvision", reason="needs torchvision: pip install 'mobilemamba[downstream]'")
from mobilemamba.downstream import transform

BACKBONE = {"in_chans": 3, "widths": (16, 24, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and checkpoints with random weights whose every score counts."""
    root = tmp_path_factory.mktemp("detect")
    random = np.random.default_rng(0)
    for name, shape in (("a.jpg", (48, 64, 3)), ("sub/a.png", (40, 40)), ("b.png", (64, 33, 3))):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(root / name)
    (root / "bad.png").write_bytes(b"no image")
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 128, "backbone_options": BACKBONE, "pyramid_channels": 16}
    few = {"box_score_thresh": 0.0, "box_detections_per_img": 3, "rpn_post_nms_top_n_test": 20}
    for kind, options in (
        ("retinanet", {**sizes, "score_thresh": 0.0, "detections_per_img": 5}),
        ("mask_rcnn", {**sizes, **few}),
        ("semantic_fpn", {"backbone_options": BACKBONE}),
    ):
        count = 3 if kind == "semantic_fpn" else 4
        model = downstream.create_model(kind, "nano", count, **options)
        labels = ["background" if kind == "semantic_fpn" else "cat", "dog", "owl"]
        prepared = Preparation(64, (0.5,) * 3, (0.2,) * 3) if count == 3 else Preparation()
        ids = None if count == 3 else [2, 5, 9]
        stored = DownstreamCheckpoint(model.state_dict(), kind, "nano", count, options, labels, ids, prepared)
        save_model(root / f"{kind}.pt", stored)
    return root


def run(capsys, *args):
    code = cli.main(list(map(str, args)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_detect_prints_json_and_draws_copies(folder, tmp_path, capsys):
    model = folder / "mask_rcnn.pt"
    code, out, err = run(
        capsys, "detect", folder / "a.jpg", folder / "sub", folder / "bad.png", "--model", model, "--threshold", 0,
        "--out", tmp_path / "new", "--json",
    )  # fmt: skip
    assert (code, err.count("\n")) == (1, 1)
    assert "bad.png: expected an image" in err
    results = json.loads(out)
    assert [result["image"] for result in results] == [str(folder / "a.jpg"), str(folder / "sub/a.png")]
    assert [result["drawing"] for result in results] == [
        str(tmp_path / "new/a.detect.png"),
        str(tmp_path / "new/a-2.detect.png"),
    ]
    for result, (height, width) in zip(results, ((48, 64), (40, 40)), strict=True):
        assert len(result["detections"]) == 3
        for found in result["detections"]:
            assert (found["label"], found["category_id"]) == {1: ("cat", 2), 2: ("dog", 5), 3: ("owl", 9)}[
                found["class"]
            ]
            assert 0 <= found["score"] <= 1
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 <= x2 <= width
            assert 0 <= y1 <= y2 <= height
            assert found["mask"]["size"] == [height, width]
            assert sum(found["mask"]["counts"]) == height * width
        with Image.open(result["image"]) as image, Image.open(result["drawing"]) as drawing:
            assert drawing.size == image.size == (width, height)
            assert not np.array_equal(np.asarray(image.convert("RGB")), np.asarray(drawing))


def test_detect_prints_a_table(folder, capsys):
    model = folder / "retinanet.pt"
    code, out, err = run(capsys, "detect", folder / "a.jpg", folder / "b.png", "--model", model, "--threshold", 0)
    assert (code, err) == (0, "")
    first, second = out.split("\n\n")
    assert first.startswith(f"{folder / 'a.jpg'}\n  ")
    assert len(second.splitlines()) == 6  # the path, and the five best
    name, score, *box = second.splitlines()[1].split()
    assert name in ("cat", "dog", "owl")
    assert score.endswith("%")
    assert len(box) == 4
    out = run(capsys, "detect", folder / "a.jpg", "--model", model, "--threshold", 1)[1]
    assert out == f"{folder / 'a.jpg'}\n  nothing found\n"


def test_segment_names_the_class_of_each_pixel(folder, tmp_path, capsys):
    args = ("segment", folder / "a.jpg", folder / "sub/a.png", "--model", folder / "semantic_fpn.pt", "--out", tmp_path)
    code, out, err = run(capsys, *args, "--json")
    assert (code, err) == (0, "")
    for result, (height, width) in zip(json.loads(out), ((48, 64), (40, 40)), strict=True):
        planes = np.asarray(Image.open(result["plane"]))
        assert planes.shape == (height, width)
        counts = {item["class"]: item["pixels"] for item in result["classes"]}
        assert counts == {i: int((planes == i).sum()) for i in np.unique(planes)}
        assert [item["pixels"] for item in result["classes"]] == sorted(counts.values(), reverse=True)
        assert all(item["label"] == ("background", "dog", "owl")[item["class"]] for item in result["classes"])
        overlay = np.asarray(Image.open(result["drawing"])).astype(int)
        image = np.asarray(Image.open(result["image"]).convert("RGB")).astype(int)
        colors = np.array([class_color(i) for i in range(3)])
        mixed = np.where((planes == 0)[..., None], image, (image + colors[planes]) // 2)  # class 0 is the background
        assert np.array_equal(overlay, mixed)
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert out.splitlines()[1].split()[1].endswith("%")


def test_only_the_background_has_no_colour():
    assert class_colors(["wall", "Background"], 2) == [class_color(0), None]  # ADE20K's class 0 is no background
    assert class_colors(None, 3) == [None, class_color(1), class_color(2)]


def test_masks_below_the_threshold_are_not_pasted(folder, capsys, monkeypatch):
    """A pasted mask has the size of the image: all 100 of a large photo would fill the memory."""
    model, pasted = folder / "mask_rcnn.pt", []
    paste = transform.paste_masks
    monkeypatch.setattr(
        transform, "paste_masks", lambda masks, *rest: (pasted.append(len(masks)), paste(masks, *rest))[1]
    )
    scores = []
    for threshold in (0, 1):
        args = ("detect", folder / "a.jpg", "--model", model, "--threshold", threshold, "--json")
        scores += [found["score"] for found in json.loads(run(capsys, *args)[1])[0]["detections"]]
    assert pasted == [3, 0] == [len(scores), 0]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("retinanet", "head.classification_head.cls_logits.bias"),
        ("mask_rcnn", "rpn.head.bbox_pred.bias"),
        ("mask_rcnn", "roi_heads.box_predictor.cls_score.bias"),
        ("mask_rcnn", "roi_heads.mask_predictor.logits.bias"),
        ("semantic_fpn", "classifier.classify.1.bias"),
    ],
)
def test_outputs_that_are_not_finite_are_refused(folder, tmp_path, capsys, kind, part):
    stored = read_checkpoint(folder / f"{kind}.pt")
    stored.state_dict[part].fill_(float("nan"))
    save_model(tmp_path / "nan.pt", stored)
    command = "segment" if kind == "semantic_fpn" else "detect"
    keep_all = ("--threshold", 0) if command == "detect" else ()
    code, out, err = run(capsys, command, folder / "a.jpg", folder / "b.png", "--model", tmp_path / "nan.pt", *keep_all)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        f"mobilemamba {command}: error: {folder / name}: expected finite outputs of the model, got nan"
        for name in ("a.jpg", "b.png")
    ]


@pytest.mark.parametrize(
    ("command", "model", "message"),
    [
        (
            "detect",
            "semantic_fpn.pt",
            "semantic_fpn.pt: expected a model for detect, got one for segment (semantic_fpn)",
        ),
        ("segment", "retinanet.pt", "retinanet.pt: expected a model for segment, got one for detect (retinanet)"),
        ("detect", "none.pt", "none.pt: no such checkpoint file"),
        ("segment", "a.jpg", "a.jpg: "),
    ],
)
def test_refusals(folder, capsys, monkeypatch, command, model, message):
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, command, "a.jpg", "--model", model, "--out", "never")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"mobilemamba {command}: error: {message}")
    assert not (folder / "never").exists()
    code, _, err = run(capsys, "detect", "a.jpg", "--model", "retinanet.pt", "--threshold", 1.5)
    assert (code, err) == (2, "mobilemamba detect: error: --threshold: expected a score from 0 to 1, got 1.5\n")


@pytest.mark.parametrize(("command", "model"), [("detect", "retinanet.pt"), ("segment", "semantic_fpn.pt")])
@pytest.mark.parametrize("below", ["", "/new"])
def test_out_that_is_a_file(folder, capsys, command, model, below):
    file = folder / "bad.png"
    code, out, err = run(capsys, command, folder / "a.jpg", "--model", folder / model, "--out", f"{file}{below}")
    assert (code, out) == (2, "")
    assert err == (
        f"mobilemamba {command}: error: --out: expected a folder, or the name of a new one, got {file}{below}: "
        f"{file} is a file\n"
    )
    assert file.read_bytes() == b"no image"


def test_run_lengths_are_those_of_coco():
    mask = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [1, 4, 1]}
    assert run_lengths(~mask) == {"size": [2, 3], "counts": [0, 1, 4, 1]}
    assert run_lengths(np.zeros((2, 3), dtype=bool)) == {"size": [2, 3], "counts": [6]}
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools: pip install 'mobilemamba[downstream]'")
    mask = np.random.default_rng(0).random((37, 23)) < 0.3
    stored = coco.frPyObjects(run_lengths(mask), 37, 23)
    assert np.array_equal(coco.decode(stored), mask)


def test_drawings_of_one_name_are_numbered(tmp_path):
    drawings = Drawings(tmp_path, ".x.png")
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    names = [drawings.save(path, pixels) for path in ("a.png", "b/a.jpg", "a-2.png", "a.gif")]
    assert [name.rpartition("/")[2] for name in names] == ["a.x.png", "a-2.x.png", "a-2-2.x.png", "a-3.x.png"]
