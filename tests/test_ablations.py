"""MRFFI without some of its parts, other numbers of stages, other mixers: each trains, folds, and is exported."""

import pytest
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import weights
from mobilemamba.deploy import export, portable
from mobilemamba.weights.identify import fitting_presets

#: Of nano: arguments that leave out one part of MRFFI, or several.
PARTS = {
    "no global part": {"global_ratios": (0.0, 0.0, 0.0)},
    "no local part": {"local_ratios": (0.0, 0.0, 0.0)},
    "no identity part": {"local_ratios": (1.0, 1.0, 1.0)},
    "no wavelet": {"wavelet_kernels": (0, 0, 0)},
    "one direction": {"directions": 1},
    "one direction, no wavelet": {"directions": 1, "wavelet_kernels": (0, 0, 0)},
    "no wavelet in one stage": {"wavelet_kernels": (5, 0, 3)},
    "local part alone": {"global_ratios": (0.0, 0.0, 0.0), "local_ratios": (1.0, 1.0, 1.0)},
    "identity part alone": {"global_ratios": (0.0, 0.0, 0.0), "local_ratios": (0.0, 0.0, 0.0)},
    "global part alone, no wavelet": {"global_ratios": (1.0, 1.0, 1.0), "wavelet_kernels": (0, 0, 0)},
}

SIZES = [(2, 1, 28, 28), (3, 1, 19, 33), (1, 1, 1, 1)]


def trained(**options) -> mobilemamba.MobileMamba:
    """nano as after training: with statistics, and branches that are not zero."""
    torch.manual_seed(0)
    model = mobilemamba.nano(**{"depths": (1, 1, 1), **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
    for block in (module for module in model.modules() if hasattr(module, "base_scale")):
        nn.init.uniform_(block.base_scale, 0.5, 1.5)
    return model.eval()


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_what_remains_of_mrffi_learns_and_folds(options):
    model = trained(**options)
    model.train()(torch.randn(4, 1, 20, 20)).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    fused = model.fuse()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(size)
            expected = model(images)
            for network in (fused, fused.fuse()):
                assert error(network(images), expected) < 1e-4
        half = fused.to(torch.bfloat16)(images.bfloat16())
        assert error(half, expected) < 0.1


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
@torch.no_grad()
def test_what_remains_of_mrffi_in_standard_operators(options):
    model = trained(**options)
    for basic in (False, True):
        form = portable(model, basic=basic)
        for size in SIZES:
            images = torch.randn(size)
            assert error(form(images), model(images)) < 1e-5


@pytest.mark.parametrize("options", [PARTS["no global part"], PARTS["one direction, no wavelet"]], ids=str)
def test_what_remains_of_mrffi_is_exported(options, tmp_path):
    """export() compares the file with the model, at sizes that were not the example's."""
    model, preprocessing = trained(**options), weights.entry("nano").preprocessing
    for fuse in (True, False):
        export(model, tmp_path / "model.pt", "torchscript", preprocessing=preprocessing, fuse=fuse)


@torch.no_grad()
def test_one_direction_sees_only_earlier_pixels():
    torch.manual_seed(0)
    mixer = mobilemamba.models.global_part.SS2D(16, directions=1).double().eval()
    mixer.conv.weight[:, :, 0] = mixer.conv.weight[:, :, 2] = 0  # its other taps see later pixels too
    mixer.conv.weight[:, :, 1, 0] = mixer.conv.weight[:, :, 1, 2] = 0
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2, 1] += 1.0
    differs = (mixer(x) != mixer(changed)).any(1).flatten()
    assert not differs[:9].any()
    assert differs[9:].all()


def test_refused_parts():
    refused = [
        ({"wavelet_kernels": (2, 3, 3)}, "wavelet_kernel: expected an odd number, got 2"),
        ({"wavelet_kernels": (-1, 3, 3)}, "wavelet_kernel: expected an integer of at least 1, got -1"),
        ({"directions": 3}, "directions: expected 1 or 2, got 3"),
        ({"global_ratios": (0.01, 0.7, 0.6)}, "global_ratio=0.01 of 48 channels gives a global part of 0 channels"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            mobilemamba.nano(**options)


#: A network of four stages for images of 3 channels: the stem at a quarter, then 8, 16 and 32 pixels.
FOUR_STAGES = {
    "in_chans": 3,
    "widths": (16, 32, 48, 64),
    "depths": (1, 0, 2, 1),
    "global_ratios": (0.8, 0.8, 0.7, 0.6),
    "local_ratios": (0.2, 0.2, 0.2, 0.3),
    "wavelet_kernels": (7, 7, 5, 3),
    "local_kernels": ((7,), (7,), (5,), (3,)),
    "patch_strides": (2, 2),
}


def test_four_stages():
    model, images = trained(**FOUR_STAGES), torch.randn(2, 3, 70, 45)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    with torch.no_grad():
        maps, fused = model.forward_features(images, stages=True), model.fuse()
        shapes = [(2, 16, 18, 12), (2, 32, 9, 6), (2, 48, 5, 3), (2, 64, 3, 2)]
        assert [tuple(x.shape) for x in maps] == shapes
        assert fused.fused, "one operator stands for all stages"
        for x, expected in zip(fused.forward_features(images, stages=True), maps, strict=True):
            assert error(x, expected) < 1e-4
        for network in (fused, torch.jit.script(fused), portable(model)):
            assert error(network(images), model(images)) < 1e-4
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_feature_maps_of_four_stages():
    features = mobilemamba.feature_extractor("nano", **FOUR_STAGES).eval()
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    assert features.out_channels == list(FOUR_STAGES["widths"])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused = features.fuse()(images)
        assert list(fused) == ["0", "1", "2", "3"]
        for name, x in features(images).items():
            assert error(fused[name], x) < 1e-4
    last = mobilemamba.FeatureExtractor(features.body, (3,), frozen_stages=4)
    assert not any(parameter.requires_grad for parameter in last.parameters())


def test_two_stages_and_one():
    images = torch.randn(2, 1, 28, 28)
    for count in (1, 2):
        per_stage = {"widths": (32, 48), "depths": (1, 1), "global_ratios": (0.5, 0.4), "local_ratios": (0.2, 0.2)}
        per_stage |= {"wavelet_kernels": (3, 3), "local_kernels": ((3,), (3,))}
        model = trained(**{name: value[:count] for name, value in per_stage.items()})
        with torch.no_grad():
            assert error(model.fuse()(images), model(images)) < 1e-4
        assert model.fuse().fused


def test_a_list_for_another_number_of_stages_is_refused():
    for name in ("depths", "global_ratios", "local_ratios", "wavelet_kernels", "local_kernels"):
        options = {**FOUR_STAGES, name: FOUR_STAGES[name][:3]}
        with pytest.raises(ValueError, match=rf"^{name}: expected a tuple of 4, got"):
            mobilemamba.nano(**options)


def test_checkpoints_keep_stages_and_switches(tmp_path):
    for options in (FOUR_STAGES, PARTS["one direction, no wavelet"], PARTS["no global part"]):
        model = trained(**options)
        args = {"depths": (1, 1, 1), **options}
        stored = weights.Checkpoint(model.state_dict(), "nano", args)
        weights.save(tmp_path / "model.safetensors", stored)
        again, found = mobilemamba.open_model(tmp_path / "model.safetensors")
        assert found.preset == "nano"
        images = torch.randn(1, model.in_chans, 20, 20)
        assert torch.equal(again.eval()(images), model(images))


def test_a_network_of_more_stages_is_no_preset():
    assert fitting_presets(mobilemamba.nano().state_dict()) == ["nano"]
    four = mobilemamba.nano(**{**FOUR_STAGES, "widths": (48, 96, 128, 128), "depths": (1, 2, 1, 1)})
    assert fitting_presets(four.state_dict()) == []
