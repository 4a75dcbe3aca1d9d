"""The network in standard operators computes the same as the model."""

import pytest
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import downstream
from mobilemamba.deploy import FeatureMaps, portable
from mobilemamba.deploy.standard.layers import unpacked
from mobilemamba.deploy.standard.scan import recurrence
from mobilemamba.ops import pack_conv2d_weight


def trained(model: nn.Module) -> nn.Module:
    """As after training: branches that are not zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return model.eval()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("basic", [False, True])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nano", [(1, 28, 28), (3, 37, 19), (2, 1, 1), (1, 4, 60)]),
        *(
            pytest.param(name, [(1, 224, 224), (2, 97, 130), (1, 33, 1)], marks=pytest.mark.full)
            for name in ("t2", "t4", "s6", "b1", "b2", "b4")
        ),
    ],
)
@torch.inference_mode()
def test_every_preset_at_several_sizes(name: str, sizes: list[tuple[int, int, int]], basic: bool) -> None:
    torch.manual_seed(0)
    model = trained(mobilemamba.create_model(name))
    forms = [portable(model, basic=basic), portable(model.fuse(), basic=basic)]
    for batch, height, width in sizes:
        images = torch.randn(batch, model.in_chans, height, width)
        expected = model(images)
        for form in forms:
            assert_near(form(images), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 3},
        {"distillation": True},
        {"widths": (50, 98, 129), "num_classes": 7},  # odd numbers of channels, which packing fills up
        {"num_classes": 0, "in_chans": 2},
        {"local_kernels": ((1,), (1, 3), (5,))},
        {"local_ratios": (0.0, 0.1, 0.4), "global_ratios": (1.0, 0.7, 0.6)},
        {"local_kernels": ((3, 5), (5,), (3, 7)), "patch_strides": (2, 1)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_every_option(options: dict) -> None:
    torch.manual_seed(0)
    model = trained(mobilemamba.nano(**options))
    images = torch.randn(2, model.in_chans, 30, 23)
    assert_near(portable(model)(images), model(images))
    assert_near(portable(model.fuse(), basic=True)(images), model(images))


@torch.inference_mode()
def test_maps_segmenters_and_16_bits() -> None:
    torch.manual_seed(0)
    model = trained(mobilemamba.nano())
    images = torch.randn(2, 1, 36, 29)
    for actual, expected in zip(
        FeatureMaps(portable(model), (0, 2))(images), model.forward_stages(images)[::2], strict=True
    ):
        assert_near(actual, expected)
    short = mobilemamba.nano(pretrained=True).eval().bfloat16()
    assert_near(portable(short)(images), short.float()(images))

    options = {"in_chans": 3, "patch_strides": (2, 2, 2)}
    segmenter = downstream.semantic_fpn("nano", num_classes=4, backbone_options=options).eval()
    images = torch.randn(1, 3, 50, 64)
    assert_near(portable(segmenter)(images)["out"], segmenter(images)["out"])


def test_the_model_stays_as_it_is_and_the_graph_has_no_operator_of_ours() -> None:
    model = mobilemamba.nano().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    form = portable(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    program = torch.export.export(form, (torch.randn(1, 1, 9, 12),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert all(name.startswith("aten.") for name in called), called
    hooked = mobilemamba.nano()
    hooked.stages[0].blocks[0].ffn0.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"ffn0 has hooks"):
        portable(hooked)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 7, 2), (1, 6, 1, 2), (1, 1, 1, 1)])
def test_recurrence_is_the_loop(shape: tuple[int, ...], backward: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    rows_a, rows_b = a.flatten(1, 2), b.flatten(1, 2)
    state, states = torch.zeros_like(rows_a[:, 0]), [None] * rows_a.size(1)
    for t in range(rows_a.size(1))[:: -1 if backward else 1]:
        states[t] = state = rows_a[:, t] * state + rows_b[:, t]
    torch.testing.assert_close(recurrence(a, b, backward), torch.stack(states, 1).view(shape))


@pytest.mark.parametrize("shape", [(33, 5), (64, 8), (7, 3, 3, 3), (40, 2, 5, 5)])
def test_unpacked_is_what_was_packed(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    packed = pack_conv2d_weight(weight if weight.dim() == 4 else weight[:, :, None, None])
    assert torch.equal(unpacked(packed, *shape), weight)
