"""Layers that users hook, prune or replace: the network runs them, though operators read the weights of plain ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mobilemamba
from mobilemamba.models.folded import DenseConv2d, DepthwiseConv2d
from mobilemamba.models.layers import FoldedSqueezeExcite

X = torch.linspace(-1, 1, 2 * 9 * 9).reshape(2, 1, 9, 9)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mobilemamba.nano(pretrained=True).eval()


def conv_of_the_scan(model):
    return model.stages[0].blocks[0].mixer.global_part.ss2d, "conv"


def squeeze(model):
    return model.stages[1].transition[2].squeeze_excite, "reduce"


def excite(model):
    return model.stages[1].transition[2].squeeze_excite, "expand"


READ = (conv_of_the_scan, squeeze, excite)  # layers whose weights an operator reads


@torch.no_grad()
def test_hooks_of_every_layer_run(model):
    ran = set()
    for network, kinds in ((model, nn.Conv2d), (model.fuse(), DenseConv2d | DepthwiseConv2d | FoldedSqueezeExcite)):
        expected = network(X)
        layers = {name for name, module in network.named_modules() if isinstance(module, kinds)}
        for name in layers:
            network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
        torch.testing.assert_close(network(X), expected, rtol=1e-4, atol=1e-5)
        assert ran == layers
        ran.clear()


@pytest.mark.parametrize("place", READ)
def test_pruning_has_effect(model, place):
    owner, name = place(model)
    layer = getattr(owner, name)
    prune.random_unstructured(layer, "weight", 0.5)
    model(X).sum().backward()
    assert not layer.weight_orig.grad[layer.weight_mask == 0].any()
    assert layer.weight_orig.grad.any()
    with torch.no_grad():
        layer.weight_orig.add_(1)  # a step of an optimizer: the pruned weight is computed before the next use
        pruned = model(X)
        prune.remove(layer, "weight")
        torch.testing.assert_close(model(X), pruned)
        torch.testing.assert_close(model.fuse()(X), pruned, rtol=1e-4, atol=1e-5)


class Adapted(nn.Module):
    """As a LoRA layer: the original layer, its weight as an attribute, and a small layer beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.beside = nn.Conv2d(base.in_channels, base.out_channels, 1, groups=base.groups, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.beside(x)


@pytest.mark.parametrize("place", READ)
def test_a_layer_that_was_replaced_is_used(model, place):
    before = model(X)
    owner, name = place(model)
    adapted = Adapted(getattr(owner, name))
    setattr(owner, name, adapted)
    after = model(X)
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert adapted.beside.weight.grad.any()
    with torch.no_grad():  # merged into the weight, the adapter gives the same
        base, beside = adapted.base_layer, adapted.beside.weight
        middle = base.kernel_size[0] // 2
        base.weight[:, :, middle : middle + 1, middle : middle + 1] += beside
        setattr(owner, name, base)
        torch.testing.assert_close(model(X), after.detach())


def test_parametrized_weights_are_used(model):
    owner, name = conv_of_the_scan(model)
    before = model(X)
    nn.utils.parametrizations.weight_norm(getattr(owner, name))
    torch.testing.assert_close(model(X), before)
    torch.testing.assert_close(model.fuse()(X), before, rtol=1e-4, atol=1e-5)
    getattr(owner, name).parametrizations.weight.original0.data.mul_(2)
    assert not torch.allclose(model(X), before)


@torch.no_grad()
def test_fuse_takes_parametrized_weights(model):
    class Negated(nn.Module):
        def forward(self, weight):
            return -weight

    x = torch.randn(2, 1, 28, 28)
    before = model(x)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            nn.utils.parametrize.register_parametrization(module, "weight", Negated())
    expected = model(x)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-4, atol=1e-5)


def refused_hook(model):
    model.stages[0].blocks[0].ffn0.expand.conv.register_forward_hook(lambda *_: None)


def refused_pruning(model):
    prune.random_unstructured(getattr(*squeeze(model)), "weight", 0.5)


def refused_adapter(model):
    owner, name = conv_of_the_scan(model)
    setattr(owner, name, Adapted(getattr(owner, name)))


def refused_norm(model):
    model.stages[0].blocks[0].ffn0.expand.norm = nn.BatchNorm2d(96, track_running_stats=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            refused_hook,
            r"fuse: stages\.0\.blocks\.0\.ffn0\.expand\.conv has hooks, which the fused layer would not run",
        ),
        (refused_pruning, r"squeeze_excite\.reduce has hooks.*\(for pruning: torch.nn.utils.prune.remove\)"),
        (refused_adapter, r"fuse: stages.*ss2d\.conv is a Adapted with a forward of its own.*merge the adapters"),
        (refused_norm, "fuse: expected a BatchNorm with running statistics, weight and bias, got BatchNorm2d"),
    ],
)
def test_fuse_refuses_to_lose_a_change(model, change, message):
    change(model)
    with pytest.raises(ValueError, match=message):
        model.fuse()
