"""The backbone as others take it: feature maps by name, frozen parts, and the libraries that build on it."""

import copy
import io
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import FeatureExtractor, weights
from mobilemamba.models import layers
from mobilemamba.models.frozen import FrozenBatchNorm

NANO = {"in_chans": 3, "depths": (1, 1, 1), "drop_path_rate": 0.1}
WIDTHS = [48, 96, 128]


@pytest.fixture(scope="module")
def features() -> FeatureExtractor:
    """nano's stages at strides 4, 8 and 16, no branch of which is zero."""
    torch.manual_seed(0)
    features = mobilemamba.feature_extractor("nano", **NANO).train()
    for norm in features.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        features(torch.randn(4, 3, 32, 32))
    return features.eval()


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1)])
@pytest.mark.parametrize("stages", [(0, 1, 2), (0, 1), (2,)])
@torch.no_grad()
def test_maps_are_those_of_the_model(
    features: FeatureExtractor, stages: tuple[int, ...], size: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size)
    all_maps = features.body.forward_features(images, stages=True)
    some = FeatureExtractor(features.body, stages).eval()
    for network in (some, some.fuse()):
        found = network(images)
        assert isinstance(found, OrderedDict)
        assert list(found) == [str(i) for i in range(len(stages))]
        assert network.out_channels == [WIDTHS[i] for i in stages]
        assert len(network.body.stages) == stages[-1] + 1, "later stages only cost time"
        for x, stage, channels, stride in zip(
            found.values(), stages, network.out_channels, network.feature_info.reduction(), strict=True
        ):
            assert x.shape == (2, channels, *(-(-side // stride) for side in size))
            torch.testing.assert_close(x, all_maps[stage], rtol=1e-4, atol=1e-4)
        for one, other in zip(network.maps(images), found.values(), strict=True):
            assert torch.equal(one, other)
    assert len(features.body.stages) == 3, "the given network stays as it is"


def test_feature_info_is_timms() -> None:
    info = mobilemamba.feature_extractor("b1", stages=(1, 2)).feature_info
    assert info.channels() == [376, 448]
    assert info.reduction() == [32, 64]
    assert info.channels(0) == 376
    assert info.channels([1]) == [448]
    assert info.module_name() == ["stages.1", "stages.2"]
    assert len(info) == 2
    assert info[0] == {"num_chs": 376, "reduction": 32, "module": "stages.1", "index": 1}
    assert info.get_dicts(keys=["num_chs"]) == [{"num_chs": 376}, {"num_chs": 448}]
    assert info.get_dicts(idx=1) == info[1]


def test_weights_fill_it(tmp_path: Path) -> None:
    """The head of the weights is left out, whatever its classes are."""
    path = tmp_path / "nano.pt"
    model = mobilemamba.nano(pretrained=True)
    x = torch.randn(2, 1, 28, 28)
    expected = model.eval().forward_features(x, stages=True)
    model.reset_classifier(3)
    weights.save(path, weights.Checkpoint(model.state_dict(), "nano", {"num_classes": 3}))
    for pretrained in (True, path):
        found = mobilemamba.feature_extractor("nano", pretrained).eval()(x)
        for one, other in zip(found.values(), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": (1, 0)}, "stages: expected ascending numbers of stages from 0 to 2"),
        ({"stages": (0, 3)}, "stages: expected ascending numbers of stages from 0 to 2"),
        ({"stages": ()}, "stages: expected a tuple"),
        ({"stages": 2}, "stages: expected a tuple"),
        ({"norm_eval": 1}, "norm_eval: expected True or False"),
        ({"frozen_stages": 4}, "frozen_stages: expected at most 3"),
        ({"frozen_stages": -2}, "frozen_stages: expected an integer of at least -1"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mobilemamba.feature_extractor("nano", **wrong)


def test_options_of_the_head_are_refused() -> None:
    with pytest.raises(TypeError, match="expected no num_classes: feature maps come before the head"):
        mobilemamba.feature_extractor("nano", num_classes=3)


def step(network: nn.Module) -> set[str]:
    """One step of training in a copy; the names of the tensors that it changes."""
    network = copy.deepcopy(network).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sum(x.square().sum() for x in network(torch.randn(4, 3, 32, 32)).values()).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / parameter.grad.norm()
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def test_norm_eval_keeps_statistics_and_trains_the_rest(features: FeatureExtractor) -> None:
    evaluated = FeatureExtractor(copy.deepcopy(features.body), norm_eval=True)
    statistics = {name for name, _ in evaluated.named_buffers()}
    assert statistics
    changed = step(evaluated)
    assert changed.isdisjoint(statistics)
    assert changed == {name for name, _ in evaluated.named_parameters()}
    assert any(name.endswith("norm.weight") for name in changed)
    assert evaluated.state_dict().keys() == features.state_dict().keys()


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 3])
def test_frozen_stages_are_mmdetections(features: FeatureExtractor, frozen_stages: int) -> None:
    network = FeatureExtractor(copy.deepcopy(features.body), frozen_stages=frozen_stages)
    parts = ["body.patch_embed.", *(f"body.stages.{i}." for i in range(3))]
    if frozen_stages == 3:
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(isinstance(norm, FrozenBatchNorm) for norm in norms(network.train()))
        return
    changed = step(network)
    trained = [part for part in parts if any(name.startswith(part) for name in changed)]
    assert trained == parts[frozen_stages + 1 :]
    assert all(any(name.startswith(part) and name.endswith("running_mean") for name in changed) for part in trained)


def test_gradients_with_norm_eval_are_those_of_torchs_norms(features: FeatureExtractor, monkeypatch) -> None:
    """On a CPU, a norm with frozen statistics becomes a factor of the weight before it, and is trained through it."""
    network = FeatureExtractor(copy.deepcopy(features.body).double(), norm_eval=True).train()
    for block in network.modules():
        if isinstance(block, layers.DropPath):
            block.rate = 0.0
    x = torch.randn(2, 3, 17, 24, dtype=torch.float64, requires_grad=True)
    parameters = dict(network.named_parameters())
    calls: list[Any] = []
    folded = layers.ConvNorm._train_folded
    monkeypatch.setattr(layers.ConvNorm, "_train_folded", lambda *args: (calls.append(args), folded(*args))[1])
    gradients = []
    for folds in (True, False):
        if not folds:
            monkeypatch.setattr(layers.ConvNorm, "_trains_folded", lambda *_: False)
        loss = torch.stack([y.square().mean() for y in network(x).values()]).sum()
        gradients.append(torch.autograd.grad(loss, [x, *parameters.values()]))
    assert len(calls) == sum(isinstance(layer, layers.ConvNorm) for layer in network.modules())
    for name, one, other in zip(["images", *parameters], *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()), msg=name)


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.full), True])
@torch.no_grad()
def test_torchscript_fx_and_export(features: FeatureExtractor, fused: bool) -> None:
    network = features.fuse() if fused else features
    images = torch.randn(2, 3, 48, 40)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    shapes = {2: torch.export.Dim("height", min=17), 3: torch.export.Dim("width", min=17)}
    exported = torch.export.export(network, (images,), dynamic_shapes=(shapes,), strict=False).module()
    others = {"script": torch.jit.load(file), "fx": torch.fx.symbolic_trace(network), "export": exported}
    for size in ((48, 40), (33, 56)):
        images = torch.randn(2, 3, *size)
        expected = network(images)
        for kind, other in others.items():
            found = other(images)
            assert list(found) == ["0", "1", "2"], kind
            for name, x in found.items():
                torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=kind)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@torch.no_grad()
def test_under_torchvisions_pyramid(features: FeatureExtractor, fused: bool) -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    network = features.fuse() if fused else features
    torch.manual_seed(0)
    pyramid = nn.Sequential(OrderedDict(body=network, fpn=ops.FeaturePyramidNetwork(network.out_channels, 32)))
    torch.manual_seed(0)
    returned = {"stage0": "0", "stage1": "1", "stage2": "2"}
    other = BackboneWithFPN(network.layers(), returned, network.out_channels, 32)
    images = torch.randn(1, 3, 50, 70)
    expected, found = pyramid(images), other.eval()(images)
    assert [x.shape for x in expected.values()] == [(1, 32, 13, 18), (1, 32, 7, 9), (1, 32, 4, 5)]
    assert list(found) == ["0", "1", "2", "pool"]
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-4)


def test_frozen_parts_stay_frozen_under_torchvisions_pyramid(features: FeatureExtractor) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    network = FeatureExtractor(copy.deepcopy(features.body), norm_eval=True, frozen_stages=1)
    returned = {"stage1": "0", "stage2": "1"}
    pyramid = BackboneWithFPN(network.layers(), returned, network.out_channels[1:], 16)
    changed = step(pyramid)
    assert not any("running" in name for name in changed)
    assert {name.split(".")[1] for name in changed if name.startswith("body.")} == {"stage1", "stage2"}


def example(heading: str) -> str:
    """The first Python example under a heading of docs/downstream.md."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "downstream.md").read_text()
    return text.split(f"\n### {heading}\n")[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("preset", ["b1", "nano"])
@torch.no_grad()
def test_documented_encoder_for_segmentation_models_pytorch(preset: str) -> None:
    """A map at every stride, each half of the one before; no channels where the network has no map."""
    names: dict[str, Any] = {}
    exec(example("segmentation_models_pytorch"), names)
    encoder = names["Encoder"](preset, **({"in_chans": 3} if preset == "nano" else {}))
    assert encoder.out_channels[0] == 3
    maps = encoder(torch.randn(1, 3, 128, 64))
    assert len(maps) == len(encoder.out_channels) == encoder.depth + 1
    for i, (x, channels) in enumerate(zip(maps, encoder.out_channels, strict=True)):
        assert x.shape == (1, channels, 128 >> i, 64 >> i)
    assert encoder.output_stride == 1 << encoder.depth


@torch.no_grad()
def test_documented_backbone_for_hugging_face() -> None:
    names: dict[str, Any] = {"SimpleNamespace": SimpleNamespace}
    exec(example("Hugging Face"), names)
    backbone = names["Backbone"]("nano", in_chans=3)
    maps: tuple[Tensor, ...] = backbone(pixel_values=torch.randn(1, 3, 32, 32)).feature_maps
    assert [x.shape[1] for x in maps] == backbone.channels == WIDTHS
