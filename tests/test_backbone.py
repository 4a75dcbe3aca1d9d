"""The fused network as one operator: against its layers one by one, under every thread count, and its errors."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import ops
from mobilemamba.models import MobileMamba


@pytest.fixture(scope="module")
def fused() -> MobileMamba:
    """Two blocks in the last stage, and no branch that is zero."""
    torch.manual_seed(0)
    model = MobileMamba(7, widths=(32, 48, 64), depths=(1, 1, 2), in_chans=2, distillation=True, patch_strides=(2, 1))
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.fuse()


def by_layers(model: MobileMamba, x: Tensor) -> list[Tensor]:
    """The feature maps and the logits."""
    x = model.patch_embed(x.contiguous(memory_format=torch.channels_last))
    maps = []
    for stage in model.stages:
        x = stage(x)
        maps.append(x)
    return [*maps, model.forward_head(x)]


def arguments(model: MobileMamba, x: Tensor) -> list[Any]:
    weights: Any = [weight for part in (model.patch_embed, *model.stages) for weight in part.weights()]
    head: Any = model.head
    patch_embed: Any = model.patch_embed
    depths = [len(stage.blocks) for stage in model.stages]  # type: ignore[arg-type]
    return [x, weights, patch_embed.strides, depths, *head.weights()]


@pytest.mark.parametrize("shape", [(1, 2, 32, 32), (13, 2, 33, 17), (0, 2, 8, 8), (2, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_same_bits_as_layer_by_layer(fused: MobileMamba, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model, x = copy.deepcopy(fused).to(dtype), torch.randn(shape).to(dtype)
    *maps, logits = by_layers(model, x)
    for actual in (ops.backbone(*arguments(model, x)), [*model.forward_features(x, stages=True), model(x)]):
        assert [y.stride() for y in actual[:-1]] == [y.stride() for y in maps]
        for y, expected in zip(actual, [*maps, logits], strict=True):
            assert torch.equal(y, expected)
            assert y.dtype == dtype
    assert len(ops.backbone(*arguments(model, x)[:-2])) == 3  # no head


@torch.no_grad()
def test_same_bits_for_any_number_of_threads(fused: MobileMamba) -> None:
    """16 threads on a few cores hold each other up, so the calling thread works alone for a while, and tries again."""
    x, threads = torch.randn(9, 2, 40, 40), torch.get_num_threads()
    expected = fused(x)
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            for _ in range(10):
                assert torch.equal(fused(x), expected)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_gradients_are_the_layers(fused: MobileMamba) -> None:
    model = copy.deepcopy(fused).double().requires_grad_()
    x = torch.randn(2, 2, 9, 8, dtype=torch.double, requires_grad=True)
    inputs = [x, *model.parameters()]
    losses = [
        torch.stack([y.square().sum() for y in outputs]).sum()
        for outputs in (by_layers(model, x), ops.backbone(*arguments(model, x)))
    ]
    for actual, expected in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("requires_grad", [False, pytest.param(True, marks=pytest.mark.full)])
def test_opcheck(requires_grad: bool) -> None:
    model = MobileMamba(3, widths=(16, 32, 32), depths=(0, 0, 1), in_chans=1, patch_strides=(4,)).fuse()
    x = torch.randn(2, 1, 9, 8, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.mobilemamba.backbone.default, tuple(arguments(model, x)))


@torch.no_grad()
def test_autocast_is_that_of_the_layers(fused: MobileMamba) -> None:
    x = torch.randn(2, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        *_, logits = by_layers(fused, x)
        assert torch.equal(fused(x), logits)
        assert logits.dtype == torch.bfloat16


def test_vmap_is_a_batch(fused: MobileMamba) -> None:
    x = torch.randn(3, 2, 2, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fused)(x).flatten(0, 1), fused(x.flatten(0, 1)))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 9, 8), r"backbone: input has shape \[2, 9, 8\], expected 4 dimensions"),
        (0, torch.zeros(2, 2, 9, 8, dtype=torch.int64), "backbone: input is Long, expected Float"),
        (1, [torch.zeros(3)] * 176, "patch_embedding: weights"),
        (2, [], "backbone: strides has 0 values, expected at least 1"),
        (2, [2, 0], r"backbone: strides\[1\] is 0, expected at least 1"),
        (3, [], "backbone: depths has 0 values, expected at least 1"),
        (3, [1, 1, -1], r"backbone: depths\[2\] is -1, expected 0 to 5 for 176 weights"),
        (3, [2**62, 1, 1], r"backbone: depths\[0\] is \d+, expected 0 to 5 for 176 weights"),
        (3, [1, 1, 1], r"backbone: weights has 176 tensors, expected 144 for strides \[2, 1\] and depths \[1, 1, 1\]"),
        (5, None, "backbone: head_weight is a tensor and head_bias is None, expected both or none"),
        (5, torch.zeros(1, 7), r"backbone: head_bias has shape \[1, 7\], expected 1 dimensions \(num_classes\)"),
    ],
)
def test_refusals(fused: MobileMamba, index: int, value: Any, message: str) -> None:
    given = arguments(fused, torch.zeros(2, 2, 9, 8))
    given[index] = value
    with pytest.raises(RuntimeError, match="^" + message):
        ops.backbone(*given)


def test_a_new_head_on_a_fused_model_is_used(fused: MobileMamba) -> None:
    model = copy.deepcopy(fused)
    model.reset_classifier(3)
    x = torch.randn(2, 2, 16, 16)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x).mean((2, 3)))


def test_the_images_are_checked(fused: MobileMamba) -> None:
    for run in (fused, fused.forward_features, torch.jit.script(fused)):
        with pytest.raises(Exception, match=r"of shape \(batch, 2, height, width\), got \[2, 3, 8, 8\]"):
            run(torch.zeros(2, 3, 8, 8))


@torch.no_grad()
def test_norms_with_another_eps() -> None:
    model = mobilemamba.nano(pretrained=True).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    x = torch.randn(2, 1, 28, 28)
    before = model(x)
    for epsilons in ([0.5] * len(norms), [0.1 * i + 0.01 for i in range(len(norms))]):
        for norm, eps in zip(norms, epsilons, strict=True):
            norm.eps = eps
        expected, fused = model(x), model.fuse()
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(fused)(x), expected, rtol=1e-4, atol=1e-5)


def without_head(model: Any) -> None:
    model.head = nn.Identity()


def without_a_block(model: Any) -> None:
    model.stages[1].blocks = model.stages[1].blocks[:-1]


def identity_for_a_block(model: Any) -> None:
    model.stages[1].blocks[0] = nn.Identity()


def without_the_last_stage(model: Any) -> None:
    del model.stages[2]
    model.head = nn.Identity()


@pytest.mark.parametrize("change", [without_head, without_a_block, identity_for_a_block, without_the_last_stage])
@torch.no_grad()
def test_layers_can_be_taken_out(change: Any) -> None:
    model, x = mobilemamba.nano(pretrained=True).eval(), torch.randn(2, 1, 28, 28)
    fused = model.fuse()
    change(model)
    change(fused)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    fused_after = model.fuse()
    torch.testing.assert_close(fused_after(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(fused_after)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scripted_with_hooks_or_another_head(fused: MobileMamba) -> None:
    x = torch.randn(2, 2, 16, 16)
    model = copy.deepcopy(fused)
    model.head = nn.Linear(64, 3)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))

    def halved(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * 0.5

    model = copy.deepcopy(fused)
    model.stages[0].blocks[0].register_forward_hook(halved)  # type: ignore[union-attr,operator]
    assert not torch.equal(model(x), fused(x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
