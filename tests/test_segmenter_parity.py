"""Parity of the segmenters' necks and heads with the published ones: maps, logits, losses, gradients and statistics.

The figures are explained in ``segmenter_figures.py``.
"""

import copy
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from figures import make_input
from segmenter_figures import FULL, NAMES, ZERO, Case, Fixed, choice, labels, small_case
from torch import Tensor, nn

from mobilemamba import downstream
from mobilemamba.downstream import Segmenter

EXACT = 1e-9  # relative error in float64
ILL = 1e-6  # of batch statistics over two values, in the global mean's norm
SINGLE = 1e-4  # error in float32


@pytest.fixture(params=list(NAMES), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case.load(request.param)


@pytest.fixture(scope="module")
def original(case: Case) -> Segmenter:
    """The model in float64 with the published values; tests replace the backbone by maps."""
    options = {"depths": (0, 0, 0)}
    model: Segmenter = downstream.create_model(NAMES[case.name], "b4", backbone_options=options, dropout=0.0)
    own = {key for key in model.state_dict() if not re.match(r"backbone\.(body\.)*(patch_embed|stages)", key)}
    state = case.state_dict()
    assert state.keys() == own
    model.load_state_dict(state, strict=False)
    if hasattr(model.backbone, "neck"):
        model.backbone.body = nn.Identity()
    else:
        model.backbone = nn.Identity()
    return model.double()


def on_maps(original: Segmenter, maps: dict[str, Tensor], dtype: torch.dtype) -> Segmenter:
    model = copy.deepcopy(original).to(dtype)
    fixed = Fixed({name: x.to(dtype) for name, x in maps.items()})
    if hasattr(model.backbone, "neck"):
        model.backbone.body = fixed
    else:
        model.backbone = fixed
    return model


@pytest.mark.skipif(not FULL.is_dir(), reason=f"no full figures in {FULL}; see MOBILEMAMBA_DOWNSTREAM_PARITY")
def test_leading_figures_are_those_of_the_full_ones(case: Case) -> None:
    small = small_case(case.name)
    if case.salt:
        pytest.skip("the leading figures are for no salt")
    assert small.keys == case.keys
    assert small.figures.keys() == case.figures.keys()
    for name, value in small.figures.items():
        np.testing.assert_allclose(value, case.figures[name].reshape(-1)[: value.size].reshape(value.shape), 1e-11)


def error(actual: Tensor, expected: np.ndarray, dtype: torch.dtype) -> float:
    """Relative error in the norm for float64, largest error in standard deviations for float32."""
    reference = torch.from_numpy(np.asarray(expected)).double().flatten()
    difference = actual.detach().double().flatten() - reference
    if dtype == torch.float64 or len(reference) < 3:
        return float(difference.norm() / reference.norm().clamp(min=ZERO))
    return float(difference.abs().max() / reference.std())


def check(case: Case, name: str, actual: Tensor, limit: float) -> Iterator[str]:
    """Compares a tensor with its figures, and yields their names."""
    dtype = actual.dtype
    if name in case.figures:
        yield name
        assert error(actual, case.figures[name], dtype) < limit, name
        return
    for part in ("shape", "sum", "abssum", "sub"):
        yield f"{name}/{part}"
        expected = case.figures[f"{name}/{part}"]
        if part == "shape":
            assert list(actual.shape) == expected.tolist(), name
        elif part == "sub":
            values = actual.detach().flatten()[choice(actual.numel())[: len(expected)]]
            assert error(values, expected, dtype) < limit, name
        else:
            total = actual.detach().double().sum() if part == "sum" else actual.detach().double().abs().sum()
            assert abs(float(total) - expected) < limit * float(case.figures[f"{name}/abssum"]), f"{name}/{part}"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("which", ["even", "odd"])
@torch.no_grad()
def test_evaluation(case: Case, original: Segmenter, which: str, dtype: torch.dtype, fused: bool) -> None:
    """Neck, logits at the resolution of the heads, of the images, and the classes of the original images' pixels."""
    model = on_maps(original, case.maps(which), dtype).eval()
    model = model.fuse() if fused else model
    limit = EXACT if dtype == torch.float64 else SINGLE
    maps = model.backbone(torch.empty(0))
    images = torch.empty(len(maps["0"]), 3, *case.image_size(which), dtype=dtype)
    found = {"logits": model.classifier(maps)}
    if fused == (dtype == torch.float32):  # large arrays, which follow from the logits
        found["resized_logits"] = model(images)["out"]
    if case.name == "semfpn":
        found.update({f"neck/{i}": x for i, x in maps.items()})
    elif not fused:
        found["aux_logits"] = model.aux_classifier(maps)
    compared: set[str] = set()
    for name, x in found.items():
        compared.update(check(case, f"{which}/{name}", x, limit))
    if dtype == torch.float64 and not fused:  # the smallest difference of two classes' logits is under 1e-5
        for i, classes in enumerate(model.predict(images, case.original_size(which)).split(1)):
            compared.update(check(case, f"{which}/pred/{i}", classes, 1e-12))
    left = {name for name in case.figures if re.match(rf"{which}/(?!train|eval|pred_min_margin)", name)} - compared
    if dtype == torch.float64 and not fused:
        assert not left, "figures that nothing was compared with"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses_and_gradients(case: Case, original: Segmenter, mode: str, dtype: torch.dtype) -> None:
    ill = mode == "train" and case.name != "semfpn"
    if ill and dtype == torch.float32:
        pytest.skip("two values in a norm: ill-conditioned in float32")
    limit = (ILL if ill else EXACT) if dtype == torch.float64 else SINGLE
    model = on_maps(original, case.maps("odd"), dtype).train(mode == "train")
    truth = labels()
    images = torch.empty(2, 3, *case.image_size("odd"), dtype=dtype)
    parameters = {published: model.get_parameter(name) for published, name in case.parameters().items()}
    prefix = f"odd/{mode}"
    compared: set[str] = set()
    if mode == "train":
        assert np.array_equal(np.bincount(truth.flatten(), minlength=256), case.figures[f"{prefix}/label_hist"])
        compared.add(f"{prefix}/label_hist")

    maps = model.backbone(torch.empty(0))
    logits = {"logits": model.classifier(maps)}
    if model.aux_classifier is not None:
        logits["aux_logits"] = model.aux_classifier(maps)
    if mode == "train":
        for name, x in logits.items():
            compared.update(check(case, f"{prefix}/{name}", x, limit))
        for name, published in case.statistics().items():
            compared.update(check(case, f"{prefix}/running_norm/{published}", model.get_buffer(name).norm(), limit))
    scalar = sum((x * make_input(tuple(x.shape), case.salt).to(dtype)).mean() for x in logits.values())
    assert isinstance(scalar, Tensor)
    absolute = sum(float((x.detach() * make_input(tuple(x.shape), case.salt)).abs().mean()) for x in logits.values())
    assert abs(float(scalar.detach()) - case.figures[f"{prefix}/scalar"]) < limit * absolute
    compared.add(f"{prefix}/scalar")

    outputs = model(images)
    loss = downstream.segmentation_loss(outputs, truth)
    parts = [f"{prefix}/loss/{name}" for name in ("decode_ce", "aux_ce") if f"{prefix}/loss/{name}" in case.figures]
    assert len(parts) == len(outputs)
    assert float(loss.detach()) == pytest.approx(sum(float(case.figures[part]) for part in parts), rel=limit)
    compared.update(parts)

    for kind, value in (("grad", scalar), ("grad_loss", loss)):
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected = float(case.figures[f"{prefix}/{kind}/{name}"])
            assert float(gradient.double().norm()) == pytest.approx(expected, rel=limit, abs=ZERO), name
            compared.add(f"{prefix}/{kind}/{name}")
    assert compared == {name for name in case.figures if name.startswith(f"{prefix}/")}
