"""Fine-tuning: freezing, other numbers of image channels, a new head."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import weights
from mobilemamba.models import MobileMamba, layers
from mobilemamba.training import freeze, freeze_norms, moving_average
from mobilemamba.training.finetuning import same_classes, start_from
from mobilemamba.weights import adapt_channels

NANO = weights.entry("nano")


@pytest.fixture
def model() -> MobileMamba:
    """A nano with two heads, stochastic depth and statistics of its own."""
    torch.manual_seed(0)
    model = mobilemamba.nano(num_classes=3, distillation=True, drop_path_rate=0.5).train()
    model(torch.randn(4, 1, 16, 16))
    return model


def step(model: MobileMamba) -> set[str]:
    """One step of training; returns the names of the tensors that it changes, without those that only count."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    sum(logits.square().sum() for logits in model(1 + torch.randn(4, 1, 16, 16))).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        ("none", ()),
        ("stem", ("patch_embed.",)),
        ("stages", ("stages.",)),
        ("all-but-head", ("patch_embed.", "stages.")),
    ],
)
def test_freeze_keeps_a_part_as_it_is(model: MobileMamba, part: str, kept: tuple[str, ...]) -> None:
    parts = ("patch_embed.", "stages.", "head.")
    freeze(model, part)
    changed = step(model)
    assert {prefix for prefix in parts if any(name.startswith(prefix) for name in changed)} == set(parts) - set(kept)
    for prefix in set(parts) - set(kept):  # and its statistics go on
        assert any(name.startswith(prefix) and name.endswith("running_mean") for name in changed)


def test_frozen_parts_act_as_in_evaluation(model: MobileMamba) -> None:
    freeze(model, "all-but-head")
    x = torch.randn(4, 1, 16, 16)
    evaluated = model.eval().forward_features(x)
    torch.testing.assert_close(model.train().forward_features(x), evaluated)  # no stochastic depth either


def test_freeze_refuses_other_parts(model: MobileMamba) -> None:
    with pytest.raises(ValueError, match="expected none, stem, stages or all-but-head, got 'neck'"):
        freeze(model, "neck")


def test_frozen_norms_keep_statistics_and_weights(model: MobileMamba) -> None:
    freeze_norms(model)
    changed = step(model)
    assert not any(".norm." in name for name in changed if not name.startswith("head."))
    assert {name.split(".")[0] for name in changed} == {"patch_embed", "stages", "head"}
    assert "head.labels.norm.running_mean" in changed


def test_gradients_with_frozen_norms_are_those_of_the_layers(monkeypatch) -> None:
    """On a CPU a frozen norm becomes a factor of the weight before it."""
    model = mobilemamba.nano(pretrained=True).double().train()
    freeze_norms(model)
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    calls = []
    folded = layers.ConvNorm._train_folded
    monkeypatch.setattr(layers.ConvNorm, "_train_folded", lambda *args: (calls.append(args), folded(*args))[1])
    gradients = []
    for folds in (True, False):
        if not folds:
            monkeypatch.setattr(layers.ConvNorm, "_trains_folded", lambda *_: False)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(model(x).square().sum(), [x, *learning]))
    assert len(calls) == sum(isinstance(layer, layers.ConvNorm) for layer in model.modules())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_frozen_models_are_models(model: MobileMamba) -> None:
    """Copies stay frozen; a new head, the moving average, fusing and saved weights work."""
    freeze(model, "all-but-head")
    names = list(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == names
        assert all(name.startswith("head.") for name in step(other))
    model.reset_classifier(5)
    assert all(name.startswith("head.") for name in step(model))
    average = moving_average(model, 0.9)
    for _ in range(2):  # the first update copies
        step(model)
        average.update_parameters(model)
    for name, tensor in average.module.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, model.state_dict()[name]) == (not name.startswith("head.")), name
    x = torch.randn(2, 1, 16, 16)
    expected = model.eval()(x)
    torch.testing.assert_close(model.fuse()(x), expected, atol=1e-4, rtol=1e-4)
    unfrozen = mobilemamba.nano(num_classes=5, distillation=True).eval()
    weights.load_into(unfrozen, model.state_dict())
    assert torch.equal(unfrozen(x), expected)


def test_synchronised_norms_are_frozen(model: MobileMamba) -> None:
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze_norms(synchronised)
    assert not any(
        isinstance(m, nn.SyncBatchNorm) for part in (model.patch_embed, model.stages) for m in part.modules()
    )
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronised.head.modules())


# Image channels


def colour(channels: int = 3) -> weights.Checkpoint:
    """Nano's weights for RGB images, with a kernel for each channel."""
    torch.manual_seed(0)
    stored = weights.load(NANO)
    weight = torch.randn(12, channels, 3, 3)
    preprocessing = replace(NANO.preprocessing, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    return replace(
        stored, state_dict={**stored.state_dict, "patch_embed.0.conv.weight": weight}, preprocessing=preprocessing
    )


def first(stored: weights.Checkpoint) -> Tensor:
    return stored.state_dict["patch_embed.0.conv.weight"]


def test_grey_images_from_rgb_weights() -> None:
    rgb = colour()
    grey = adapt_channels(rgb, 1)
    x = torch.randn(2, 1, 8, 8)
    conv = nn.functional.conv2d
    torch.testing.assert_close(conv(x, first(grey)), conv(x.expand(2, 3, 8, 8), first(rgb)))
    assert grey.preprocessing.mean == pytest.approx((0.4,))
    assert grey.preprocessing.std == pytest.approx((0.2,))
    assert grey.model_args["in_chans"] == 1


def test_more_channels_repeat_and_scale() -> None:
    rgb = colour()
    five = adapt_channels(rgb, 5)
    torch.testing.assert_close(first(five), first(rgb)[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert five.preprocessing.mean == (0.2, 0.4, 0.6, 0.2, 0.4)
    assert five.preprocessing.std == (0.1, 0.2, 0.3, 0.1, 0.2)
    torch.testing.assert_close(first(adapt_channels(rgb, 2)), first(rgb)[:, :2] * 3 / 2)
    assert adapt_channels(rgb, 3) is rgb


def test_rgb_images_from_grey_weights(capsys) -> None:
    """An image whose channels are the same gives what it gives in grey."""
    grey = mobilemamba.nano(pretrained=True).eval()
    rgb = mobilemamba.create_model("nano", pretrained=True, in_chans=3).eval()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.endswith(
        "nano.pt: the weights are for 1-channel images; their kernels are repeated and scaled by 1/3\n"
    )
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(rgb(x.expand(2, 3, 28, 28)), grey(x), atol=1e-4, rtol=1e-4)


def test_channels_from_a_file_with_the_preprocessing(tmp_path, capsys) -> None:
    stored = replace(colour(), model_args={"num_classes": 10, "in_chans": 3})
    weights.save(tmp_path / "rgb.pt", stored)
    model = mobilemamba.nano()
    loaded = weights.load_pretrained(model, "nano", tmp_path / "rgb.pt")
    assert loaded.preprocessing.channels == model.in_chans == 1
    assert torch.equal(model.patch_embed[0].conv.weight, first(stored).sum(1, keepdim=True))
    assert capsys.readouterr().err.endswith("the weights are for 3-channel images; their kernels are summed\n")


# The head


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_classes": 4}, "a head of 10 classes; replaced by a new head: a head of 4 classes"),
        ({"distillation": True}, "a head of 10 classes; replaced by a new head: two heads of 10 classes"),
        ({"num_classes": 10}, ""),
        ({"num_classes": 0}, ""),
    ],
)
def test_a_new_head_is_said_in_one_line(options: dict, told: str, capsys) -> None:
    mobilemamba.create_model("nano", pretrained=True, allow_head_mismatch=True, **options)
    assert capsys.readouterr().err.partition("nano.pt: ")[2].strip() == told


def test_start_from_weights_for_other_classes_and_other_images(tmp_path, capsys) -> None:
    stored = weights.read(weights.locate(weights.entry("nano")))
    ours = weights.entry("nano").preprocessing
    known = replace(ours, mean=(0.0,), std=(1.0,))
    weights.save(tmp_path / "nano.pt", replace(stored, labels=list("abcdefghij"), preprocessing=known))
    for labels, lines in ((tuple("abcdefghij"), 1), (tuple("bacdefghij"), 2)):
        model = mobilemamba.nano()
        used = start_from(str(tmp_path / "nano.pt"), model, "nano", labels, ours)
        assert used == known
        told = capsys.readouterr().err
        assert told.count("\n") == lines
        assert told.endswith("nano.pt: images are normalised as for these weights: mean (0.0,), std (1.0,)\n")
        assert ("its 10 classes are others; replaced by a new head" in told) == (lines == 2)
        same = torch.equal(model.head.linear.weight, stored.state_dict["head.linear.weight"].float())
        assert same == (lines == 1)


def test_the_same_classes_may_be_called_by_wordnet_ids() -> None:
    assert same_classes(["tench", "goldfish"], ["n01440764", "n01443537"])
    assert not same_classes(["tench", "goldfish"], ["n01443537", "n01440764"])
