"""The training loop: its parts, that it learns, and that a run that was killed goes on as if nothing had happened."""

import json
import math
import subprocess
import sys

import pytest
import torch

import mobilemamba
from mobilemamba import data
from mobilemamba.training import Ema, TrainConfig, learning_rate, parameter_groups, train
from mobilemamba.training.loop import Run

pytest.importorskip("sklearn")
RUN = [".lock", "last.pt", "log.jsonl", "model.pt"]
CONFIG = TrainConfig(data="digits", epochs=4, batch_size=48, flip=False, crop=1, drop_path=0.1)
KILLED_IN_THIRD_SAVE = """
import os, pathlib, signal, sys, torch
import mobilemamba.data
from mobilemamba.training import TrainConfig, train
whole = mobilemamba.data.load("digits")
part = mobilemamba.data.datasets.InMemory(whole.train.pixels[:100], whole.train.labels[:100])
small = mobilemamba.data.DataSet(part, part, whole.labels, whole.preprocessing)
mobilemamba.data.load = lambda *_: small
save, calls = torch.save, []
def dying_save(state, file):
    calls.append(file)
    save(state, file)
    if len(calls) == 3:
        file.flush()
        os.truncate(file.name, os.path.getsize(file.name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying_save
train(TrainConfig(data="digits", epochs=4, batch_size=48, flip=False, crop=1, drop_path=0.1), pathlib.Path(sys.argv[1]))
"""


def use_small_digits(monkeypatch, scale: int = 1) -> None:
    """A hundred digits, enlarged by ``scale``: two steps in an epoch."""
    whole = data.load("digits")
    pixels = whole.train.pixels[:100].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    part = data.datasets.InMemory(pixels, whole.train.labels[:100])
    small = data.DataSet(part, part, whole.labels, whole.preprocessing)
    monkeypatch.setattr(data, "load", lambda *_: small)


@pytest.fixture
def small_digits(monkeypatch):
    use_small_digits(monkeypatch)


def entries(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_state(one, other):
    """Equal to the last bit, at any depth."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same_state(*pair)
    else:
        assert one == other


def assert_same_runs(one, other):
    states = [torch.load(out / "last.pt", weights_only=True) for out in (one, other)]
    assert states[0]["epoch"] == 4
    timing = ("images_per_s", "seconds")
    for state in states:
        for key in timing:
            del state["entry"][key]
    assert_same_state(*states)
    epochs = [
        [{key: value for key, value in entry.items() if key not in timing} for entry in entries(out) if "loss" in entry]
        for out in (one, other)
    ]
    assert epochs[0] == epochs[1]
    assert [entry["epoch"] for entry in epochs[0]] == [1, 2, 3, 4]
    assert entries(one)[-1] == entries(other)[-1]
    assert sorted(path.name for path in other.iterdir()) == RUN


def test_a_few_steps_lower_the_loss(tmp_path, small_digits):
    train(TrainConfig(data="digits", epochs=6, batch_size=50, lr=5e-3, crop=0, flip=False, erase=0), tmp_path)
    losses = [entry["loss"] for entry in entries(tmp_path) if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


# With 8x8 pixels the last stage is 1x1, where PyTorch's bfloat16 gradient of a depthwise 3x3 stride-2 weight on the CPU
# holds uninitialised memory (seen in 2.13).
@pytest.mark.parametrize(("amp", "scale"), [(False, 1), (True, 2)])
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, amp, scale):
    use_small_digits(monkeypatch, scale)
    config = TrainConfig(**{**vars(CONFIG), "amp": amp})
    train(config, tmp_path / "straight")
    train_epoch = Run.train_epoch
    monkeypatch.setattr(Run, "train_epoch", interrupted_in_third_epoch(train_epoch))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed")
    monkeypatch.setattr(Run, "train_epoch", train_epoch)
    torch.rand(7)  # whatever else the process does with its generator does not matter
    train(config, tmp_path / "resumed", resume=True)
    assert_same_runs(tmp_path / "straight", tmp_path / "resumed")


def interrupted_in_third_epoch(train_epoch):
    def patched(run):
        train_epoch(run)
        if run.epoch == 3:
            raise KeyboardInterrupt

    return patched


def test_killed_while_saving_loses_nothing(tmp_path, small_digits):
    command = [sys.executable, "-c", KILLED_IN_THIRD_SAVE, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["epoch"] == 1
    train(CONFIG, tmp_path / "killed", resume=True)
    train(CONFIG, tmp_path / "straight")
    assert_same_runs(tmp_path / "straight", tmp_path / "killed")


def test_a_run_is_not_overwritten(tmp_path, small_digits):
    config = TrainConfig(data="digits", epochs=1, batch_size=50)
    train(config, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        train(config, tmp_path)
    with pytest.raises(ValueError, match=r"the run has other options: lr 0\.002 \(now 0\.5\); leave"):
        train(TrainConfig(data="digits", epochs=1, batch_size=50, lr=0.5), tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["model.pt", "log.jsonl"])
def test_files_without_a_state_are_not_overwritten(tmp_path, small_digits, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"{name} exists, without the state of its run"):
        train(CONFIG, tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_only_own_unfinished_files_are_removed(tmp_path, small_digits):
    for name in (".mine.tmp", ".notes.pt.0.tmp", ".last.pt.0.tmp", ".model.pt.0.tmp", ".log.jsonl.0.tmp"):
        (tmp_path / name).touch()
    train(TrainConfig(data="digits", epochs=1, batch_size=50), tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".mine.tmp", ".notes.pt.0.tmp", *RUN}


def test_an_unfinished_line_of_the_log_is_dropped(tmp_path, small_digits):
    train(CONFIG, tmp_path)
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole + b'{"test_accu')
    train(CONFIG, tmp_path, resume=True)
    assert [entry["epoch"] for entry in entries(tmp_path) if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_broken_checkpoint_is_refused(tmp_path, small_digits, content):
    if content is None:
        torch.save({"some": "thing"}, tmp_path / "last.pt")
    else:
        (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt: expected a ((training )?checkpoint|complete torch file)"):
        train(CONFIG, tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last.pt"]


def swapped(labels: list[str]) -> list[str]:
    return [labels[1], labels[0], *labels[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(version=9), "expected a training checkpoint of version 1, got 9$"),
        (lambda state: state.pop("config"), "got one without config"),
        (lambda state: state.update(meta=None, ema=None), "got one without meta, ema"),
        (lambda state: state["config"].update(momentum=0.9), r"momentum 0.9 \(now None\)"),
        (lambda state: state["config"].pop("erase"), r"erase None \(now 0.25\)"),
        (
            lambda state: state["meta"].update(labels=swapped(state["meta"]["labels"])),
            r"label 0 1 \(now 0\), label 1 0 \(now 1\); ",
        ),
        (
            lambda state: (state["meta"].update(model_args={"num_classes": 9}), state["meta"]["labels"].pop()),
            r"model_args .*'num_classes': 9.*label 9 None \(now 9\); ",
        ),
        (
            lambda state: state["model"].pop("head.linear.bias"),
            "not fit the model; 1 missing: head.linear.bias$",
        ),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path, small_digits, change, message):
    config = TrainConfig(data="digits", epochs=1, batch_size=50)
    train(config, tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt: .*{message}") as caught:
        train(config, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, small_digits):
    with pytest.raises(FloatingPointError, match="expected finite values"):
        train(TrainConfig(data="digits", epochs=2, batch_size=50, lr=1e30, warmup_epochs=0), tmp_path)
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"crop": -1}, "crop must not be negative, got -1"),
        ({"erase": 1.5}, "erase must be from 0 to 1, got 1.5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_stored_weights_can_be_half(tmp_path, small_digits):
    accuracy = train(TrainConfig(data="digits", epochs=1, batch_size=50, half=True), tmp_path)
    assert entries(tmp_path)[-1]["test_accuracy"] == accuracy
    parameters = entries(tmp_path)[0]["parameters"]
    assert (tmp_path / "model.pt").stat().st_size < 2.5 * parameters


def test_parameter_groups():
    model = mobilemamba.nano()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, exempt = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert all(parameter.dim() > 1 for parameter in decayed["params"])
    leaves = {names[parameter].rsplit(".", 1)[-1] for parameter in exempt["params"] if parameter.dim() > 1}
    assert leaves == {"A_log", "D", "dt_bias"}


def test_learning_rate():
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[10] == max(rates) == 2.0
    assert rates[100] == min(rates[10:]) == pytest.approx(0.02)
    assert rates[55] == pytest.approx((2.0 + 0.02) / 2)
    assert learning_rate(0, 100, 0, 2.0) == 2.0


def test_ema():
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_var.fill_(11.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model, step=0)  # warm-up: decay 1/10
    assert ema.model.weight.tolist() == pytest.approx([0.1 + 0.9 * 3] * 2)
    assert ema.model.running_var.tolist() == pytest.approx([0.1 + 0.9 * 11] * 2)
    assert ema.model.num_batches_tracked == 7
    assert not ema.model.training
    ema.update(model, step=10_000)
    assert ema.model.weight.tolist() == pytest.approx([(0.1 + 0.9 * 3 + 3) / 2] * 2)
