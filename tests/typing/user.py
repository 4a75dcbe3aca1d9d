"""Calls of a user, all of them right: ``mypy --strict`` has nothing to say. Checked by test_typing.py, never run."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import mobilemamba
from mobilemamba import MRFFI, MobileMamba, create_model, ops, training, weights
from mobilemamba.data import Preprocessing


def models() -> None:
    assert_type(mobilemamba.s6(), MobileMamba)
    assert_type(mobilemamba.b1(pretrained="distilled"), MobileMamba)
    assert_type(mobilemamba.t2(Path("mine.pt"), num_classes=10, in_chans=1, distillation=True), MobileMamba)
    assert_type(mobilemamba.nano(True, local_kernels=((3, 5), (3,), (3,)), drop_path_rate=0.1), MobileMamba)
    assert_type(create_model("s6", Path("mine.pt"), allow_head_mismatch=True, num_classes=10), MobileMamba)
    assert_type(MobileMamba(10, widths=(48, 96, 128), depths=(1, 2, 1)), MobileMamba)
    assert_type(mobilemamba.list_models(), list[str])
    model, checkpoint = mobilemamba.open_model(weights.entry("nano"))
    assert_type(model, MobileMamba)
    assert_type(checkpoint, weights.Checkpoint)


class Detector(nn.Module):
    def __init__(self, backbone: MobileMamba) -> None:
        super().__init__()
        self.backbone = backbone
        self.laterals = nn.ModuleList(nn.Conv2d(info["num_chs"], 64, 1) for info in backbone.feature_info)
        self.strides = [info["reduction"] for info in backbone.feature_info]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone.forward_features(images, stages=True)
        return [lateral(m) for lateral, m in zip(self.laterals, maps, strict=True)]


def features(model: MobileMamba, images: Tensor, stages: bool) -> None:
    assert_type(model.forward_features(images), Tensor)
    assert_type(model.forward_features(images, stages=False), Tensor)
    assert_type(model.forward_features(images, stages=True), list[Tensor])
    assert_type(model.forward_features(images, stages), Tensor | list[Tensor])
    assert_type(model.forward_stages(images), list[Tensor])
    assert_type(model.forward_head(model.forward_features(images), pre_logits=True), Tensor)
    assert_type(model.forward_head(model.forward_features(images)), Tensor | tuple[Tensor, Tensor])


def methods(model: MobileMamba) -> None:
    model.reset_classifier(100)
    model.reset_classifier(100, distillation=True)
    model.set_grad_checkpointing()
    assert_type(model.fuse(), MobileMamba)
    assert_type(model.fuse().to("cuda", torch.bfloat16), MobileMamba)
    assert_type(model.no_weight_decay(), set[str])
    assert_type(model.num_features, int)


def operators(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert_type(ops.depthwise_conv2d(x, weight, bias, stride=2, activation="relu"), Tensor)
    assert_type(ops.haar_conv2d(x, weight), Tensor)
    assert_type(ops.bidirectional_scan(x, x, x, x, x, x, x, x), Tensor)
    assert_type(ops.packed_conv2d(x, ops.pack_conv2d_weight(weight), x, kernel_size=3), Tensor)
    assert_type(ops.mrffi(x, None, [weight] * 20), Tensor)
    mixer = MRFFI(64, 0.8, 0.2, wavelet_kernel=3, local_kernels=(3, 5))
    assert_type(mixer.forward(x), Tensor)
    assert_type(mixer.forward(x, residual=x), Tensor)


def files(model: MobileMamba) -> None:
    entry = weights.entry("s6", distilled=True)
    prepare = entry.preprocessing.transforms()
    assert_type(prepare("image.jpg"), Tensor)
    assert_type(prepare(Path("image.jpg")), Tensor)
    assert_type(weights.download(entry), Path)
    assert_type(weights.load(Path("mine.pt")).preprocessing, Preprocessing | None)
    weights.load_into(model, weights.read("mine.pt").state_dict, allow_head_mismatch=True)
    difference = mobilemamba.export(model, "model.pt", "torchscript", preprocessing=entry.preprocessing, labels=["a"])
    assert_type(difference, float)


def run() -> None:
    config = training.TrainConfig(data="folder:images", image_size=64, precision="bfloat16", widths=(96, 192, 256))
    assert_type(training.train(config, Path("runs/mine"), device="cuda", resume=True), float)
    assert_type(config.image_size, int | None)
