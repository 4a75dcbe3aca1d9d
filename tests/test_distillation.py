"""Distillation: the losses, teachers from every source, and the images that a teacher gets."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobilemamba
from mobilemamba import data, weights
from mobilemamba.data import DataSet, Preprocessing
from mobilemamba.data.splits import InMemory
from mobilemamba.training import TrainConfig, open_teacher, train
from mobilemamba.training.distillation import Teacher, hard_loss, soft_loss
from mobilemamba.training.run import Run

STUDENT = weights.entry("nano").preprocessing
LABELS = weights.entry("nano").labels
PLAIN = {"flip": False, "shift": 0, "erase": 0.0}
CPU = torch.device("cpu")


def opened(teacher: str | Path, **options) -> Teacher:
    return open_teacher(TrainConfig(teacher=str(teacher), **options), STUDENT, LABELS, CPU)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return STUDENT.normalize(torch.randint(0, 256, (3, 1, 28, 28), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def logits(images) -> Tensor:
    with torch.no_grad():
        return mobilemamba.nano(pretrained=True).eval()(images)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_losses(temperature):
    torch.manual_seed(0)
    own, aim = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = ((x / temperature).softmax(1) for x in (aim, own))
    expected = temperature**2 * (p * (p / q).log()).sum() / 5
    assert float(soft_loss(own, aim, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(soft_loss(own, own, temperature)) == pytest.approx(0, abs=1e-6)
    assert float(hard_loss(own, aim)) == pytest.approx(float(-own.log_softmax(1)[range(5), aim.argmax(1)].mean()))


@pytest.mark.parametrize("name", ["nano", "nano:plain"])
def test_a_preset(images, logits, name):
    torch.testing.assert_close(opened(name)(images), logits, rtol=1e-3, atol=1e-3)


EXPORTED = pytest.param("exported", marks=pytest.mark.full)  # takes 13 s


@pytest.mark.parametrize("kind", ["checkpoint", "torchscript", "foreign torchscript", EXPORTED])
def test_files(tmp_path, images, logits, kind):
    model = mobilemamba.nano(pretrained=True).eval()
    path, options = tmp_path / "teacher.pt", {}
    if kind == "checkpoint":
        weights.save(path, weights.Checkpoint(model.state_dict(), "nano", {"num_classes": 10}, None, STUDENT))
    elif kind == "torchscript":
        mobilemamba.export(model, path, "torchscript", preprocessing=STUDENT)
    elif kind == "foreign torchscript":
        torch.jit.script(model).save(path)
    else:
        path = tmp_path / "teacher.pt2"
        varying = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=varying), path)
    torch.testing.assert_close(opened(path, **options)(images), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.full
def test_a_compiled_file(tmp_path, images, logits):
    path = tmp_path / "teacher.pt2"
    mobilemamba.export(mobilemamba.nano(pretrained=True), path, "aoti", preprocessing=STUDENT)
    torch.testing.assert_close(opened(path)(images), logits, rtol=1e-3, atol=1e-3)


def test_a_network_of_timm(monkeypatch):
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'mobilemamba[train]'", exc_type=ImportError)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=10))
    student = Preprocessing(resize=64, crop=64)
    teacher = open_teacher(TrainConfig(teacher="resnet10t.c3_in1k"), student, LABELS, CPU)
    assert (teacher.size, teacher.mean) == (176, (0.485, 0.456, 0.406))
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 10)


class Seen(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean((2, 3))


def test_images_have_the_preprocessing_of_the_teacher():
    student = Preprocessing(resize=32, crop=32)
    seen = Seen()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    normal = student.normalize(pixels)
    Teacher(seen, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), student)(normal)
    torch.testing.assert_close(seen.images, pixels / 255, rtol=0, atol=1e-6)
    Teacher(seen, 20, student.mean, student.std, student)(normal)
    expected = F.interpolate(normal, (20, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen.images, expected)
    Teacher(seen, 48, student.mean, student.std, student)(normal)
    torch.testing.assert_close(seen.images, F.interpolate(normal, (48, 48), mode="bicubic"))


@pytest.fixture
def small(monkeypatch) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8, generator=generator)
    part = InMemory(pixels, torch.arange(16) % 10)
    dataset = DataSet(part, part, LABELS, STUDENT)
    monkeypatch.setattr(data, "load", lambda *_: dataset)
    return dataset


@pytest.mark.parametrize(("distill", "heads"), [("soft", 1), ("hard", 2)])
def test_the_teacher_is_asked_once_a_batch_without_gradients(tmp_path, small, monkeypatch, distill, heads):
    config = TrainConfig(teacher="nano", distill=distill, epochs=1, batch_size=8, accumulate=2, **PLAIN)
    calls = []
    call = Teacher.__call__

    def counted(teacher: Teacher, images: Tensor) -> Tensor:
        calls.append(len(images))
        result = call(teacher, images)
        assert not result.requires_grad
        return result

    monkeypatch.setattr(Teacher, "__call__", counted)
    train(config, tmp_path)
    assert calls == [2, *[4] * 4]  # the check, then two batches in two parts
    _, stored = mobilemamba.zoo.open_model(tmp_path / "model.pt")
    assert bool(stored.model_args.get("distillation")) == (heads == 2)


def test_the_loss_has_both_terms(small, images, logits):
    labels = F.one_hot(torch.tensor([1, 2, 3]), 10).float()
    parts = []
    for options in ({}, {"teacher": "nano"}, {"teacher": "nano", "distill_weight": 0.5, "temperature": 2.0}):
        run = Run(TrainConfig(pretrained="plain", freeze_norm=True, batch_size=8, **PLAIN, **options), small, CPU)
        run.model.eval()
        parts.append(float(run.loss(images + 0.3, labels).detach()))
    assert parts[1] == pytest.approx(parts[0], rel=1e-3)  # the student is the teacher
    run = Run(TrainConfig(batch_size=8, teacher="nano", distill_weight=0.5, temperature=2.0, **PLAIN), small, CPU)
    own = run.model.eval()(images)
    expected = F.cross_entropy(own, labels) + 0.5 * soft_loss(own, logits, 2.0)
    assert float(run.loss(images, labels).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"teacher": "none.pt"}, FileNotFoundError, "teacher: no such file: none.pt"),
        ({"teacher": "s6:best"}, ValueError, "expected a file, a preset or a model of timm, got 's6:best'"),
        ({"teacher": "nano", "teacher_mean": (0.0, 0.0, 0.0)}, ValueError, "images of 1 channels as the data have"),
    ],
)
def test_refusals(options, kind, message):
    if "timm" in message:
        pytest.importorskip("timm", reason="needs timm: pip install 'mobilemamba[train]'", exc_type=ImportError)
    with pytest.raises(kind, match=message):
        open_teacher(TrainConfig(**options), STUDENT, LABELS, CPU)


def test_other_classes_are_refused(tmp_path):
    digits = tuple(map(str, range(10)))
    message = (
        r"teacher nano: expected the 10 classes of the data, 0, 1, 2 and 7 more; it knows 10, T-shirt/top, trouser, "
    )
    with pytest.raises(ValueError, match=message):
        open_teacher(TrainConfig(teacher="nano"), STUDENT, digits, CPU)
    torch.jit.script(mobilemamba.nano()).save(tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"expected logits for the 7 classes of the data, got the shape \[10\]"):
        open_teacher(TrainConfig(teacher=str(tmp_path / "teacher.pt")), STUDENT, digits[:7], CPU)
