"""The mixers in plain PyTorch: against their recurrences step by step in float64, and in whole networks."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_ablations import error, trained
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mobilemamba
from mobilemamba import weights
from mobilemamba.deploy import export, portable
from mobilemamba.models.mixers import MIXERS
from mobilemamba.models.mixers.mlstm import mlstm
from mobilemamba.models.mixers.rwkv6 import rwkv6, shifted
from mobilemamba.models.mixers.ttt import ttt_linear

#: The MACs of S6 with each mixer in the paper's ablation, in millions (arXiv 2411.15941, with 224 pixels).
PUBLISHED = {"mamba": 652, "ttt": 625, "mlstm": 695, "rwkv6": 658}
LENGTHS = [1, 4, 5, 11]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ttt_arguments(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    rate = torch.rand(2, 3, length, 1, dtype=torch.float64)
    return [*(randn(2, 3, length, 4) for _ in range(3)), rate, randn(3, 4, 4), *(randn(3, 1, 4) for _ in range(3))]


def ttt_step_by_step(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, size: int
) -> Tensor:
    """One step of gradient descent for each position, with autograd's gradient at the start of the mini-batch."""

    def model_of(x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        y = torch.einsum("bhi,bhij->bhj", x, state[0]) + state[1]
        return x + F.layer_norm(y, [x.size(-1)], eps=1e-6) * scale[:, 0] + shift[:, 0]

    batch = q.size(0)
    state = weight.expand(batch, *weight.shape).clone(), bias[:, 0].expand(batch, *bias[:, 0].shape).clone()
    outputs = []
    for t in range(q.size(2)):
        if t % size == 0:
            start = state
        with torch.enable_grad():
            at = [x.detach().requires_grad_() for x in start]
            loss = (model_of(k[:, :, t], (at[0], at[1])) - v[:, :, t]).square().sum() / 2
            grads = torch.autograd.grad(loss, at)
        step = rate[:, :, t]
        state = state[0] - step[..., None] * grads[0], state[1] - step * grads[1]
        outputs.append(model_of(q[:, :, t], state))
    return torch.stack(outputs, 2)


def mlstm_arguments(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    return [*(randn(2, 3, length, 4) for _ in range(3)), *(2 * randn(2, 2, 3, length) for _ in range(2))]


def mlstm_step_by_step(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """The published recurrence without its stabilizer, in both directions."""
    width, length = q.size(3), q.size(2)
    total = torch.zeros_like(q)
    for direction, order in enumerate((range(length), reversed(range(length)))):
        memory, norm = q.new_zeros(*q.shape[:2], width, width), q.new_zeros(*q.shape[:2], width)
        for t in order:
            i, f = input_gate[:, direction, :, t].exp(), forget_gate[:, direction, :, t].sigmoid()
            key = k[:, :, t] / math.sqrt(width)
            memory = f[..., None, None] * memory + i[..., None, None] * v[:, :, t, :, None] * key[:, :, None, :]
            norm = f[..., None] * norm + i[..., None] * key
            divisor = (norm * q[:, :, t]).sum(-1).abs().clamp_min(1)
            total[:, :, t] += torch.einsum("bhvk,bhk->bhv", memory, q[:, :, t]) / divisor[..., None]
    return total


def rwkv6_arguments(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    return [*(randn(2, 3, length, 4) for _ in range(3)), -(2 * randn(2, 3, length, 4)).exp(), randn(3, 1, 4)]


def rwkv6_step_by_step(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, size: int) -> Tensor:
    state, outputs = r.new_zeros(*r.shape[:2], r.size(3), r.size(3)), []
    for t in range(r.size(2)):
        added = k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, :, t], state + bonus[:, 0, :, None] * added))
        state = log_decay[:, :, t, :, None].exp() * state + added
    return torch.stack(outputs, 2)


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[int], list[Tensor]], tuple[int, ...]]]
FORMS = {
    "ttt": (ttt_linear, ttt_step_by_step, ttt_arguments, (4,)),
    "mlstm": (mlstm, mlstm_step_by_step, mlstm_arguments, ()),
    "rwkv6": (rwkv6, rwkv6_step_by_step, rwkv6_arguments, (4,)),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FORMS)
def test_the_recurrence_step_by_step(name: str, length: int) -> None:
    form, plain, arguments_of, rest = FORMS[name]
    arguments = arguments_of(length)
    torch.testing.assert_close(form(*arguments, *rest), plain(*arguments, *rest), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name: str) -> None:
    form, _, arguments_of, rest = FORMS[name]
    arguments = [x[:1] if x.size(0) == 2 else x for x in arguments_of(6)]
    arguments = [x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(lambda *inputs: form(*inputs, *rest), arguments, fast_mode=True)


def test_strong_decays_and_gates_stay_finite() -> None:
    """Exponents are at most 0, whatever the data are."""
    r, k, v, log_decay, bonus = (x.float() for x in rwkv6_arguments(40))
    arguments = [x.requires_grad_() for x in (r, k, v, 1e4 * log_decay, bonus)]
    y = rwkv6(*arguments, 16)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(x.grad.isfinite().all() for x in arguments)
    q, k, v, gate, keep = (x.float() for x in mlstm_arguments(40))
    arguments = [x.requires_grad_() for x in (q, k, v, 100 * gate, 100 * keep)]
    y = mlstm(*arguments)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(x.grad.isfinite().all() for x in arguments)


def test_shifted_moves_each_quarter_by_a_pixel() -> None:
    x = torch.zeros(1, 4, 3, 3)
    x[:, :, 1, 1] = 1
    assert [tuple(plane.nonzero()[0].tolist()) for plane in shifted(x)[0]] == [(1, 2), (1, 0), (2, 1), (0, 1)]


@pytest.mark.parametrize("name", MIXERS)
def test_every_pixel_sees_every_other_one(name: str) -> None:
    torch.manual_seed(0)
    mixer = MIXERS[name](32).double().eval()
    x = torch.randn(1, 32, 5, 4, dtype=torch.float64, requires_grad=True)
    for row, column in ((0, 0), (4, 3)):
        (grad,) = torch.autograd.grad(mixer(x)[0, :, row, column].sum(), x)
        assert (grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", MIXERS)
def test_a_network_learns_folds_and_is_exported(name: str, tmp_path) -> None:
    model = trained(mixer=name)
    model.train()(torch.randn(4, 1, 20, 20)).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    fused = model.fuse()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    with torch.no_grad():
        for size in ((2, 1, 28, 28), (1, 1, 19, 33), (1, 1, 1, 1)):
            images = torch.randn(size)
            assert error(fused(images), model(images)) < 1e-4
        assert error(fused.to(torch.bfloat16)(images.bfloat16()), model(images)) < 0.1
    preprocessing = weights.entry("nano").preprocessing
    export(model, tmp_path / "model.pt", "torchscript", preprocessing=preprocessing)
    with pytest.raises(ValueError, match=r"expected torchscript for a model with the mixer \w+, got aoti"):
        export(model, tmp_path / "model.pt2", "aoti", preprocessing=preprocessing)
    with pytest.raises(ValueError, match=r"mixer: an? \w+ has no form in standard operators"):
        portable(model)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_network_is_traced_and_compiled(name: str) -> None:
    model = trained(mixer=name).fuse()
    images = torch.randn(2, 1, 20, 24)
    assert error(torch.fx.symbolic_trace(model)(images), model(images)) < 1e-6
    assert error(torch.compile(model, backend="eager", fullgraph=True)(images), model(images)) < 1e-6


@pytest.mark.parametrize("name", ["mamba", *MIXERS])
def test_macs_are_near_the_published_ones(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        model = mobilemamba.s6(mixer=name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 224, 224))
    macs = counter.get_total_flops() / 2e6
    print(f"{name}: {macs:.0f} M, published {PUBLISHED[name]} M")
    assert macs == pytest.approx(PUBLISHED[name], rel=0.035)


class Mean(nn.Module):
    """A user's mixer: every pixel gets the mean of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))[:, :, None, None].expand_as(x)


def test_a_users_mixer() -> None:
    model, images = trained(mixer=Mean), torch.randn(2, 1, 28, 28)
    assert isinstance(model.stages[0].blocks[0].mixer.global_part.mixer, Mean)
    seen = []
    model.stages[0].blocks[0].mixer.global_part.mixer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        fused = model.fuse()
        assert error(fused(images), model(images)) < 1e-4
    assert len(seen) == 2, "a mixer that is called as it is keeps its hooks"
    model.stages[0].blocks[0].ffn0.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"fuse: stages\.0\.blocks\.0\.ffn0 has hooks"):
        model.fuse()


def test_checkpoints_keep_the_mixer(tmp_path) -> None:
    model = trained(mixer="ttt")
    path = tmp_path / "model.safetensors"
    weights.save(path, weights.Checkpoint(model.state_dict(), "nano", {"mixer": "ttt", "depths": (1, 1, 1)}))
    again, stored = mobilemamba.open_model(path)
    assert stored.model_args["mixer"] == "ttt"
    images = torch.randn(1, 1, 20, 20)
    assert torch.equal(again.eval()(images), model(images))
    for other in (path, tmp_path / "model.pt"):
        with pytest.raises(ValueError, match=r"model_args: expected the name of a mixer, got <class .*Mean'>"):
            weights.save(other, weights.Checkpoint({}, "nano", {"mixer": Mean}))
    weights.save(path, weights.Checkpoint(model.state_dict(), "nano", {"mixer": "s7"}))
    with pytest.raises(ValueError, match=r"mixer: expected one of mamba, ttt, mlstm, rwkv6, or a function .* got 's7'"):
        mobilemamba.open_model(path)
    with pytest.raises(ValueError, match=r"model_args: expected mixer of type .*, got \['ttt'\]"):
        weights.identify.check_model_args({"mixer": ["ttt"]})


def test_parameters_of_the_state_get_no_weight_decay() -> None:
    for name, count in (("ttt", 3), ("rwkv6", 3)):
        model = mobilemamba.nano(mixer=name)
        assert len({name.rsplit(".", 1)[-1] for name in model.no_weight_decay()}) == count


def test_refused_mixers() -> None:
    refused = [
        ({"mixer": "mamba2"}, "mixer: expected one of mamba, ttt, mlstm, rwkv6, or a function of the channels, got"),
        ({"mixer": 3}, "mixer: expected one of .* got 3"),
        ({"mixer": lambda channels: channels}, "mixer: expected a function that returns a module, got 32 from it"),
        (
            {"mixer": "ttt", "d_state": 2},
            "ssm_ratio, d_state, directions: expected the defaults, .* got 2.0, 2, 2 with",
        ),
        ({"mixer": "s7", "global_ratios": (0, 0, 0)}, "mixer: expected one of"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            mobilemamba.nano(**options)
