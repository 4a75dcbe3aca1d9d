"""The model family: presets, sizes, heads, features, folding, training behaviour, what is refused."""

import copy
import functools
import itertools
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from devices import cpu_only
from torch import nn

import mobilemamba
from mobilemamba import MRFFI, create_model
from mobilemamba.models.folded import fold_batchnorm
from mobilemamba.models.layers import DropPath
from mobilemamba.models.mrffi import split_channels

PUBLISHED = {  # parameters in millions, and (global, local, identity) channels of each stage
    "t2": (8.837, [(112, 28, 4), (192, 54, 26), (224, 110, 34)]),
    "t4": (14.176, [(144, 32, 0), (256, 73, 39), (272, 134, 42)]),
    "s6": (15.037, [(160, 32, 0), (272, 76, 36), (272, 134, 42)]),
    "b1": (17.123, [(160, 40, 0), (256, 75, 45), (272, 134, 42)]),
}


def filled(name):
    """A model whose residual branches all do something, unlike at initialisation."""
    torch.manual_seed(0)
    model = create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.weight, 0.3, 0.03)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def nano():
    return filled("nano")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    millions, splits = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name)
    mixers = [block.mixer for stage in model.stages for block in stage.blocks]
    haar_filters = sum(32 * mixer.split[0] for mixer in mixers)  # constants, which the published count includes
    assert round((sum(p.numel() for p in model.parameters()) + haar_filters) / 1e6, 3) == millions
    assert [stage.blocks[0].mixer.split for stage in model.stages] == splits


def test_every_listed_model_is_a_function_of_the_package():
    assert mobilemamba.list_models() == ["nano", "t2", "t4", "s6", "b1", "b2", "b4"]
    for name in mobilemamba.list_models():
        assert callable(getattr(mobilemamba, name))


def test_features_and_head():
    model = create_model("t2", num_classes=7).eval()
    x = torch.randn(2, 3, 96, 130)
    with torch.no_grad():
        maps = model.forward_features(x, stages=True)
        last = model.forward_features(x)
        assert [tuple(m.shape) for m in maps] == [(2, 144, 6, 9), (2, 272, 3, 5), (2, 368, 2, 3)]
        assert torch.equal(last, maps[-1])
        assert model.forward_head(last, pre_logits=True).shape == (2, model.num_features)
        assert torch.equal(model.forward_head(last), model(x))
    assert [info["reduction"] for info in model.feature_info] == [16, 32, 64]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize("size", [(1, 1), (1, 28), (5, 3), (16, 16), (31, 33)], ids=str)
def test_any_image_size(nano, size):
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        y = nano(x)
        torch.testing.assert_close(nano.fuse()(x), y, rtol=1e-4, atol=1e-5)
    assert y.shape == (2, 10)
    assert y.isfinite().all()


def test_network_equals_its_plain_pytorch_rendition(nano):
    nano, x = nano.double(), torch.randn(2, 1, 28, 44, dtype=torch.float64)
    with torch.no_grad():
        y = nano(x)
        with reference.plain_pytorch():
            torch.testing.assert_close(nano(x), y)


def test_memory_format_strides_and_empty_batches(nano):
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        y = nano(x)
        torch.testing.assert_close(nano(x.contiguous(memory_format=torch.channels_last)), y)
        torch.testing.assert_close(nano(torch.stack([x, x], -1)[..., 0]), y)
        assert nano(x[:0]).shape == (0, 10)
        assert nano.fuse()(x[:0]).shape == (0, 10)
        torch.testing.assert_close(torch.cat([nano(x[:1]), nano(x[1:])]), y)  # samples do not see each other


def test_distillation_returns_both_heads_in_training_and_their_mean_in_evaluation():
    torch.manual_seed(0)
    model = mobilemamba.nano(distillation=True)
    x = torch.randn(4, 1, 28, 28)
    labels, teacher = model.train()(x)
    assert labels.shape == teacher.shape == (4, 10)
    assert not torch.equal(labels, teacher)
    model.eval()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        expected = (model.head.labels(pooled) + model.head.teacher(pooled)) / 2
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", mobilemamba.list_models())
def test_every_preset_fused(name):
    """At an odd size, in either layout."""
    model = filled(name)
    x = torch.randn(4, model.in_chans, 79, 65)
    expected = model(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        fused = model.fuse().to(dtype)
        for images in (x, x.contiguous(memory_format=torch.channels_last)):
            error = (fused(images.to(dtype)) - expected).square().mean().sqrt() / expected.std()
            assert error < tolerance, (dtype, error)


@cpu_only
@torch.no_grad()
def test_fused_batches_are_cut_in_parts(nano):
    """Layers take 4 or 8 images at a time, threads share the others; scripted alike."""
    fused, x = nano.fuse(), torch.randn(21, 1, 61, 45)
    single = torch.cat([fused(image[None]) for image in x])
    assert torch.equal(fused(x), single)
    assert torch.equal(torch.jit.script(fused)(x), single)


def test_fused_layers_keep_the_names_of_their_parameters(nano):
    """Two layers are one operator each; state dicts of fused models were saved before they were."""
    keys = {key for key in nano.fuse().state_dict() if key.startswith(("patch_embed.", "stages.1.transition.2."))}
    layers = [f"patch_embed.{i}" for i in (0, 2, 4)]
    layers += [f"stages.1.transition.2.{n}" for n in ("expand", "depthwise", "project")]
    layers += [f"stages.1.transition.2.squeeze_excite.{n}" for n in ("reduce", "expand")]
    assert keys == {f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_patch_embedding_from_one_channel_to_one_channel(dtype):
    """Its first convolution is a depthwise one as well."""
    model = mobilemamba.nano(widths=(32, 48, 64), patch_strides=(2, 1, 1, 1, 1, 1)).eval()
    x = torch.randn(2, 1, 9, 8)
    error = (model.fuse().to(dtype)(x.to(dtype)) - model(x)).square().mean().sqrt() / model(x).std()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_fused_models_serve_several_threads_at_once(nano):
    fused, images = nano.fuse(), torch.randn(8, 9, 1, 28, 28)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(torch.no_grad()(fused), [*images] * 5))
    for result, x in zip(results, [*images] * 5, strict=True):
        assert torch.equal(result, fused(x))


def test_reset_classifier(nano):
    x = torch.randn(2, 1, 28, 28)
    nano.double().reset_classifier(3)
    assert nano(x.double()).shape == (2, 3)
    nano.reset_classifier(5, distillation=True)
    assert len(nano.train()(x.double())) == 2
    nano.reset_classifier(0)
    assert nano.eval()(x.double()).shape == (2, nano.num_features)


@pytest.mark.parametrize("distillation", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_new_head_takes_mode_and_dtype_and_learns(nano, training, distillation):
    frozen = nano.bfloat16().train(training).requires_grad_(False)
    with torch.device("meta"):  # the model's device counts, not the context's
        frozen.reset_classifier(3, distillation)
    assert all(module.training is training for module in frozen.head.modules())
    for parameter in frozen.head.parameters():
        assert (parameter.dtype, parameter.device.type) == (
            torch.bfloat16,
            frozen.stages[0].blocks[0].ffn0.expand.norm.weight.device.type,
        )
        assert parameter.requires_grad
    if not training:
        assert frozen(torch.randn(1, 1, 28, 28).bfloat16()).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, True), "num_classes: expected an integer of at least 0, got -1"),
        ((True,), "num_classes: expected an integer of at least 0, got True"),
        ((10.0,), "num_classes: expected an integer of at least 0, got 10.0"),
        ((10, "avg"), "distillation: expected True or False, got 'avg'"),  # timm's second argument is the pooling
        ((10, 1), "distillation: expected True or False, got 1"),
    ],
)
def test_a_refused_reset_of_the_classifier_changes_nothing(nano, arguments, message):
    head, classes, distillation = nano.head, nano.num_classes, nano.distillation
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        nano.reset_classifier(*arguments)
    assert nano.head is head
    assert (nano.num_classes, nano.distillation) == (classes, distillation)


def test_fuse_folds_every_norm_and_leaves_the_model_alone(nano):
    before = copy.deepcopy(nano.state_dict())
    nano.train()
    fused = nano.fuse()
    assert nano.training
    assert not any(module.training for module in fused.modules())
    assert all(torch.equal(v, before[k]) for k, v in nano.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in fused.modules())
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused.fuse())))  # folding what is folded changes nothing
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(again(x), nano.eval()(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        half = fused.to(torch.bfloat16)(x.to(torch.bfloat16)).float()
    assert (half - nano(x)).std() < 3e-2 * nano(x).std()


@pytest.mark.parametrize("kernels", [(3,), (3, 5), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("state", [1, 3])
def test_mrffi_with_several_local_kernels_and_states(kernels, state):
    torch.manual_seed(0)
    mixer = MRFFI(40, 0.4, 0.4, wavelet_kernel=3, local_kernels=kernels, d_state=state).double()
    assert mixer.split == (16, 16, 8)
    assert [g[0].conv.kernel_size[0] for g in mixer.local_part.groups] == list(kernels)
    assert sum(mixer.local_part.widths) == 16
    nn.init.ones_(mixer.proj.norm.weight)
    x = torch.randn(2, 40, 5, 6, dtype=torch.float64, requires_grad=True)
    mixer(x).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_whole_models_take_several_local_kernels():
    model = mobilemamba.nano(local_kernels=((3, 5), (3,), (3, 5, 7)), wavelet_kernels=(7, 5, 3), d_state=2)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert torch.jit.script(model)(torch.randn(2, 1, 20, 28)).shape == (2, 10)


@pytest.mark.parametrize("kernels", [(1,), (1, 3)], ids=str)
def test_local_kernels_of_size_1_fuse(kernels):
    torch.manual_seed(0)
    mixer = MRFFI(40, 0.4, 0.4, wavelet_kernel=3, local_kernels=kernels).eval()
    nn.init.ones_(mixer.proj.norm.weight)
    x = torch.randn(2, 40, 5, 6)
    with torch.no_grad():
        expected = mixer(x)
        torch.testing.assert_close(fold_batchnorm(mixer)(x), expected, rtol=1e-4, atol=1e-5)


def test_split_channels_rounds_a_tie_up():
    assert split_channels(50, 0.8, 0.2) == (48, 2, 0)  # 40 is between 32 and 48
    assert split_channels(64, 1.0, 0.0) == (64, 0, 0)


def test_initial_values():
    """Every block starts as twice the identity: the norm that ends each residual branch has weight 0."""
    model = mobilemamba.nano().eval()
    block = model.stages[1].blocks[0]
    x = torch.randn(1, 96, 4, 4)
    assert torch.equal(block(x), 2 * x)
    ss2d = block.mixer.global_part.ss2d
    assert not ss2d.A_log.any()
    assert (ss2d.D == 1).all()
    assert (block.mixer.global_part.base_scale == 1).all()
    assert (block.mixer.global_part.wavelet.scale == torch.tensor(0.1)).all()


def test_no_weight_decay_names_the_parameters_of_the_state_space(nano):
    names = nano.no_weight_decay()
    assert {n.rsplit(".", 1)[-1] for n in names} == {"A_log", "D", "dt_bias"}
    assert names <= dict(nano.named_parameters()).keys()


def test_drop_path():
    torch.manual_seed(0)
    x = torch.ones(2000, 3)
    drop = DropPath(0.25)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y == y[:, :1]).all()  # whole samples
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(x), x)
    rates = [b.drop_path.rate for s in create_model("b1", num_classes=2).stages for b in s.blocks]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.03)


class OtherNorm(nn.Module):
    """A norm of another family, whose statistics also change its output."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("total", torch.zeros(channels))

    def forward(self, x):
        if self.training:
            self.total += x.detach().mean((0, 2, 3))
        return x - self.total[:, None, None] / 2


NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    functools.partial(nn.BatchNorm2d, momentum=None),
    functools.partial(nn.BatchNorm2d, track_running_stats=False),
    OtherNorm,
)


def test_gradient_checkpointing_changes_nothing_but_memory():
    torch.manual_seed(0)
    plain = mobilemamba.nano(drop_path_rate=0.2, depths=(2, 1, 1)).stages[0].double()
    layers = [module for module in plain.modules() if isinstance(getattr(module, "norm", None), nn.BatchNorm2d)]
    for layer, make in zip(layers, itertools.cycle(NORMS), strict=False):
        layer.norm = make(layer.norm.num_features).double()
    saving = copy.deepcopy(plain)
    saving.grad_checkpointing = True
    x = torch.randn(3, 48, 3, 3, dtype=torch.float64)
    for model in (plain, saving):
        torch.manual_seed(1)
        loss = model(x).sin().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # with retain_graph the blocks are computed a third time
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), name  # the running statistics saw the batch once


def test_gradient_checkpointing_compiles():
    model = mobilemamba.nano()
    model.set_grad_checkpointing()
    saving = model.stages[0].double()
    assert saving.grad_checkpointing
    y = torch.randn(2, 48, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(saving, fullgraph=True, backend="eager")(y), saving(y))


def test_refused_arguments(nano):
    refused = [
        (lambda: create_model("s7"), "unknown model 's7'; did you mean s6"),
        (lambda: nano(torch.randn(2, 3, 28, 28)), r"expected images of shape (batch, 1, height, width), got [2, 3, 28"),
        (lambda: nano(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)), "floating-point type, scaled and normalised, got"),
        (lambda: nano(torch.randn(1, 28, 28)), "expected images of shape (batch, 1, height, width), got [1, 28, 28]"),
        (lambda: nano(torch.randn(1, 1, 0, 28)), "expected height and width of at least 1, got [1, 1, 0, 28]"),
        (lambda: mobilemamba.nano(num_classes=True), "num_classes: expected an integer of at least 0, got True"),
        (lambda: mobilemamba.nano(in_chans=0), "in_chans: expected an integer of at least 1, got 0"),
        (lambda: mobilemamba.nano(in_chans=3.0), "in_chans: expected an integer of at least 1, got 3.0"),
        (lambda: mobilemamba.nano(distillation="no"), "distillation: expected True or False, got 'no'"),
        (
            lambda: mobilemamba.nano(drop_path_rate=1.5),
            "drop_path_rate: expected a number of at least 0 and below 1, g",
        ),
        (lambda: mobilemamba.nano(drop_path_rate="0.1"), "at least 0 and below 1, got '0.1'"),
        (lambda: mobilemamba.nano(drop_path_rate=float("nan")), "at least 0 and below 1, got nan"),
        (lambda: mobilemamba.nano(widths=(48, 96)), "depths: expected a tuple of 2, got (1, 2, 1)"),
        (lambda: mobilemamba.nano(depths=(1, 2.0, 1)), "depths: expected an integer of at least 0, got 2.0"),
        (
            lambda: mobilemamba.nano(local_kernels=((5,), (3,))),
            "local_kernels: expected a tuple of 3, got ((5,), (3,))",
        ),
        (lambda: mobilemamba.nano(patch_strides=()), "patch_strides: expected a tuple of at least 1, got ()"),
        (lambda: mobilemamba.nano(d_state=0), "d_state: expected an integer of at least 1, got 0"),
        (lambda: mobilemamba.nano(ssm_ratio=0), "ssm_ratio: expected at least one inner channel of 32 channels, got 0"),
        (lambda: MRFFI(40.0, 0.4, 0.4, 3, (3,)), "dim: expected an integer of at least 1, got 40.0"),
        (lambda: MRFFI(40, 0.1, 0.4, 3, (3,)), "global_ratio=0.1 of 40 channels gives a global part of 0 channels"),
        (lambda: MRFFI(40, 0.4, -0.1, 3, (3,)), "local_ratio: expected a number of at least 0, got -0.1"),
        (lambda: MRFFI(40, 0.4, 0.4, 3, 3), "local_kernels: expected a tuple of at least 1, got 3"),
        (lambda: MRFFI(40, 0.4, 0.4, 3, (4,)), "local_kernels: expected an odd number, got 4"),
        (lambda: MRFFI(40, 0.4, 0.05, 3, (3, 5, 7)), "3 local kernel sizes (3, 5, 7) need as many channels, got 2"),
        (lambda: MRFFI(40, 0.4, 0.4, 4, (3,)), "wavelet_kernel: expected an odd number, got 4"),
        (lambda: MRFFI(40, 0.4, 0.4, 3.0, (3,)), "wavelet_kernel: expected an integer of at least 1, got 3.0"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
