"""The effective receptive field: known networks have the field that arithmetic says; the commands print and draw it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mobilemamba import cli
from mobilemamba.data import Preprocessing
from mobilemamba.data.samples import sample_images
from mobilemamba.training.receptive_field import Square, effective_receptive_field, square_that_holds

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def convolutions(count: int) -> nn.Module:
    """3x3 convolutions with weights of one."""
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(count)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("count", "taps"), [(1, [1, 1, 1]), (2, [1, 2, 3, 2, 1])])
def test_the_field_of_convolutions(count: int, taps: list[int]) -> None:
    field = effective_receptive_field(convolutions(count), [torch.ones(2, 1, 9, 9), torch.ones(1, 1, 9, 9)])
    expected, side = torch.zeros(9, 9, dtype=torch.float64), len(taps)
    weights = torch.tensor(taps, dtype=torch.float64)
    expected[4 - count : 5 + count, 4 - count : 5 + count] = weights.outer(weights)
    assert torch.equal(field, expected)
    assert square_that_holds(field, 1.0) == Square(4 - count, side, side**2 / 81)


def test_squares() -> None:
    field = effective_receptive_field(convolutions(2), [torch.ones(1, 1, 9, 9)])
    sides = {share: square_that_holds(field, share).side for share in (0.1, 0.2, 0.5, 0.7, 0.99)}
    assert sides == {0.1: 1, 0.2: 2, 0.5: 3, 0.7: 4, 0.99: 5}  # 9, 25, 49, 64 and 81 of 81
    assert square_that_holds(torch.ones(4, 4), 0.5) == Square(1, 3, 9 / 16)  # around the pixel (2, 2)
    assert square_that_holds(torch.ones(4, 4), 1.0) == Square(0, 4, 1.0)


def test_relu_of_the_map_and_absolute_gradients() -> None:
    layer = nn.Conv2d(1, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, -5.0]).view(2, 1, 1, 1))
    signs = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)  # each leaves one of the channels
    field = effective_receptive_field(layer, [signs.expand(2, 1, 3, 3)])
    assert field[1, 1] == 4  # the mean of 3 and |-5|
    assert field.sum() == 4


@pytest.mark.parametrize(
    ("features", "images", "error", "message"),
    [
        (nn.Identity(), [], ValueError, "images: expected at least one, got none"),
        (nn.Flatten(), [torch.ones(1, 1, 3, 3)], ValueError, r"shape \(batch, C, H, W\), got \[1, 9\]"),
        (nn.Identity(), [-torch.ones(1, 1, 3, 3)], ValueError, "got zero for each pixel"),
        (lambda x: x * torch.inf, [torch.ones(1, 1, 3, 3)], FloatingPointError, "finite gradient"),
    ],
)
def test_fields_that_there_are_not(features, images, error, message) -> None:
    with pytest.raises(error, match=message):
        effective_receptive_field(features, images)


@pytest.mark.parametrize(
    ("field", "share", "message"),
    [
        (torch.ones(3, 4), 0.5, r"shape \(H, H\), got \[3, 4\]"),
        (torch.ones(3, 3), 0.0, "share: expected above 0 and at most 1, got 0.0"),
    ],
)
def test_squares_that_there_are_not(field, share, message) -> None:
    with pytest.raises(ValueError, match=message):
        square_that_holds(field, share)


# The commands


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten grey images, each darker than the next one."""
    from PIL import Image

    for i in range(10):
        Image.new("L", (28, 28), 25 * i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_sample_is_spread_over_the_data(folder) -> None:
    preprocessing = Preprocessing(resize=8, crop=8, mean=(0.0,), std=(1 / 255,))
    for asked, levels in ((3, [0, 75, 150]), (20, [25 * i for i in range(10)])):
        count, images = sample_images(f"folder:{folder}", asked, preprocessing)
        found = list(images)
        assert count == len(found) == len(levels)
        assert [image.shape for image in found] == [(1, 1, 8, 8)] * count
        assert [round(float(image.mean())) for image in found] == levels


@pytest.mark.usefixtures("one_thread")
def test_command(folder, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[train]'")
    target = folder / "field.svg"
    assert cli.main(["erf", "--data", f"folder:{folder}", "--images", "2", "--out", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 images of 28 x 28 pixels"
    assert [line.split("%")[0].strip() for line in lines[1:4]] == ["20", "50", "99"]
    assert lines[4] == str(target)
    areas = [line.split(", ")[1].split("%")[0] for line in lines[1:4]]
    assert f"20 % in {areas[0]} %, 50 % in {areas[1]} %, 99 % in {areas[2]} %" in target.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "folder:empty"], "empty: expected images, got none; skipped files: 1 .txt"),
        (["--data", "folder:none"], "none: No such file or directory"),
        (["--data", "folder:.", "--out", "a.pdf"], "a.pdf: expected a name that ends with .png or .svg"),
        (["--data", "folder:.", "--out", "none/a.png"], "none: no such folder to write a.png into"),
        (["--data", "folder:.", "--images", "0"], "argument --images: expected at least 1, got 0"),
    ],
)
def test_refusals_are_one_line(words, message, folder, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[train]'")
    (folder / "empty").mkdir()
    (folder / "empty/a.txt").touch()
    monkeypatch.chdir(folder)
    try:
        code = cli.main(["erf", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    told = capsys.readouterr().err
    assert told.startswith("mobilemamba erf: error: ")
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.usefixtures("one_thread")
def test_benchmark(folder, monkeypatch, capsys) -> None:
    """Beside a peer with a map and one with tokens."""
    for name in ("matplotlib", "timm"):
        pytest.importorskip(name, reason="the extra bench is not installed")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    before = set(sys.modules)
    try:
        benchmark = importlib.import_module("receptive_field")
        words = ["--data", f"folder:{folder}", "--model", "t2", "--peers", "levit_128s", "shvit_s3", "--images", "1"]
        assert benchmark.main([*words, "--random", "--figure", str(folder / "fields.png")]) == 0
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:5] for row in rows[1:]] == [
        ["t2", "random", "1", "192", "3 x 3"],
        ["LeViT-128S", "random", "1", "224", "4 x 4"],
        ["SHViT-S3", "random", "1", "224", "4 x 4"],
    ]
    assert (folder / "fields.png").is_file()
