"""The command line: what it prints for people and for programs, and that what it refuses takes one line."""

import io
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import mobilemamba
from mobilemamba import cli, weights
from mobilemamba.cli.images import ImageReader
from mobilemamba.cli.options import checked_device
from mobilemamba.data import Preprocessing
from mobilemamba.data.image_files import read_ahead
from mobilemamba.training import TrainConfig

LABELS = [f"thing {i}" for i in range(10)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images, a file that is not one, a nano with random weights, and files that are refused."""
    root = tmp_path_factory.mktemp("files")
    for name, shade in (("dark.png", 10), ("light.png", 240)):
        Image.new("L", (28, 28), shade).save(root / name)
    (root / "text.png").write_text("not an image")
    torch.manual_seed(0)
    model = mobilemamba.nano()
    preprocessing = Preprocessing(resize=28, crop=28, mean=(0.286,), std=(0.353,))
    stored = weights.Checkpoint(model.state_dict(), "nano", {"num_classes": 10}, LABELS, preprocessing)
    weights.save(root / "nano.pt", stored)
    headless = mobilemamba.nano(num_classes=0)
    weights.save(root / "headless.pt", weights.Checkpoint(headless.state_dict(), "nano", {"num_classes": 0}))
    infinite = {**model.state_dict(), "head.linear.bias": torch.full((10,), math.nan)}
    weights.save(root / "infinite.pt", weights.Checkpoint(infinite, "nano"))
    (root / "latin.txt").write_bytes("Häuser\n".encode("latin-1"))
    (root / "empty.txt").touch()
    # as much of b1 as tells the shapes
    widths, depths = (200, 376, 448), (2, 3, 2)
    blocks = [f"stages.{stage}.blocks.{i}.mixer.proj.conv.weight" for stage in range(3) for i in range(depths[stage])]
    torch.save({key: torch.zeros(widths[int(key[7])], 1) for key in blocks}, root / "b.pt")
    weights.save(root / "unlabelled.pt", weights.Checkpoint(model.state_dict(), "nano", {}, None, preprocessing))
    return root


@pytest.fixture
def folder(tmp_path, files, monkeypatch):
    """The working directory, with links to the files of :func:`files`."""
    monkeypatch.chdir(tmp_path)
    for path in files.iterdir():
        os.link(path, path.name)
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


def test_classify_goes_on_after_a_bad_file(folder, capsys):
    Image.effect_noise((28, 28), 80).save("whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    args = ("dark.png", "none.png", "light.png", "text.png", "cut.png", "dark.png", *OWN, "--topk", "1")
    for size in ("2", "32"):
        code, out, err = run(capsys, "classify", *args, "--batch-size", size)
        assert code == 1
        assert out.splitlines()[::3] == ["dark.png", "light.png", "dark.png"]
        lines = [line.removeprefix("mobilemamba classify: error: ") for line in err.splitlines()]
        starts = ("none.png: no such image file", "text.png: expected an image", "cut.png: not a readable image")
        assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    code, out, _ = run(capsys, "classify", "none.png", "dark.png", *OWN, "--json")
    assert (code, [result["image"] for result in json.loads(out)]) == (1, ["dark.png"])
    assert run(capsys, "classify", "none.png", *OWN, "--json")[:2] == (1, "[]\n")


def test_classify_refuses_outputs_that_are_not_finite(folder, capsys):
    code, out, err = run(capsys, "classify", "light.png", "dark.png", "--checkpoint", "infinite.pt")
    assert (code, out) == (1, "")
    start = "mobilemamba classify: error: light.png: expected finite outputs of the model, got [nan"
    assert err.splitlines()[0].startswith(start)


def test_classify_takes_folders_and_patterns(folder, capsys, monkeypatch):
    (folder / "D/sub/.git").mkdir(parents=True)
    for name in ("D/b.png", "D/a.PNG", "D/.hidden.png", "D/sub/c.png", "D/sub/.git/d.png"):
        (folder / name).write_bytes((folder / "dark.png").read_bytes())
    (folder / "D/notes.txt").touch()
    (folder / "D/sub/up").symlink_to(folder / "D")

    refused = []

    def images(*args: str) -> list[str]:
        reader = ImageReader("classify", str)
        monkeypatch.setattr(reader, "refuse", refused.append)
        return list(reader.paths(map(Path, args)))

    assert images("light.png", "D") == ["light.png", "D/a.PNG", "D/b.png", "D/sub/c.png"]
    assert capsys.readouterr().err == "mobilemamba classify: D: skipped files: 1 .txt\n"
    assert images("D/*.png", "D/s*") == ["D/b.png", "D/sub/c.png"]
    assert images("D/[!s]*", "D/*/c*") == ["D/a.PNG", "D/b.png", "D/notes.txt", "D/sub/c.png"]
    (folder / "[1].png").touch()
    assert images("[1].png") == ["[1].png"]  # a file with the name is no pattern
    assert not refused
    (folder / "E").mkdir()
    (folder / "E/notes.txt").touch()
    assert images("E", "*.jpg") == []
    assert refused == [
        "E: expected images in the folder, got none; skipped files: 1 .txt",
        "*.jpg: no file matches this pattern",
    ]
    monkeypatch.setenv("HOME", str(folder))
    code, out, err = run(capsys, "classify", "~/D/sub", "E", *OWN, "--json")
    assert (code, [result["image"] for result in json.loads(out)]) == (1, [f"{folder}/D/sub/c.png"])
    assert err == f"mobilemamba classify: error: {refused[0]}\n"


def test_classify_prints_results_as_they_are_made(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli.classify, "print_tables", lambda results, _: [next(results), print("the first")])
    many = itertools.chain(["dark.png"] * 11, iter(lambda: pytest.fail("read too far ahead"), None))
    monkeypatch.setattr(ImageReader, "paths", lambda *_: many)
    assert run(capsys, "classify", "x", *OWN, "--batch-size", "4") == (0, "the first\n", "")


def test_read_ahead_is_in_order_and_bounded():
    started, taken = [], []

    def items():
        for i in range(50):
            started.append(i)
            yield i

    def read(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    for result in read_ahead(read, items(), limit=5):
        taken.append(result)
        assert len(started) - len(taken) < 5
    assert taken == list(range(50))


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


def test_train_then_classify(folder, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    plain = ("--no-flip", "--shift", "0", "--erase", "0")
    options = ("--data", "digits", "--epochs", "1", "--batch-size", "512")
    threads = torch.get_num_threads()
    code, out, err = run(capsys, "train", *options, *plain, "--out", "run", "--threads", "1", "--save-every", "7")
    torch.set_num_threads(threads)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("epoch 1/1  loss ")
    assert out.splitlines()[-1].startswith("test accuracy ")
    for stored in ("run/model.pt", "run/last.pt"):
        assert run(capsys, "classify", "dark.png", "--checkpoint", stored)[0] == 0

    code, _, err = run(capsys, "train", "--out", "run", "--resume", "--data", "folder:.")
    assert (code, err.partition("error: ")[2]) == (2, "run/last.pt: the run has other data: digits (now folder:.)\n")
    configs, arguments = [], []
    monkeypatch.setattr(
        cli.train, "train", lambda config, *_, **how: (configs.append(config), arguments.append(how), 0.5)[2]
    )
    resume = ("train", "--out", "run", "--resume")
    assert run(capsys, *resume)[0] == run(capsys, *resume, "--epochs", "2", "--flip")[0] == 0
    config = TrainConfig(data="digits", epochs=1, batch_size=512, flip=False, shift=0, erase=0.0)
    assert configs == [config, replace(config, epochs=2, flip=True)]
    as_before = {"device": "cpu", "threads": 1, "workers": None, "save_every": 7.0, "resume": True}
    assert arguments == [as_before, as_before]
    assert run(capsys, *resume, "--threads", "2", "--save-every", "1")[0] == 0
    assert arguments[-1] == {**as_before, "threads": 2, "save_every": 1.0}


def test_train_shows_what_a_recipe_comes_to(capsys):
    code, out, _ = run(capsys, "train", "--recipe", "published-1000", "--model", "t2", "--lr", "1", "--show")
    assert code == 0
    rows = {name: rest for name, *rest in (line.split(maxsplit=2) for line in out.splitlines())}
    assert list(rows) == [field.name.replace("_", "-") for field in fields(TrainConfig)]
    assert rows["epochs"] == ["1000", "of the recipe"]
    assert rows["rand-augment"] == ["rand-m9-mstd0.5-inc1", "of the recipe"]
    assert rows["model"] == ["t2", "given"]
    assert rows["lr"] == ["1.0", "given"]
    assert rows["lr"] == ["1.0", "given"]
    assert rows["temperature"] == ["1.0", "of the recipe"]
    assert rows["half"] == ["no"]


def test_train_help_says_which_defaults_are_the_presets(capsys):
    code, out, _ = run(capsys, "train", "--help")
    text = " ".join(out.split())
    assert code == 0
    assert "--drop-path X rate of stochastic depth (default: the preset's)" in text
    assert "for folder:DIR only (default: the preset's)" in text
    assert "--epochs N passes over the training images (default: 20)" in text
    assert "mirror each image with probability 1/2 (default: yes)" in text
    assert "SUPPRESS" not in out


OWN = ("--checkpoint", "nano.pt")
REFUSALS = {
    "no command": ((), "required: COMMAND"),
    "no image": (("classify",), "required: IMAGE"),
    "unknown model": (("classify", "dark.png", "--model", "nono"), "unknown model 'nono'; did you mean nano"),
    "unknown model to train": (("train", "--model", "s7", "--data", "digits", "--out", "new"), "did you mean s6"),
    "no distilled weights": (("classify", "dark.png", "--distilled"), "no distilled weights for model 'nano'"),
    "distilled checkpoint": (
        ("classify", "dark.png", "--distilled", *OWN),
        "expected either --distilled or --checkpoint, got both",
    ),
    "missing checkpoint": (("classify", "dark.png", "--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
    "not a checkpoint": (
        ("classify", "dark.png", "--checkpoint", "text.png"),
        "text.png: expected a checkpoint (torch or s",
    ),
    "another preset": (
        ("classify", "dark.png", "--model", "t2", *OWN),
        "error: nano.pt: expected weights of t2, got weights of nano\n",
    ),
    "no head": (("classify", "dark.png", "--checkpoint", "headless.pt"), "headless.pt: expected a model with classes"),
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
    "address of data": (
        ("train", "--data", "folder:ftp://host/x", "--out", "new"),
        "data: expected a name or folder:DIR",
    ),
    "missing folder": (("train", "--data", "folder:none", "--out", "new"), "none: expected a folder"),
    "unknown data of a size": (
        ("train", "--data", "shapes", "--image-size", "32", "--out", "new"),
        "unknown data 'shapes'; expected fashion-mnist",
    ),
    "size of data that has one": (
        ("train", "--data", "digits", "--image-size", "32", "--out", "new"),
        "an image size is for folder:DIR only, got 32 with data 'digits'",
    ),
    "address": (
        ("classify", "https://host/x.png", *OWN),
        "argument IMAGE: expected a path, got an address: download it first (https://host/x.png)",
    ),
    "address of a checkpoint": (
        ("classify", "x.png", "--checkpoint", "https://host/x.pt"),
        "--checkpoint: expected a p",
    ),
    "nothing to resume": (
        ("train", "--out", "new", "--resume"),
        "new: expected the folder of a run to resume, got no folder",
    ),
    "no state to resume": (
        ("train", "--out", ".", "--resume"),
        ".: expected the folder of a run to resume, got a folder without last.pt",
    ),
    "run in a file": (
        ("train", "--data", "digits", "--out", "nano.pt"),
        "nano.pt: expected a folder for the run, got a",
    ),
    "no number": (("train", "--lr", "much", "--out", "new"), "argument --lr: expected a number, got 'much'"),
    "no whole number": (("train", "--image-size", "1.5", "--out", "new"), "--image-size: expected a whole number, got"),
    "no epochs": (
        ("train", "--epochs", "many", "--out", "new"),
        "argument --epochs: expected a whole number, got 'many'",
    ),
    "unknown option": (
        ("classify", "dark.png", "--tpok", "3"),
        "unknown arguments: --tpok 3; mobilemamba classify --help",
    ),
    "rate": (("train", "--lr", "-1", "--out", "new"), "lr must be positive, got -1.0"),
    "no folder of a run": (("train", "--lr", "1"), "expected --out DIR, the folder of the run"),
    "recipe of a run": (
        ("train", "--out", "new", "--resume", "--recipe", "fine-tune"),
        "expected either --resume, which takes the run's options, or --recipe, got both",
    ),
    "unknown recipe": (("train", "--recipe", "best", "--out", "new"), "argument --recipe: invalid choice: 'best'"),
    "no teacher": (
        ("train", "--recipe", "published-1000", "--out", "new"),
        "the recipe published-1000 distils: expected --teacher",
    ),
    "fine-tuning of what": (
        ("train", "--recipe", "fine-tune", "--data", "digits", "--out", "new"),
        "the recipe fine-tune: expected --model, the network whose weights it starts from",
    ),
    "minutes": (("train", "--save-every", "0", "--out", "new"), "--save-every: expected minutes above 0, got '0'"),
    "workers": (("train", "--workers", "-1", "--out", "new"), "--workers: expected at least 0, got -1"),
    "widths": (("train", "--widths", "9,x,9", "--out", "new"), "--widths: expected a whole number, got 'x'"),
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


@pytest.mark.parametrize("target", ["new.pt", "new.safetensors", "old.pt"])
def test_a_full_disk_is_one_line(folder, capsys, target):
    pytest.importorskip("safetensors")
    (folder / "old.pt").write_text("precious")
    before = sorted(folder.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        done = run(capsys, "convert", "nano.pt", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done == (2, "", f"mobilemamba convert: error: {folder / target}: File too large\n")
    assert sorted(folder.rglob("*")) == before
    assert (folder / "old.pt").read_text() == "precious"


def test_a_full_disk_for_temporary_files_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:  # given a path, TorchScript's writer would end the process
        code, out, err = run(capsys, "export", "new.pt", "--format", "torchscript", *OWN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"mobilemamba export: error: {folder}/")
    assert err.endswith(": File too large\n")
    assert not (folder / "new.pt").exists()


def test_a_full_disk_behind_stdout_is_one_line(folder, capsys, monkeypatch):
    for args in (("info",), ("--version",), ("classify", "dark.png", *OWN)):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code, _, err = run(capsys, *args)
        program = "mobilemamba" if args[0] == "--version" else f"mobilemamba {args[0]}"
        assert (code, err) == (2, f"{program}: error: No space left on device\n")


def test_a_reader_that_has_gone_ends_the_command_quietly(folder, capsys, monkeypatch):
    def stdout_without_reader():
        reading, writing = os.pipe()
        os.close(reading)
        return os.fdopen(writing, "w")

    for args in (("info",), ("--help",), ("train", "--show"), ("classify", *["dark.png"] * 9, "--batch-size", "2", *OWN)):
        with stdout_without_reader() as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert run(capsys, *args)[::2] == (141, "")
    monkeypatch.setattr(cli.train, "run", lambda _: print("epoch 1"))
    with stdout_without_reader() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code, _, err = run(capsys, "train", "--out", "somewhere")
    assert (code, err.count("\n")) == (141, 1)
    assert err.endswith("the reader of its output has gone: --resume continues from the latest stored state\n")


def test_names_of_files_may_have_any_bytes(folder, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / name).write_bytes((folder / "dark.png").read_bytes())
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", write_through=True))
    assert cli.main(["classify", name, *OWN]) == 0
    assert raw.getvalue().startswith(b"caf\\udce9.png\n")


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "run", interrupted)
    assert run(capsys, "info") == (130, "", "\nmobilemamba info: interrupted\n")
    monkeypatch.setattr(cli.train, "run", interrupted)
    code, _, err = run(capsys, "train", "--out", "somewhere")
    assert (code, err) == (130, "\nmobilemamba train: interrupted: --resume continues from the latest stored state\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(cli.train, "run", lambda _: (_ for _ in ()).throw(error))
    start = "mobilemamba train: error: out of memory: a smaller --batch-size needs less ("
    assert run(capsys, "train", "--out", "new") == (2, "", f"{start}{error})\n")


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
