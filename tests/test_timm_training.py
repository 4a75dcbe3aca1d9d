"""Training with timm: its groups, optimizers and averages, and the calls of its scripts train.py and validate.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
from timm.models._manipulate import group_parameters

import mobilemamba.timm  # noqa: F401

SMALL = "mobilemamba_nano"


def test_groups_and_optimizers() -> None:
    model = timm.create_model(SMALL).eval()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    order = ["patch_embed.0.conv.weight", "stages.0.blocks.0.ffn0.expand.conv.weight"]
    order += ["stages.1.transition.0.norm.weight", "stages.1.blocks.0.mixer.proj.norm.weight"]
    order += ["stages.1.blocks.1.mixer.proj.norm.weight", "stages.2.transition.0.norm.weight", "head.linear.bias"]
    found = [next(groups[name] for name in groups if name.startswith(start.rsplit(".", 3)[0])) for start in order]
    assert found == sorted(found)
    assert len(set(groups.values())) == 1 + 2 + 4 + 1  # stem, transitions, blocks, head
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 1 + 3 + 1
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert {1.0, 0.5**7} <= scales
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = [parameter for name, parameter in model.named_parameters() if name in model.no_weight_decay()]
    assert spared
    assert decayed.isdisjoint(map(id, spared))
    assert id(model.head.linear.weight) in decayed


def test_moving_average() -> None:
    model = timm.create_model(SMALL).eval()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update(model)
    weight = model.head.linear.weight
    torch.testing.assert_close(average.module.head.linear.weight, weight - 0.5)
    assert average.module.fuse().fused


# The scripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes that lie, stand and lean: 32 images of each for training, and 16 for validation."""
    root = tmp_path_factory.mktemp("stripes")
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    for split, count in (("train", 32), ("validation", 16)):
        for label, position in (("lean", x + y), ("lie", y), ("stand", x)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                phase, period = (torch.rand(2, generator=generator) * torch.tensor([6.3, 0.4])).tolist()
                grey = 0.5 + 0.4 * torch.sin(position * (0.8 + period) + phase)
                pixels = (grey + 0.1 * torch.randn(40, 40, generator=generator)).clamp(0, 1).mul(255).byte()
                Image.fromarray(pixels.numpy()).convert("RGB").save(root / split / label / f"{i}.png")
    return root


def loader(folder: Path, split: str, config: dict[str, Any], **options: Any) -> Any:
    dataset = timm.data.create_dataset("", root=folder, split=split, is_training=split == "train")
    config = {name: config[name] for name in ("input_size", "interpolation", "mean", "std")}
    return timm.data.create_loader(
        dataset, batch_size=16, num_workers=0, device=torch.device("cpu"), **config, **options
    )


@torch.inference_mode()
def validate(model: nn.Module, batches: Any) -> float:
    """Top-1 in percent, with the calls of validate.py."""
    top1 = timm.utils.AverageMeter()
    for images, labels in batches:
        (accuracy,) = timm.utils.accuracy(model.eval()(images), labels, topk=(1,))
        top1.update(accuracy.item(), len(labels))
    return top1.avg


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["plain", "two heads"])
def test_the_scripts(folder: Path, tmp_path: Path, kind: str) -> None:
    """The calls of train.py with mixup, clipping, moving average, checkpoints and resume; then those of validate.py."""
    task_module = pytest.importorskip("timm.task")
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 3, "in_chans": 3, "drop_rate": 0.0, "drop_path_rate": 0.05}
    model = timm.create_model(SMALL, pretrained=kind == "plain", distillation=kind != "plain", **options)
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    mix = {"mixup_alpha": 0.1, "label_smoothing": 0.1, "num_classes": 3}
    train = loader(folder, "train", config, is_training=True, collate_fn=timm.data.FastCollateMixup(**mix), hflip=0.0)
    evaluation = loader(folder, "validation", config, crop_pct=1.0)
    criterion = timm.loss.SoftTargetCrossEntropy()
    if kind == "plain":
        task = task_module.ClassificationTask(model=model, criterion=criterion, device="cpu", verbose=False)
    else:
        task = task_module.TokenDistillationTask(
            student_model=model, teacher_model=timm.create_model(SMALL, **options), criterion=criterion, device="cpu"
        )
    model = task.get_trainable_module()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, epochs = timm.scheduler.create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=12 if kind == "plain" else 2,
        warmup_epochs=1,
        updates_per_epoch=len(train),
        step_on_epochs=False,
    )
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), max_history=1
    )
    step = 0
    for epoch in range(epochs):
        model.train()
        for images, targets in train:
            loss = task(images, targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            timm.utils.dispatch_clip_grad(task.get_clip_parameters(), value=1.0, mode="norm")
            optimizer.step()
            step += 1
            average.update(model, step=step)
            scheduler.step_update(num_updates=step)
        saver.save_checkpoint(epoch, metric=validate(average.module, evaluation))

    path = tmp_path / "model_best.pth.tar"
    found = timm.create_model(SMALL, num_classes=3, in_chans=3, distillation=kind != "plain", checkpoint_path=path)
    if kind == "plain":
        assert validate(found, evaluation) > 80  # chance is 33
        assert validate(found.eval().fuse(), evaluation) == pytest.approx(validate(found, evaluation), abs=2.2)
    assert timm.models.resume_checkpoint(found, str(tmp_path / "last.pth.tar"), optimizer) == epochs
