"""The training loop: its parts, that it learns, and that a run that was killed goes on as if nothing had happened."""

import errno
import fcntl
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import mobilemamba
from mobilemamba import data
from mobilemamba.training import (
    TrainConfig,
    learning_rate,
    moving_average,
    parameter_groups,
    recipe,
    stored_config,
    train,
)
from mobilemamba.training.folder import RunFolder
from mobilemamba.training.run import Run

pytest.importorskip("sklearn")
RUN = [".lock", "last.pt", "log.jsonl", "model.pt"]
PLAIN = {"data": "digits", "flip": False, "shift": 0, "erase": 0.0}  # needs no augmentation library
try:
    data.augmentation.libraries()
    AUGMENTED = {**PLAIN, "shift": 1, "erase": 0.25, "mixup": 0.8}
except ImportError:
    AUGMENTED = PLAIN
CONFIG = TrainConfig(epochs=4, batch_size=48, drop_path=0.1, **AUGMENTED)
ONE_EPOCH = TrainConfig(epochs=1, batch_size=50, **PLAIN)
KILLED_IN_THIRD_SAVE = """
import json, os, pathlib, signal, sys, torch
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
train(TrainConfig(**json.loads(sys.argv[2])), pathlib.Path(sys.argv[1]))
"""


def use_small_digits(monkeypatch, scale: int = 1, count: int = 100) -> data.DataSet:
    """Some digits, enlarged by ``scale``: a hundred of them are two steps in an epoch."""
    whole = data.load("digits")
    pixels = whole.train.pixels[:count].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    part = data.datasets.InMemory(pixels, whole.train.labels[:count])
    small = data.DataSet(part, part, whole.labels, whole.preprocessing)
    monkeypatch.setattr(data, "load", lambda *_: small)
    return small


@pytest.fixture
def small_digits(monkeypatch):
    return use_small_digits(monkeypatch)


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The folder of a run of :data:`ONE_EPOCH` on the small digits."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_digits(monkeypatch)
        train(ONE_EPOCH, out := tmp_path_factory.mktemp("run") / "out")
    return out


@pytest.fixture
def finished(tmp_path, one_epoch, small_digits):
    """A copy of that folder."""
    return shutil.copytree(one_epoch, tmp_path / "finished")


def entries(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def files(out) -> list[str]:
    """The names in a folder, without the events that are written where tensorboard is installed."""
    return sorted(path.name for path in out.iterdir() if path.name != "tensorboard")


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
    assert files(other) == RUN


def test_a_few_steps_lower_the_loss(tmp_path, small_digits):
    train(TrainConfig(epochs=6, batch_size=50, lr=5e-3, **PLAIN), tmp_path)
    losses = [entry["loss"] for entry in entries(tmp_path) if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


# With 8x8 pixels the last stage is 1x1, where PyTorch's bfloat16 gradient of a depthwise 3x3 stride-2 weight on the CPU
# holds uninitialised memory (seen in 2.13).
@pytest.mark.parametrize(("precision", "scale"), [("float32", 1), pytest.param("bfloat16", 2, marks=pytest.mark.full)])
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, precision, scale):
    use_small_digits(monkeypatch, scale)
    config = replace(CONFIG, precision=precision)
    train(config, tmp_path / "straight")
    resumed = False
    for part in ("train_step", "evaluate_epoch"):  # the state is saved between the two
        with monkeypatch.context() as patch:
            patch.setattr(Run, part, interrupted_in_third_epoch(getattr(Run, part)))
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "resumed", resume=resumed)
        resumed = True
        torch.rand(7)  # whatever else the process does with its generator does not matter
    assert [entry["epoch"] for entry in entries(tmp_path / "resumed") if "loss" in entry] == [1, 2]
    trained = []
    step = Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda run, *batch: (trained.append(run.epoch), step(run, *batch))[1])
    train(config, tmp_path / "resumed", resume=True)
    assert trained == [3, 3]
    assert_same_runs(tmp_path / "straight", tmp_path / "resumed")


def interrupted_in_third_epoch(part):
    def patched(run, *args):
        result = part(run, *args)
        if run.epoch == (3 if part.__name__ == "evaluate_epoch" else 2):
            raise KeyboardInterrupt
        return result

    return patched


def test_killed_while_saving_loses_nothing(tmp_path, small_digits):
    command = [sys.executable, "-c", KILLED_IN_THIRD_SAVE, str(tmp_path / "killed"), json.dumps(vars(CONFIG))]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["epoch"] == 1
    train(CONFIG, tmp_path / "killed", resume=True)
    train(CONFIG, tmp_path / "straight")
    assert_same_runs(tmp_path / "straight", tmp_path / "killed")


def test_a_run_is_not_overwritten(finished):
    before = (finished / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        train(ONE_EPOCH, finished)
    with pytest.raises(ValueError, match=r"the run has other options: lr 0\.002 \(now 0\.5\); leave them out"):
        train(replace(ONE_EPOCH, lr=0.5), finished, resume=True)
    assert (finished / "last.pt").read_bytes() == before


def test_epochs_may_grow(finished):
    train(replace(ONE_EPOCH, epochs=2, data="elsewhere"), finished, resume=True)
    log = entries(finished)
    assert [entry["config"]["epochs"] for entry in log if "config" in entry] == [1, 2]
    assert [entry["epoch"] for entry in log if "loss" in entry] == [1, 2]
    assert stored_config(finished) == replace(ONE_EPOCH, epochs=2, data="elsewhere")
    with pytest.raises(ValueError, match=r"the run has 2 epochs, got 1; expected no fewer$"):
        train(ONE_EPOCH, finished, resume=True)


def test_other_data_are_refused(finished, monkeypatch):
    use_small_digits(monkeypatch, count=99)
    with pytest.raises(
        ValueError, match=r"other data: 200 images \(now 198\), train/all 100 \(now 99\), test/all 100 "
    ):
        train(ONE_EPOCH, finished, resume=True)


def test_relabelled_data_are_refused(finished, small_digits):
    small_digits.test.labels[0] += 1
    try:  # the labels are those of every test
        with pytest.raises(
            ValueError, match=r"other data: 200 images \(now 200\), train/all has other names or labels, test/all "
        ):
            train(ONE_EPOCH, finished, resume=True)
    finally:
        small_digits.test.labels[0] -= 1


def test_options_come_from_the_run(finished):
    assert stored_config(finished) == ONE_EPOCH
    assert stored_config(finished, epochs=9, on_bad_image="skip") == replace(ONE_EPOCH, epochs=9, on_bad_image="skip")
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected the folder of a run to resume, got no folder$"):
        stored_config(finished / "nowhere")
    state = torch.load(finished / "last.pt", weights_only=True)
    state["config"]["momentum"] = 0.9
    torch.save(state, finished / "last.pt")
    with pytest.raises(ValueError, match=r"made by another version of mobilemamba, with the options momentum$"):
        stored_config(finished)


def test_moved_data_are_asked_for(finished, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: (_ for _ in ()).throw(FileNotFoundError("D: no such folder")))
    with pytest.raises(FileNotFoundError, match=r"^D: no such folder; if the data have moved, say where with --data$"):
        train(ONE_EPOCH, finished, resume=True)


def test_what_is_not_given_is_the_presets():
    config = TrainConfig(model="b1", data="folder:D")
    assert (config.drop_path, config.image_size) == (0.03, 256)
    config = TrainConfig(model="t2", data="folder:D", drop_path=0.2, image_size=64)
    assert (config.drop_path, config.image_size) == (0.2, 64)
    assert (TrainConfig(model="t2").drop_path, TrainConfig(model="t2").image_size) == (0.0, None)


def test_one_process_trains_in_a_folder(finished):
    unfinished = finished / ".last.pt.0.tmp"
    unfinished.touch()
    with RunFolder(finished).locked():
        assert not unfinished.exists()
        unfinished.touch()
        with pytest.raises(
            BlockingIOError, match=rf"finished: process {os.getpid()} on \S+ trains in this folder; wait"
        ):
            train(ONE_EPOCH, finished, resume=True)
        assert unfinished.exists()
    with RunFolder(finished).locked():  # the lock ended
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with RunFolder(tmp_path / "new").locked():
        pass
    assert (
        capsys.readouterr().err
        == f"{tmp_path}/new: this file system has no locks (No locks available); start no second run in it\n"
    )


def test_a_full_disk_leaves_the_last_state(tmp_path, finished):
    before = (finished / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # last.pt has 14 MB
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/new/last\.pt'"):
            train(ONE_EPOCH, tmp_path / "new")  # before it trains
        with pytest.raises(OSError, match=rf"File too large: '{finished}/last\.pt'"):
            train(replace(ONE_EPOCH, epochs=2), finished, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "new") == [".lock"]
    assert files(finished) == RUN
    assert (finished / "last.pt").read_bytes() == before


def test_a_bad_test_image_costs_no_epoch(tmp_path, monkeypatch):
    for i, name in enumerate(("train/ant/0", "train/bee/0", "val/ant/0", "val/bee/0", "val/bee/1")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 60), 40 + 10 * i).save(tmp_path / f"{name}.png")
    bad = tmp_path / "val/bee/1.png"
    bad.write_bytes(bad.read_bytes()[:1000] + bytes(40) + bad.read_bytes()[1040:])  # both ends stay
    config = TrainConfig(**{**PLAIN, "data": f"folder:{tmp_path}"}, image_size=16, epochs=1)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"val/bee/1\.png: not a readable image: .*--on-bad-image skip$"):
        train(config, out)
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 1
    monkeypatch.delattr(Run, "train_step")
    accuracy = train(stored_config(out, on_bad_image="skip"), out, resume=True)
    assert accuracy in (0, 0.5, 1)
    assert [entry["epoch"] for entry in entries(out) if "loss" in entry] == [1]
    assert entries(out)[-1] == {"test_accuracy": accuracy, "file": "model.pt", "bad_images": 1}


def test_evaluation_uses_the_batch_size(small_digits, monkeypatch):
    sizes = []
    normalize = data.Preprocessing.normalize
    monkeypatch.setattr(
        data.Preprocessing, "normalize", lambda self, pixels: (sizes.append(len(pixels)), normalize(self, pixels))[1]
    )
    Run(replace(ONE_EPOCH, batch_size=40), small_digits, torch.device("cpu")).measures()
    assert sizes == [40, 40, 20]


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
    train(ONE_EPOCH, tmp_path)
    assert files(tmp_path) == sorted([".mine.tmp", ".notes.pt.0.tmp", *RUN])


def test_an_unfinished_line_of_the_log_is_dropped(finished):
    whole = (finished / "log.jsonl").read_bytes()
    (finished / "log.jsonl").write_bytes(whole + b'{"test_accu\xff\0')
    train(ONE_EPOCH, finished, resume=True)
    assert [entry["epoch"] for entry in entries(finished) if "loss" in entry] == [1]


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
        (lambda state: state["config"].pop("erase"), r"erase 0.25 \(now 0.0\)"),
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
def test_a_state_of_another_run_is_refused(finished, change, message):
    state = torch.load(finished / "last.pt", weights_only=True)
    change(state)
    torch.save(state, finished / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt: .*{message}") as caught:
        train(ONE_EPOCH, finished, resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_that_ended_before_its_first_step_is_forgotten(tmp_path, small_digits, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            train(ONE_EPOCH, tmp_path)
    assert files(tmp_path) == [".lock"]
    train(ONE_EPOCH, tmp_path)
    assert files(tmp_path) == RUN


def test_mixing_needs_pairs(small_digits, monkeypatch):
    monkeypatch.setattr(data.Augmentation, "batch_transform", lambda *_: None)  # needs no library
    with pytest.raises(ValueError, match=r"batch_size: mixup and cutmix need an even number of images .* got 25"):
        Run(replace(ONE_EPOCH, batch_size=25, mixup=0.5), small_digits, torch.device("cpu"))


def test_the_published_recipes():
    """The configurations state 1.5e-3 for 512 images; the trainer of the authors scales it with the batch."""
    plain, distilled = (TrainConfig(**recipe(name)) for name in ("published-300", "published-1000"))
    assert (plain.lr, plain.batch_size, plain.warmup_epochs, plain.ema_decay) == (3e-3, 1024, 20, 0.9998)
    assert (plain.epochs, distilled.epochs) == (300, 1000)
    assert replace(distilled, teacher="nano").distill_weight == 5.0
    rates = [learning_rate(step, 300, 20, plain.lr) for step in (0, 20, 300)]
    assert rates == pytest.approx([3e-6, 3e-3, 3e-5])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, small_digits):
    with pytest.raises(FloatingPointError, match="expected finite values"):
        train(TrainConfig(epochs=2, batch_size=50, lr=1e30, warmup_epochs=0, **PLAIN), tmp_path)
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"shift": -1}, "shift must be at least 0, got -1"),
        ({"widths": (96, 192)}, r"widths must be 3 numbers, one for each stage, got \(96, 192\)"),
        ({"model_options": '{"num_classes": 3}'}, "^model_options: expected no num_classes: --data determines it$"),
        ({"model_options": '{"mixr": "ttt"}'}, "^model_options: expected arguments of MobileMamba, got 'mixr'$"),
        (
            {"widths": (16, 16, 16), "model_options": '{"depths": [1, 1]}'},
            "widths must be 2 numbers, one for each stage",
        ),
        ({"mixup": math.nan}, "mixup must be at least 0, got nan"),
        ({"warmup_epochs": 30.0}, "warmup_epochs must be at most the 20 epochs, got 30.0"),
        ({"lr": math.inf}, "lr must be positive, got inf"),
        ({"temperature": 2.0}, "temperature is for --teacher and --distill soft; it would have no effect"),
        ({"teacher": "nano", "distill": "hard", "temperature": 2.0}, "temperature is for --teacher and --distill soft"),
        ({"distill": "hard"}, "distill is for --teacher"),
        ({"mix_prob": 0.5}, "mix_prob is for --mixup or --cutmix"),
        ({"interpolation": "random"}, "interpolation is for --crop-scale or --rand-augment"),
        ({"compile": True, "grad_checkpointing": True}, "grad_checkpointing is for a run without --compile"),
        ({"precision": "half"}, "precision must be float32 or bfloat16 or float16, got half"),
        ({"erase": 1.5}, "erase must be from 0 to 1, got 1.5"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be fail or skip, got ignore"),
        ({"model": "s7"}, "unknown model 's7'"),
        ({"seed": -(2**40)}, r"seed must be from 0 up to 2\*\*40, got -1099511627776"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_stored_weights_can_be_half(tmp_path, small_digits):
    accuracy = train(replace(ONE_EPOCH, half=True), tmp_path)
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


def test_moving_average():
    model = torch.nn.BatchNorm1d(2)
    average = moving_average(model, decay=0.5)

    def step(weight: float, var: float, batches: int) -> None:
        with torch.no_grad():
            model.weight.fill_(weight)
            model.running_var.fill_(var)
            model.num_batches_tracked.fill_(batches)
        average.update_parameters(model)

    step(1.0, 1.0, 1)  # the first state is copied
    step(3.0, 11.0, 7)  # warm-up: decay 2/11
    assert average.module.weight.tolist() == pytest.approx([2 / 11 + 9 / 11 * 3] * 2)
    assert average.module.running_var.tolist() == pytest.approx([2 / 11 + 9 / 11 * 11] * 2)
    assert average.module.num_batches_tracked == 7
    assert not average.module.training
    average.n_averaged.fill_(10_000)
    step(3.0, 11.0, 8)
    assert average.module.weight.tolist() == pytest.approx([(2 / 11 + 9 / 11 * 3 + 3) / 2] * 2)


def test_float16_scales_the_loss_and_skips_what_overflows(tmp_path, small_digits, monkeypatch):
    scales, weights = [], []
    loss, step = Run.loss, Run.train_step

    def overflowing(run, images, targets):
        return loss(run, images * math.inf if not scales else images, targets)

    def watched(run, *batch):
        result = step(run, *batch)
        scales.append(run.scaler.get_scale())
        weights.append(run.model.head.linear.weight.detach().clone())
        assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())  # statistics too
        assert all(tensor.isfinite().all() for tensor in run.ema.state_dict().values())
        return result

    monkeypatch.setattr(Run, "loss", overflowing)
    monkeypatch.setattr(Run, "train_step", watched)
    initial = Run(replace(ONE_EPOCH, precision="float16"), small_digits, torch.device("cpu")).model.head.linear.weight
    train(replace(ONE_EPOCH, precision="float16"), tmp_path)
    assert scales == [2.0**15, 2.0**15]
    assert torch.equal(weights[0], initial)
    assert not torch.equal(weights[1], initial)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["scaler"]["scale"] == 2.0**15
    assert math.isfinite(entries(tmp_path)[1]["loss"])


def test_events_for_tensorboard(tmp_path, small_digits):
    reason = "needs tensorboard: pip install 'mobilemamba[train]'"
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    train(replace(ONE_EPOCH, epochs=2), tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    written = [entry["ema_accuracy"] for entry in entries(tmp_path) if "loss" in entry]
    assert [event.value for event in events.Scalars("ema_accuracy")] == pytest.approx(written)


@pytest.mark.full
def test_compiled_training_has_the_same_losses(tmp_path, small_digits):
    train(ONE_EPOCH, tmp_path / "eager")
    train(replace(ONE_EPOCH, compile=True), tmp_path / "compiled")
    losses = [
        [entry["loss"] for entry in entries(tmp_path / name) if "loss" in entry] for name in ("eager", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
