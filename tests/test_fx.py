"""FX tracing, as torchvision's feature extractor does it: the graph computes and refuses what the model does."""

import re

import pytest
import torch
from torch import nn

import mobilemamba


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mobilemamba.nano(
        num_classes=3, distillation=True, drop_path_rate=0.3, local_kernels=((3, 5), (3,), (3, 5, 7))
    )


def traced(model, mode):
    model = model.eval().fuse() if mode == "fused" else model.train(mode == "training")
    return torch.fx.symbolic_trace(model), model


@torch.no_grad()
@pytest.mark.parametrize("mode", ["training", "evaluation", "fused"])
def test_a_traced_model_computes_the_same(model, mode):
    """At every batch size and image size."""
    graph, model = traced(model, mode)
    buffers = [buffer.clone() for buffer in model.buffers()]
    for shape in ((3, 1, 16, 16), (2, 1, 9, 21)):
        x = torch.randn(shape)
        outputs = []
        for network in (graph, model):
            for buffer, before in zip(model.buffers(), buffers, strict=True):  # the graph has the model's buffers
                buffer.copy_(before)
            torch.manual_seed(1)  # for drop path
            outputs.append(network(x))
        if mode == "training":  # the graph calls each convolution and norm by itself
            torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        else:
            assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_traced_model_refuses_what_the_model_refuses(model):
    graph, _ = traced(model, "evaluation")
    with pytest.raises(
        ValueError, match=re.escape("expected images of shape (batch, 1, height, width), got [1, 28, 28]")
    ):
        graph(torch.zeros(1, 28, 28))
    with pytest.raises(ValueError, match="floating-point type, scaled and normalised"):
        graph(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_stages_are_modules_that_can_be_cut_out(model, fuse):
    """In a chain, as torchvision's BackboneWithFPN runs them."""
    model = model.eval().fuse() if fuse else model.eval()
    x = torch.randn(2, 1, 13, 18)
    expected = model.forward_stages(x)
    for stage, layer in zip(
        expected, [nn.Sequential(model.patch_embed, model.stages[0]), *model.stages[1:]], strict=True
    ):
        x = layer(x)
        assert torch.equal(x, stage)
        assert x.stride() == stage.stride()


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_feature_extraction_by_torchvision(model, fuse):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = model.eval().fuse() if fuse else model.eval()
    nodes = [info["module"] for info in model.feature_info]
    x = torch.randn(2, 1, 13, 18)
    maps = extraction.create_feature_extractor(model, nodes).eval()(x)
    for name, expected in zip(nodes, model.forward_stages(x), strict=True):
        assert torch.equal(maps[name], expected)
