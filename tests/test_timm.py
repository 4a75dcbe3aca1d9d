"""The models in timm's registry, checked as timm's own tests check theirs (its tests/test_models.py)."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from figures import make_input, small_cases
from PIL import Image
from torch import Tensor, nn

import mobilemamba
from mobilemamba import PRESETS, weights
from mobilemamba.models.heads import one_head

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")  # of the environment that has timm

from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

import mobilemamba.timm  # noqa: E402

ARCHITECTURES = [f"mobilemamba_{preset}" for preset in PRESETS]
SMALL = "mobilemamba_nano"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def lively(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode with random norms and statistics: no branch is zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def small(**options: Any) -> Any:
    return lively(timm.create_model(SMALL, **options))


def images(model: Any, batch: int = 2, limit: int = 64) -> Tensor:
    channels, height, width = model.default_cfg["input_size"]
    return torch.randn(batch, model.__dict__.get("in_chans", channels), min(height, limit), min(width, limit))


# The registry


def test_every_weights_entry_has_a_name() -> None:
    assert timm.list_models("mobilemamba*") == sorted(ARCHITECTURES)
    names = timm.list_pretrained("mobilemamba*")
    assert len(names) == len(weights.ENTRIES)
    assert {"mobilemamba_s6.in1k", "mobilemamba_s6.dist_in1k", "mobilemamba_nano.fashion_mnist"} <= set(names)
    assert timm.models.get_pretrained_cfg("mobilemamba_s6").tag == "in1k", "as mobilemamba.s6(pretrained=True)"


def test_the_library_is_not_hidden() -> None:
    """``import timm`` gives the library, in this package too."""
    assert mobilemamba.timm.build_model_with_cfg is timm.models.build_model_with_cfg
    assert timm.__name__ == "timm"


@pytest.mark.parametrize("entry", weights.ENTRIES, ids=lambda entry: f"{entry.preset}-{entry.variant}")
def test_preprocessing_is_ours(entry: weights.WeightsEntry) -> None:
    name = mobilemamba.timm._tagged(entry)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    mode = "RGB" if entry.preprocessing.channels == 3 else "L"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    theirs = timm.data.create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(theirs, entry.preprocessing.transforms()(image))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_default_cfg(name: str) -> None:
    model = timm.create_model(name).eval()
    cfg, tensors = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in tensors
    assert cfg["first_conv"] + ".weight" in tensors
    assert model.num_classes == cfg["num_classes"]
    assert model.in_chans == cfg["input_size"][0]
    x = images(model, 1, limit=448)
    side = math.ceil(x.size(-1) / model.feature_info[-1]["reduction"])
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, side, side)
    if x.size(-1) == cfg["input_size"][-1]:
        assert cfg["pool_size"] == (side, side)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


# One model


def test_the_issue_runs() -> None:
    model = timm.create_model(
        "mobilemamba_s6", pretrained=False, num_classes=10, in_chans=1, features_only=True, out_indices=(0, 1, 2)
    )
    maps = model(torch.randn(2, 1, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(2, 192, 4, 6), (2, 384, 2, 3), (2, 448, 1, 2)]
    assert model.feature_info.reduction() == [16, 32, 64]


@torch.no_grad()
def test_outputs_are_the_packages() -> None:
    ours = lively(mobilemamba.nano())
    model = timm.create_model(SMALL).eval()
    model.load_state_dict(ours.state_dict())
    x = images(model)
    assert torch.equal(model(x), ours(x))
    fused = model.fuse()
    torch.testing.assert_close(fused(x), ours(x), rtol=1e-4, atol=1e-4)
    assert fused.fused_head
    assert fused.default_cfg == model.default_cfg


@pytest.mark.parametrize("distillation", [False, True])
def test_backward(distillation: bool) -> None:
    model = timm.create_model(SMALL, num_classes=42, distillation=distillation, drop_rate=0.1, drop_path_rate=0.1)
    outputs = lively(model).train()(images(model, 4))
    assert outputs.shape == (4, 42)
    outputs.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_checkpointing_changes_nothing() -> None:
    model = small().train()
    x = images(model)
    expected = copy.deepcopy(model)(x)
    model.set_grad_checkpointing()
    outputs = model(x)
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_dropout_and_pooling() -> None:
    model = small(drop_rate=0.5)
    x = images(model)
    features = model.forward_features(x)
    assert not torch.equal(model.train().forward_head(features, True), model.forward_head(features, True))
    assert torch.equal(model.eval().forward_head(features, True), features.mean((2, 3)))
    maps = small(num_classes=0, global_pool="")
    assert maps(x).shape == (2, 128, 2, 2)
    assert maps.fuse()(x).shape == (2, 128, 2, 2)


def test_classifier() -> None:
    model = small()
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(images(model)).shape == (2, 7)
    assert model.get_classifier().linear.out_features == 7
    two = small(distillation=True)
    assert two.get_classifier() == (two.head.labels, two.head.teacher)
    head = model.head
    with pytest.raises(ValueError, match="global_pool: expected 'avg' for a head of 6 classes, got ''"):
        model.reset_classifier(6, "")
    assert model.head is head  # a refused call loses nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max"}, "global_pool: expected 'avg' or '', got 'max'"),
        ({"global_pool": ""}, "global_pool: expected 'avg' for a head of 10 classes"),
        ({"drop_rate": 1.0}, "drop_rate: expected a number of at least 0 and below 1, got 1.0"),
        ({"pretrained": True, "cache_dir": "here"}, "cache_dir: expected None for the published weights"),
        ({"pretrained": True, "distillation": True}, "expected weights with two heads for distillation=True, got one"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(SMALL, **options)


def test_device_and_type() -> None:
    assert timm.create_model(SMALL, device="meta").head.linear.weight.is_meta
    model = timm.create_model(SMALL, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images(model).bfloat16()).dtype == torch.bfloat16


# Compilers


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("distillation", [pytest.param(False, marks=pytest.mark.full), True])
@torch.no_grad()
def test_torchscript(fuse: bool, distillation: bool) -> None:
    model = small(distillation=distillation, scriptable=True)
    model = model.fuse() if fuse else model
    x = images(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("fuse", [pytest.param(False, marks=pytest.mark.full), True])
@torch.no_grad()
def test_export(fuse: bool) -> None:
    model = small().fuse() if fuse else small()
    x = images(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = torch.cat([x, x])
    torch.testing.assert_close(program.module()(x), model(x))


def traced(model: nn.Module) -> nn.Module:
    kwargs = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train, evaluation = get_graph_node_names(model, tracer_kwargs={**kwargs, "param_shapes_constant": True})
    return create_feature_extractor(
        model,
        train_return_nodes=train[-1:],
        eval_return_nodes=evaluation[-1:],
        tracer_kwargs={**kwargs, "param_shapes_constant": True},
    )


def test_fx() -> None:
    model = small(num_classes=42)
    x = images(model)
    with torch.inference_mode():
        (outputs,) = traced(model)(x).values()
        assert torch.equal(outputs, model(x))
        (scripted,) = torch.jit.script(traced(model))(x).values()
        torch.testing.assert_close(scripted, outputs)
    (outputs,) = traced(model).train()(x).values()
    outputs.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Feature maps


@pytest.mark.parametrize("kind", [None, "hook", "fx"])
@pytest.mark.parametrize("indices", [None, (0, 2), (1,), 2])
@torch.no_grad()
def test_features_only(kind: str | None, indices: Any) -> None:
    options = {} if indices is None else {"out_indices": indices}
    options |= {} if kind is None else {"feature_cls": kind}
    torch.manual_seed(0)
    network = timm.create_model(SMALL, features_only=True, **options).eval()
    torch.manual_seed(0)
    expected = timm.create_model(SMALL).eval().forward_stages(x := torch.randn(2, 1, 28, 20))
    maps = network(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    wanted = {None: (0, 1, 2), 2: (1, 2)}.get(indices, indices)
    assert network.feature_info.channels() == [(48, 96, 128)[i] for i in wanted]
    assert network.feature_info.reduction() == [(4, 8, 16)[i] for i in wanted]
    for found, i in zip(maps, wanted, strict=True):
        torch.testing.assert_close(found, expected[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_timms_classes_for_sequential_models_refuse(kind: str) -> None:
    with pytest.raises(AssertionError, match=r"Return layers .* are not present in model"):
        timm.create_model(SMALL, features_only=True, feature_cls=kind)


@torch.no_grad()
def test_features_fuse() -> None:
    network = timm.create_model(SMALL, features_only=True, pretrained=True).eval()
    x = torch.randn(2, 1, 28, 28)
    for fast in (copy.deepcopy(network), timm.utils.reparameterize_model(network)):
        fast.model = fast.model if fast.model.fused else fast.model.fuse()
        assert fast.model.fused
        for found, expected in zip(fast(x), network(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_forward_intermediates(fuse: bool) -> None:
    model = small().fuse() if fuse else small()
    x = torch.randn(2, 1, 28, 20)
    last, maps = model.forward_intermediates(x)
    assert FeatureInfo(model.feature_info, 3).channels() == [m.size(1) for m in maps]
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(last, maps[2])
    for indices, expected in (((0, 2), [0, 2]), (2, [1, 2]), ([-2], [1]), ([0], [0])):
        for early in (False, True):
            found = model.forward_intermediates(x, indices, norm=True, stop_early=early, intermediates_only=True)
            for one, i in zip(found, expected, strict=True):
                torch.testing.assert_close(one, maps[i], rtol=1e-4, atol=1e-4)
    last, _ = model.forward_intermediates(x, [0], stop_early=True)
    assert last.shape == maps[0].shape
    for one, other in zip(model.forward_intermediates(x, output_fmt="NHWC")[1], maps, strict=True):
        assert torch.equal(one, other.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_prune_intermediate_layers() -> None:
    model = small()
    x = images(model)
    expected = model.forward_stages(x)
    assert copy.deepcopy(model).prune_intermediate_layers(1, prune_head=False) == [2]
    assert model.prune_intermediate_layers([0, -2]) == [0, 1]
    assert len(model.stages) == 2
    assert model.num_features == model.head_hidden_size == 96
    assert torch.equal(model(x), expected[1])
    torch.testing.assert_close(model.fuse()(x), expected[1], rtol=1e-4, atol=1e-4)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


# Weights


@torch.no_grad()
def test_pretrained() -> None:
    x = torch.randn(2, 1, 28, 28)
    expected = mobilemamba.nano(pretrained=True).eval()
    assert torch.equal(timm.create_model(SMALL, pretrained=True).eval()(x), expected(x))
    maps = timm.create_model(SMALL, pretrained=True, features_only=True).eval()(x)
    assert all(map(torch.equal, maps, expected.forward_stages(x)))
    three = timm.create_model(SMALL, pretrained=True, in_chans=3, num_classes=5).eval()
    features = mobilemamba.nano(pretrained=True, in_chans=3).eval().forward_features(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(three.forward_features(x.expand(-1, 3, -1, -1)), features)
    assert three(x.expand(-1, 3, -1, -1)).shape == (2, 5)
    pooled = timm.create_model(SMALL, pretrained=True, num_classes=0).eval()(x)
    torch.testing.assert_close(pooled, expected.forward_features(x).mean((2, 3)))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mobilemamba.MobileMamba:
    """A model whose weights stand for the published distilled ones of t2."""
    model = lively(mobilemamba.t2(distillation=True))
    monkeypatch.setenv("MOBILEMAMBA_WEIGHTS", str(tmp_path))
    torch.save({"state_dict": model.state_dict()}, tmp_path / weights.entry("t2", distilled=True).file_name)
    return model


@torch.no_grad()
def test_distilled_weights_have_one_head(published: mobilemamba.MobileMamba) -> None:
    x = torch.randn(2, 3, 64, 64)
    for options in ({}, {"distillation": True}):
        model = timm.create_model("mobilemamba_t2.dist_in1k", pretrained=True, **options).eval()
        torch.testing.assert_close(model(x), published(x), rtol=1e-3, atol=1e-4)
    model = timm.create_model("mobilemamba_t2.dist_in1k", pretrained=True, in_chans=1, num_classes=5).eval()
    grey = torch.randn(2, 1, 64, 64)
    features = published.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.forward_features(grey), features, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_file_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the published names and nesting gives the published network's logits, through timm's call."""
    (case,) = (case for case in small_cases() if case.name == "T2")
    averaged = {f"module.{key}": tensor for key, tensor in case.state_dict().items()}
    monkeypatch.setenv("MOBILEMAMBA_WEIGHTS", str(tmp_path))
    torch.save({"net": {}, "net_E": averaged, "epoch": 300}, tmp_path / weights.entry("t2").file_name)
    model = timm.create_model("mobilemamba_t2.in1k", pretrained=True).double().eval()
    for shape in case.inputs():
        expected = torch.from_numpy(case.figures[f"logits/{'x'.join(map(str, shape))}"])
        logits = model(make_input(shape)).flatten()[: len(expected)]
        assert (logits - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_one_head_has_the_mean_of_two(training: bool) -> None:
    two = lively(mobilemamba.nano(distillation=True)).double().train(training)
    if training:  # heads that were trained together have the same statistics
        two.head.teacher.norm.load_state_dict(
            two.head.labels.norm.state_dict() | {"weight": two.head.teacher.norm.weight}, strict=True
        )
    one = mobilemamba.nano().double().train(training)
    one.load_state_dict(one_head(two.state_dict()))
    x = torch.randn(4, 1, 28, 28).double()
    expected = sum(two(x)) / 2 if training else two(x)
    torch.testing.assert_close(one(x), expected)
    assert one_head(one.state_dict()).keys() == one.state_dict().keys()


@torch.no_grad()
def test_files_and_folders(tmp_path: Path) -> None:
    """timm's ways to its own files: an overlay, a checkpoint, and the folder of a model for the Hub."""
    model, x = small(num_classes=3), torch.randn(2, 1, 28, 28)
    torch.save({"state_dict_ema": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pth")
    file = {"file": str(tmp_path / "a.pth"), "num_classes": 3}
    found = [
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=file),
        timm.create_model(SMALL, num_classes=3, checkpoint_path=tmp_path / "a.pth"),
    ]
    timm.models._hub.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    found.append(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True))
    for other in found:
        assert torch.equal(other.eval()(x), model(x))
