"""Training in several processes, and runs that a signal stops in the middle of an epoch."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import mobilemamba.data
from mobilemamba.data import DataSet
from mobilemamba.data.splits import InMemory
from mobilemamba.models.frozen import freeze_statistics
from mobilemamba.training import EXIT_CODE, Interrupted, TrainConfig, tasks, train
from mobilemamba.training.processes import Processes, SyncBatchNorm, synchronize_norms
from mobilemamba.training.run import Run

pytest.importorskip("sklearn")
PLAIN = {"flip": False, "shift": 0, "erase": 0.0}
CONFIG = TrainConfig(data="digits", epochs=2, batch_size=24, drop_path=0.1, **PLAIN)

#: Trains on 96 digits. Arguments: folder, options as JSON. Process 1 is killed in epoch 3.
TRAIN = """
import json, os, pathlib, signal, sys, torch
import mobilemamba.data
from mobilemamba.data.splits import InMemory
from mobilemamba.training import TrainConfig, train
from mobilemamba.training.run import Run
torch.set_num_threads(1)
whole = mobilemamba.data.load("digits")
part = InMemory(whole.train.pixels[:96], whole.train.labels[:96])
mobilemamba.data.load = lambda *_: mobilemamba.data.DataSet(part, part, whole.labels, whole.preprocessing)
step = Run.train_step
def train_step(run, images, labels):
    if (run.epoch, run.step, os.environ["RANK"]) == (2, 1, "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, images, labels)
Run.train_step = train_step
if __name__ == "__main__":
    train(TrainConfig(**json.loads(sys.argv[2])), pathlib.Path(sys.argv[1]))
"""


@pytest.fixture
def digits(monkeypatch) -> None:
    """96 digits: four steps of 24 in an epoch."""
    whole = mobilemamba.data.load("digits")
    part = InMemory(whole.train.pixels[:96], whole.train.labels[:96])
    small = DataSet(part, part, whole.labels, whole.preprocessing)
    monkeypatch.setattr(mobilemamba.data, "load", lambda *_: small)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in log(out) if "loss" in entry]


def test_two_processes_give_the_losses_of_one_and_end_together(tmp_path, digits):
    options = {
        "data": "digits",
        "epochs": 3,
        "batch_size": 24,
        "lr": 2e-4,
        "sync_batchnorm": True,
        "freeze": "stem",
        **PLAIN,
    }
    train(TrainConfig(**options), tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(tmp_path / "two"), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert "SIGKILL" in done.stderr
    first, *epochs = log(tmp_path / "two")  # one log
    assert first["processes"] == 2
    assert [entry["loss"] for entry in epochs] == pytest.approx(losses(tmp_path / "one")[:2], rel=1e-4)
    state = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    assert state["epoch"] == 2
    assert not state["model"]["patch_embed.0.norm.running_mean"].any()  # frozen, although norms are synchronised


def test_synchronized_norms_of_one_process_are_those_of_torch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    before = model.state_dict(keep_vars=True)
    expected = model(images := torch.randn(4, 3, 5, 5))
    synchronize_norms(model, torch.device("cpu"))
    assert isinstance(model[1][0], SyncBatchNorm)
    assert model.state_dict().keys() == before.keys()
    assert all(new is before[name] for name, new in model.state_dict(keep_vars=True).items())
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=pytest.mark.full)])
def test_parts_of_a_batch_have_its_gradient(tmp_path, digits, monkeypatch, accumulate):
    """With frozen norms, parts of a batch do not see each other."""
    monkeypatch.setattr(tasks, "freeze_norms", partial(freeze_statistics, affine=True))  # the head's too
    config = replace(CONFIG, pretrained="plain", freeze_norm=True, drop_path=0.0, epochs=1)
    train(config, tmp_path / "whole")
    train(replace(config, accumulate=accumulate), tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_batches_must_have_equal_parts(digits):
    data = mobilemamba.data.load("digits")
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of 15, .* got 24"):
        Run(replace(CONFIG, accumulate=5), data, torch.device("cpu"), Processes(0, 3))
    with pytest.raises(ValueError, match="at least 2 images in each part of a batch, got 24 in 24 parts"):
        Run(replace(CONFIG, accumulate=24), data, torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_resume_is_bit_for_bit(tmp_path, digits, monkeypatch, number):
    if not (tmp_path.parent / "straight").exists():
        train(CONFIG, tmp_path.parent / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "loss", sends(number, Run.loss, at=(1, 2)))
        with pytest.raises(Interrupted, match=f"{number.name} after step 3 of epoch 2"):
            train(CONFIG, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 3)
    train(CONFIG, tmp_path, resume=True)
    resumed, straight = (
        torch.load(out / "last.pt", weights_only=True) for out in (tmp_path, tmp_path.parent / "straight")
    )
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][key], value) for key, value in straight[part].items())
    assert losses(tmp_path) == losses(tmp_path.parent / "straight")


def sends(number: signal.Signals, function, at: tuple[int, int]):
    """``function``, which sends this process a signal in a step of an epoch."""

    def patched(run, *args):
        if (run.epoch, run.step) == at:
            os.kill(os.getpid(), number)
        return function(run, *args)

    return patched


def test_a_killed_run_loses_what_save_every_allows(tmp_path, digits, monkeypatch):
    saves = []
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda run, path: (saves.append((run.epoch, run.step)), save(run, path)))
    train(replace(CONFIG, epochs=1), tmp_path, save_every=1e-9)
    assert saves == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]


def test_what_is_not_bit_for_bit_is_said(tmp_path, digits, monkeypatch, capsys):
    train(replace(CONFIG, epochs=1), tmp_path)
    facts = Run.facts
    monkeypatch.setattr(Run, "facts", lambda run: {**facts(run), "processes": 3})
    train(replace(CONFIG, epochs=2), tmp_path, resume=True)
    assert "not bit for bit: processes 1 (now 3)" in capsys.readouterr().out


def test_the_command_says_how_to_go_on(tmp_path, digits, monkeypatch, capsys):
    from mobilemamba.cli import main

    monkeypatch.setattr(Run, "loss", sends(signal.SIGUSR1, Run.loss, at=(0, 1)))
    options = ("--data", "digits", "--batch-size", "24", "--no-flip", "--shift", "0", "--erase", "0")
    assert main(["train", *options, "--out", str(tmp_path)]) == EXIT_CODE
    expected = "mobilemamba train: stopped by SIGUSR1 after step 2 of epoch 1; continue with --resume\n"
    assert capsys.readouterr().err == expected
