"""Evaluation: what is counted, over shares and types too, and what ``mobilemamba evaluate`` prints and writes."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

import mobilemamba
from mobilemamba import cli, weights
from mobilemamba.data import Preprocessing
from mobilemamba.data.splits import InMemory
from mobilemamba.training import Result, evaluate, log

LABELS = [f"thing {i}" for i in range(10)]
PREPROCESSING = Preprocessing(resize=28, crop=28, mean=(0.3,), std=(0.3,))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8).repeat_interleave(7, 2).repeat_interleave(7, 3)


@pytest.fixture(scope="module")
def model(pixels) -> mobilemamba.MobileMamba:
    """A nano whose predictions differ."""
    torch.manual_seed(0)
    model = mobilemamba.nano()
    model.head.norm.momentum = 1.0
    torch.nn.init.normal_(model.head.linear.weight)
    for _ in range(5):  # the statistics of the images
        model.train()(PREPROCESSING.normalize(pixels))
    return model


@pytest.fixture(scope="module")
def top(model, pixels) -> Tensor:
    """The five most probable classes of each image, the most probable one first."""
    with torch.inference_mode():
        return model.fuse()(PREPROCESSING.normalize(pixels)).topk(5).indices


@pytest.fixture(scope="module")
def images(pixels, top) -> InMemory:
    """50 images of nine of the ten classes. The model has every third one right."""
    labels = torch.randint(9, (50,))
    labels[::3] = top[::3, 0] % 9
    return InMemory(pixels, labels)


def test_counts(model, images, top) -> None:
    result = evaluate(model, images, PREPROCESSING, 16, confusion=True)
    hits = top == images.labels[:, None]
    assert 0 < result.top1 == hits[:, 0].sum().item() / 50 < result.top5 == hits.sum().item() / 50 < 1
    for label in range(10):
        mine = images.labels == label
        assert int(result.images[label]) == mine.sum()
        assert int(result.right[label]) == hits[mine, 0].sum()
        assert int(result.right5[label]) == hits[mine].sum()
        assert int(result.predicted[label]) == (top[:, 0] == label).sum()
        for other in range(10):
            assert int(result.confusion[label, other]) == (top[mine, 0] == other).sum()
    assert (result.count, int(result.bad)) == (50, 0)
    assert result.images_per_s == 50 / result.seconds


def test_model_and_mode_stay(model, images) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, images, PREPROCESSING)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shares_of_processes_sum_up(model, images) -> None:
    """Also with more processes than images in the smallest share: one has none."""
    few = InMemory(images.pixels[:4], images.labels[:4])
    shares = [evaluate(model, few, PREPROCESSING, share=(i, 5), confusion=True) for i in range(5)]
    with pytest.raises(ValueError, match="expected test images, got none that can be read"):
        _ = shares[4].top1
    others = iter(zip(*(vars(share).values() for share in shares), strict=True))

    def total(tensor: Tensor) -> Tensor:
        values = next(values for values in others if values[0] is tensor)
        return sum(values)

    whole, summed = evaluate(model, few, PREPROCESSING, confusion=True), shares[0].summed(total)
    for name, value in vars(whole).items():
        if name != "seconds":
            assert torch.equal(getattr(summed, name), value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(model, images, dtype) -> None:
    short = mobilemamba.nano()
    short.load_state_dict(model.state_dict())
    result = evaluate(short.to(dtype), images, PREPROCESSING)
    assert result.top1 == pytest.approx(evaluate(model, images, PREPROCESSING).top1, abs=0.1)


def test_what_is_refused(model, images) -> None:
    with pytest.raises(ValueError, match="expected mean and std with 1 values"):
        evaluate(model, images, replace(PREPROCESSING, mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 9, got 10"):
        evaluate(model, InMemory(images.pixels, images.labels + 2), PREPROCESSING)
    broken = mobilemamba.nano()
    torch.nn.init.constant_(broken.head.linear.bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"expected finite outputs of the model, got others in torch\.float32"):
        evaluate(broken, images, PREPROCESSING)


def test_progress_on_a_terminal(model, images, monkeypatch, capsys) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True, raising=False)
    evaluate(model, images, PREPROCESSING, 20, progress=lambda done, total, _: f"{done} of {total}")
    assert re.findall(r"\d of \d", capsys.readouterr().err) == ["1 of 3", "2 of 3", "3 of 3"]


# The command


@pytest.fixture(scope="module")
def files(model, images, tmp_path_factory):
    """The images in class folders ``val/thing i``, and a checkpoint."""
    root = tmp_path_factory.mktemp("files")
    for i, label in enumerate(images.labels.tolist()):
        path = root / f"data/val/{LABELS[label]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.image(i).save(path)
    checkpoint = weights.Checkpoint(model.state_dict(), "nano", {"num_classes": 10}, LABELS, PREPROCESSING)
    weights.save(root / "nano.pt", checkpoint)
    weights.save(root / "headless.pt", replace(checkpoint, model_args={"num_classes": 0}, labels=None))
    return root


def run(capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    code = cli.main(["evaluate", *map(str, args)])
    return (code, *capsys.readouterr())


def test_the_command_prints_and_writes(files, images, top, tmp_path, capsys) -> None:
    outputs = [tmp_path / name for name in ("all.json", "classes.csv", "confusion.csv")]
    args = ["--json", outputs[0], "--csv", outputs[1], "--confusion", outputs[2], "--workers", 0, "--batch-size", 7]
    code, out, err = run(capsys, "--data", f"folder:{files / 'data'}", "--checkpoint", files / "nano.pt", *args)
    assert (code, err) == (0, "")
    hits = top == images.labels[:, None]
    right, right5 = int(hits[:, 0].sum()), int(hits.sum())
    lines = out.splitlines()
    assert lines[:3] == [
        f"{files / 'data/val'}: 50 images, 9 classes",
        f"top-1      {2 * right:.2f} %  ({right} of 50 images)",
        f"top-5      {2 * right5:.2f} %",
    ]
    assert re.fullmatch(r"images/s   [\d.]+  \(cpu, float32, batches of 7\)", lines[3])  # nothing was published
    assert lines[4:] == [str(path) for path in outputs]

    facts = json.loads(outputs[0].read_text())
    assert (facts["images"], facts["top1"], facts["top5"]) == (50, right / 50, right5 / 50)
    assert (facts["published_top1"], facts["weights"]) == (None, str(files / "nano.pt"))
    rows = list(csv.DictReader(io.StringIO(outputs[1].read_text())))
    assert [{key: value and float(value) for key, value in row.items() if key != "label"} for row in rows] == [
        {key: "" if value is None else value for key, value in row.items() if key != "label"}
        for row in facts["classes"]
    ]
    assert [row["label"] for row in rows] == LABELS
    assert (rows[9]["images"], rows[9]["top1"]) == ("0", "")
    often = int(images.labels[::3].mode().values)  # has right and wrong predictions
    mine, predicted = images.labels == often, top[:, 0] == often
    assert float(rows[often]["top1"]) == pytest.approx(float(predicted[mine].float().mean()), abs=1e-6)
    assert float(rows[often]["precision"]) == pytest.approx(float(mine[predicted].float().mean()), abs=1e-6)
    header, *matrix = csv.reader(io.StringIO(outputs[2].read_text()))
    assert header == ["", *LABELS]
    assert [row[0] for row in matrix] == LABELS
    assert sum(int(matrix[i][i + 1]) for i in range(10)) == right
    assert [sum(map(int, row[1:])) for row in matrix] == images.labels.bincount(minlength=10).tolist()


def test_published_figures_stand_beside() -> None:
    ten = torch.ones(10, dtype=torch.int64)
    result = Result(ten, ten, ten, ten, None, torch.tensor(0), 2.0)
    printed = cli.evaluate.table(result, 1000, "cpu", weights.entry("s6", distilled=True))
    assert "published  top-1 80.7 %, top-5 95.18 %, on the 50,000 validation images of ImageNet-1k" in printed


def test_bad_images_are_skipped_and_counted(files, tmp_path, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / "thing 0").mkdir(exist_ok=True)
        Image.new("L", (28, 28)).save(tmp_path / f"thing 0/{name}.png")
    (tmp_path / "thing 0/text.png").write_text("text")
    args = ("--data", f"folder:{tmp_path}", "--checkpoint", files / "nano.pt", "--workers", 0)
    code, out, err = run(capsys, *args, "--on-bad-image", "skip")
    assert code == 0
    assert "of 2 images)" in out
    assert err.endswith("\n1 bad images were skipped; each is named above\n")
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--csv", "{}/none/a.csv"], "none: no such folder to write a.csv into"),
        (["--json", "{}"], "expected a file to write, got a folder"),
        (["--checkpoint", "{}/headless.pt"], "expected a model with classes, got one without a head"),
        (["--split", "train"], "expected a folder train, got val (--split)"),
        (["--model", "nano"], "expected the model's 10 classes, such as T-shirt/top, trouser,"),
        (["--device", "tpu"], "device 'tpu' is not available"),
    ],
)
def test_refusals_are_one_line(args, message, files, capsys) -> None:
    words = ["--data", f"folder:{files / 'data'}", *(arg.format(files) for arg in args)]
    if not {"--checkpoint", "--model"} & set(args):
        words += ["--checkpoint", str(files / "nano.pt")]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("mobilemamba evaluate: error: ")
    assert message in err
    assert err.count("\n") == 1
