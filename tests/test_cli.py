"""The command line: what it prints for people and for programs, and that what it refuses takes one line."""

import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image

import mobilemamba
from mobilemamba import cli, weights
from mobilemamba.cli.options import checked_device
from mobilemamba.data import Preprocessing

LABELS = [f"thing {i}" for i in range(10)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: two images, a file that is not one, and a nano with random weights."""
    monkeypatch.chdir(tmp_path)
    for name, shade in (("dark.png", 10), ("light.png", 240)):
        Image.new("L", (28, 28), shade).save(name)
    (tmp_path / "text.png").write_text("not an image")
    torch.manual_seed(0)
    model = mobilemamba.nano()
    preprocessing = Preprocessing(resize=28, crop=28, mean=(0.286,), std=(0.353,))
    stored = weights.Checkpoint(model.state_dict(), "nano", {"num_classes": 10}, LABELS, preprocessing)
    weights.save("nano.pt", stored)
    headless = mobilemamba.nano(num_classes=0)
    weights.save("headless.pt", weights.Checkpoint(headless.state_dict(), "nano", {"num_classes": 0}))
    infinite = {**model.state_dict(), "head.linear.bias": torch.full((10,), math.nan)}
    weights.save("infinite.pt", weights.Checkpoint(infinite, "nano"))
    (tmp_path / "latin.txt").write_bytes("Häuser\n".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    # as much of b1 as tells the shapes
    widths, depths = (200, 376, 448), (2, 3, 2)
    blocks = [f"stages.{stage}.blocks.{i}.mixer.proj.conv.weight" for stage in range(3) for i in range(depths[stage])]
    torch.save({key: torch.zeros(widths[int(key[7])], 1) for key in blocks}, "b.pt")
    weights.save("unlabelled.pt", weights.Checkpoint(model.state_dict(), "nano", {}, None, preprocessing))
    return tmp_path


def run(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = cli.main(args)
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_classify_prints_a_table_for_each_image(folder, capsys):
    code, out, err = run(capsys, "classify", "dark.png", "light.png", "--checkpoint", "nano.pt", "--topk", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [lines[0], lines[4], lines[5]] == ["dark.png", "", "light.png"]
    assert all(line.startswith("  thing ") and line.endswith("%") for line in lines[1:4] + lines[6:])
    assert len(lines) == 9


def test_classify_json_is_independent_of_the_batch_size(folder, capsys):
    results = []
    for size in ("1", "2"):
        args = ("classify", "dark.png", "light.png", "--checkpoint", "nano.pt", "--topk", "99", "--json")
        code, out, _ = run(capsys, *args, "--batch-size", size)
        assert code == 0
        results.append(json.loads(out))
    for one, other in zip(*results, strict=True):
        assert one["image"] == other["image"]
        probabilities = [prediction["probability"] for prediction in one["predictions"]]
        assert sum(probabilities) == pytest.approx(1)
        assert probabilities == sorted(probabilities, reverse=True)
        assert probabilities == pytest.approx([prediction["probability"] for prediction in other["predictions"]])
        assert {prediction["label"] for prediction in one["predictions"]} == set(LABELS)
        assert all(prediction["label"] == LABELS[prediction["class"]] for prediction in one["predictions"])


def test_classify_without_labels_prints_class_numbers(folder, capsys):
    code, out, _ = run(capsys, "classify", "dark.png", "--checkpoint", "unlabelled.pt", "--topk", "1")
    assert code == 0
    assert out.splitlines()[1].startswith("  class ")


def test_classify_takes_labels_from_a_file(folder, capsys):
    (folder / "names.txt").write_text("".join(f"name {i}\n" for i in range(10)))
    args = ("classify", "dark.png", "--checkpoint", "unlabelled.pt", "--labels", "names.txt", "--json")
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert all(p["label"] == f"name {p['class']}" for p in json.loads(out)[0]["predictions"])


def test_convert(folder, capsys):
    pytest.importorskip("safetensors")
    code, out, _ = run(capsys, "convert", "nano.pt", "nano.safetensors")
    assert code == 0
    assert "nano.safetensors" in out
    assert weights.read("nano.safetensors").labels == LABELS


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert torch.__version__ in out
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    assert json.loads(out)["mobilemamba"]["version"] == mobilemamba.__version__


def test_train_then_classify(folder, capsys):
    pytest.importorskip("sklearn")
    code, out, err = run(
        capsys, "train", "--data", "digits", "--epochs", "1", "--batch-size", "512", "--no-flip", "--out", "run"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("epoch 1/1  loss ")
    assert out.splitlines()[-1].startswith("test accuracy ")
    for stored in ("run/model.pt", "run/last.pt"):
        assert run(capsys, "classify", "dark.png", "--checkpoint", stored)[0] == 0


OWN = ("--checkpoint", "nano.pt")
REFUSALS = {
    "no command": ((), "required: COMMAND"),
    "no image": (("classify",), "required: IMAGE"),
    "missing image": (("classify", "dark.png", "none.png", *OWN), "none.png: no such image file"),
    "not an image": (("classify", "dark.png", "text.png", *OWN), "text.png: expected an image"),
    "unknown model": (("classify", "dark.png", "--model", "nono"), "unknown model 'nono'; did you mean nano"),
    "unknown model to train": (("train", "--model", "s7", "--data", "digits", "--out", "new"), "did you mean s6"),
    "no distilled weights": (("classify", "dark.png", "--distilled"), "no distilled weights for model 'nano'"),
    "distilled checkpoint": (
        ("classify", "dark.png", "--distilled", *OWN),
        "expected either --distilled or --checkpoint, got both",
    ),
    "missing checkpoint": (("classify", "dark.png", "--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
    "not a checkpoint": (("classify", "dark.png", "--checkpoint", "text.png"), "text.png: "),
    "another preset": (
        ("classify", "dark.png", "--model", "t2", *OWN),
        "error: nano.pt: expected weights of t2, got weights of nano\n",
    ),
    "no head": (("classify", "dark.png", "--checkpoint", "headless.pt"), "headless.pt: expected a model with classes"),
    "not finite": (
        ("classify", "light.png", "dark.png", "--checkpoint", "infinite.pt"),
        "error: light.png: expected finite outputs of the model, got [nan",
    ),
    "several presets": (("classify", "dark.png", "--checkpoint", "b.pt"), "b.pt: the weights fit b1 or b2 or b4, "),
    "convert several": (("convert", "b.pt", "new.pt"), "b.pt: the weights fit b1 or b2 or b4, which are one "),
    "labels not in UTF-8": (
        ("classify", "dark.png", "--labels", "latin.txt", *OWN),
        "latin.txt: expected names in UTF",
    ),
    "no labels": (("classify", "dark.png", "--labels", "empty.txt", *OWN), "empty.txt: expected 10 labels"),
    "labels for others": (("classify", "dark.png", "--labels", "text.png", *OWN), "expected 10 labels"),
    "missing labels": (("classify", "dark.png", "--labels", "none.txt", *OWN), "none.txt"),
    "topk": (("classify", "dark.png", "--topk", "0"), "argument --topk: expected at least 1, got 0"),
    **{
        f"device {name}": (("classify", "dark.png", "--device", name, *OWN), f"device '{name}' is not available; expec")
        for name in ("toaster", "gpu", "cuda:99", "cuda:256", "cuda:x", "cuda:", "")
    },
    "unknown data": (("train", "--data", "mnist", "--out", "new"), "unknown data 'mnist'; expected fashion-mnist"),
    "missing data": (("train", "--data", "fashion-mnist:none", "--out", "new"), "none: no train-images"),
    "missing folder": (("train", "--data", "folder:none", "--out", "new"), "expected a folder"),
    "no number": (("train", "--lr", "much", "--out", "new"), "argument --lr: invalid float value: 'much'"),
    "rate": (("train", "--lr", "-1", "--out", "new"), "lr must be positive, got -1.0"),
    "convert nothing": (("convert", "none.pt", "new.pt"), "none.pt: no such checkpoint"),
    "convert to what": (("convert", "nano.pt", "new.txt"), "new.txt: expected a name"),
    "convert another": (("convert", "nano.pt", "new.pt", "--model", "t2"), "of t2, got weights of nano"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_is_one_line_and_writes_nothing(folder, capsys, name):
    args, message = REFUSALS[name]
    before = sorted(folder.rglob("*"))
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"mobilemamba {args[0]}: error: " if args else "mobilemamba: error: ")
    assert message in err
    assert sorted(folder.rglob("*")) == before


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "run", interrupted)
    assert run(capsys, "info") == (130, "", "\nmobilemamba info: interrupted\n")
    monkeypatch.setattr(cli.train, "run", interrupted)
    code, _, err = run(capsys, "train", "--out", "somewhere")
    assert (code, err) == (130, "\nmobilemamba train: interrupted: --resume continues from the latest epoch\n")


def test_a_bug_shows_its_traceback(monkeypatch):
    def broken(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.info, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


def test_device_is_one_that_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checked_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "cuda:256", "cuda:x", "gpu"):
        with pytest.raises(ValueError, match=f"'{name}' is not available; expected cpu or cuda or cuda:0 or cuda:1$"):
            checked_device(name)


def test_a_missing_kernel_is_the_users_to_mend(monkeypatch, capsys):
    def missing(_):
        raise NotImplementedError("mobilemamba::haar_conv2d: this version has no CUDA kernel for it")

    monkeypatch.setattr(cli.info, "run", missing)
    code, out, err = run(capsys, "info")
    assert (code, out) == (2, "")
    assert err == "mobilemamba info: error: mobilemamba::haar_conv2d: this version has no CUDA kernel for it\n"


def test_module_is_a_command(tmp_path):
    command = [sys.executable, "-m", "mobilemamba", "info", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mobilemamba"]["version"] == mobilemamba.__version__
