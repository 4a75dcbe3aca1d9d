"""Weights as trainers write them: nested, wrapped, with prefixes, beside other networks."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mobilemamba import MobileMamba, create_model, weights


@pytest.fixture(scope="module")
def nano() -> MobileMamba:
    return create_model("nano", pretrained=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


OTHER = {"loss.weight": torch.ones(3), "n_averaged": torch.tensor(5)}  # beside the network, without its prefix
TRAINERS = {  # from a network and another one that must not be taken
    **{
        prefix: lambda net, _, prefix=prefix: prefixed(prefix, net)
        for prefix in (
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "model.",
            "backbone.",
            "a.b.c_",
        )
    },
    **{
        wrapper: lambda net, _, wrapper=wrapper: {wrapper: net, "epoch": 3, "optimizer": {"state": {0: net}}}
        for wrapper in ("state_dict", "model", "model_state_dict", "ema", "net")
    },
    "lightning": lambda net, _: {"state_dict": {**prefixed("model._orig_mod.", net), **OTHER}, "callbacks": {}},
    "averaged model": lambda net, _: {**prefixed("module.", net), **OTHER},
    "timm": lambda net, wrong: {"state_dict": wrong, "state_dict_ema": prefixed("module.", net), "arch": "nano"},
    "torchvision": lambda net, wrong: {"model": wrong, "model_ema": {**prefixed("module.", net), **OTHER}},
    "average in a module": lambda net, wrong: {**prefixed("model.", wrong), **prefixed("ema_model.module.", net)},
    "deep": lambda net, _: {"state": {"modules": {"model": prefixed("module.", net)}}},
    "compiled stages": lambda net, _: {key.replace("blocks.", "blocks._orig_mod."): net[key] for key in net},
    "a teacher of another kind": lambda net, _: {
        **prefixed("student.", net),
        **prefixed("teacher.", {"stages.0.blocks.0.weight": torch.ones(3)}),
    },
    "options and scalars": lambda net, _: {
        "model": net,
        "args": argparse.Namespace(lr=0.1, output=Path("runs")),
        "best": np.float64(0.9),
        "epoch": np.int64(3),
    },
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_state_dicts_as_trainers_write_them(tmp_path: Path, nano: MobileMamba, trainer: str) -> None:
    wrong = {key: torch.zeros(()).expand_as(tensor) for key, tensor in nano.state_dict().items()}
    torch.save(TRAINERS[trainer](nano.state_dict(), wrong), tmp_path / "file.pt")
    back = weights.read(tmp_path / "file.pt")
    assert back.preset == "nano"
    assert same(back.state_dict, nano.state_dict())


def test_several_networks_are_named(tmp_path: Path, nano: MobileMamba) -> None:
    net = nano.state_dict()
    for content, message in (
        ({"model": net, "teacher": prefixed("module.", net)}, "got 2: model, teacher.module; save the state_dict"),
        (
            {"state_dict": {**prefixed("a.", net), **prefixed("b.c.", net), **prefixed("ema.", net)}},
            "got 3: state_dict",
        ),
        ({**net, "old": net}, "got 2: the top level, old;"),
    ):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=rf"file\.pt: expected one network, {message}") as caught:
            weights.read(tmp_path / "file.pt")
        assert "\n" not in str(caught.value)


def test_load_into_takes_prefixes_on_both_sides(nano: MobileMamba) -> None:
    model, compiled = create_model("nano"), torch.nn.Module()
    compiled._orig_mod = model
    for wrapped in (model, torch.nn.DataParallel(model), compiled):
        for given in (nano.state_dict(), prefixed("module._orig_mod.", nano.state_dict())):
            torch.nn.init.zeros_(model.head.linear.weight)
            weights.load_into(wrapped, given)
            assert same(model.state_dict(), nano.state_dict())
    with pytest.raises(ValueError, match="expected weights of nano, got weights of a fused model; save those of the"):
        weights.load_into(model, nano.fuse().state_dict())
