"""Parity of the segmenters' necks and heads with the published ones: maps, logits, losses, gradients and statistics.

Figures, for two sets of feature maps, ``even`` and ``odd``:

- ``SET/{neck/i,logits,aux_logits,resized_logits,pred/i}``: in evaluation; ``resized_logits`` have the images' size,
  ``pred`` are the classes at the original images' size.
- ``odd/{train,eval}/...``: losses, norms of gradients by published key, norms of updated statistics.
"""

import copy
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from downstream_figures import LARGE, ZERO, Case, Fixed, choice, scalar
from torch import Tensor, nn

from mobilemamba import downstream
from mobilemamba.downstream import Segmenter
from mobilemamba.downstream.published import convert, rename

NAMES = {"semfpn": "semantic_fpn", "deeplabv3": "deeplabv3", "pspnet": "pspnet"}

#: For each set: batch, sizes of the maps, size of the images, size of the original images.
SETS = {
    "even": (1, ((20, 28), (10, 14), (5, 7)), (320, 448), (243, 341)),
    "odd": (2, ((13, 19), (7, 10), (4, 5)), (200, 300), (200, 300)),
}
WIDTHS = (200, 376, 448)
EXACT = 1e-9  # relative error in float64
ILL = 1e-6  # of batch statistics over two values, in the global mean's norm
SINGLE = 1e-4  # error in float32


@pytest.fixture(params=list(NAMES), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case.load(request.param)


@pytest.fixture(scope="module")
def original(case: Case) -> Segmenter:
    """The model in float64 with the published values; :func:`on_maps` puts maps in the place of its backbone."""
    small = {"depths": (0, 0, 0)}
    model: Segmenter = downstream.create_model(NAMES[case.name], "b4", backbone_options=small, dropout=0.0)
    missing, unexpected = model.load_state_dict(convert(model, case.state_dict()), strict=False)
    assert not unexpected
    assert all(re.match(r"backbone\.(body\.)+(patch_embed|stages)\.", key) for key in missing)
    if case.name == "semfpn":
        model.backbone.body = nn.Identity()
    else:
        model.backbone = nn.Identity()
    return model.double()


def on_maps(case: Case, original: Segmenter, which: str, dtype: torch.dtype) -> Segmenter:
    model = copy.deepcopy(original).to(dtype)
    batch, sizes, *_ = SETS[which]
    maps = [case.make_input(batch, width, *size).to(dtype) for width, size in zip(WIDTHS, sizes, strict=True)]
    if case.name == "semfpn":
        model.backbone.body = Fixed(*maps)
    else:
        model.backbone = Fixed(*maps)
    return model


def labels() -> Tensor:
    """``(2, 200, 300)``: cells of 20 x 20 pixels, and a rectangle without a class."""
    truth = np.random.RandomState(7).randint(0, 150, (2, 10, 15)).repeat(20, 1).repeat(20, 2)
    truth[:, 40:60, 30:90] = 255
    return torch.from_numpy(truth)


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
        if part == "sub" and not case.is_whole and actual.numel() > LARGE:
            continue
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
    model = on_maps(case, original, which, dtype).eval()
    model = model.fuse() if fused else model
    limit = EXACT if dtype == torch.float64 else SINGLE
    maps = model.backbone(torch.empty(0))
    images = torch.empty(len(maps["0"]), 3, *SETS[which][2], dtype=dtype)
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
        for i, classes in enumerate(model.predict(images, SETS[which][3]).split(1)):
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
    model = on_maps(case, original, "odd", dtype).train(mode == "train")
    truth = labels()
    images = torch.empty(2, 3, *SETS["odd"][2], dtype=dtype)
    own = dict(model.named_parameters())
    parameters = {key: own[rename(model, key)] for key in case.keys if rename(model, key) in own}
    prefix = f"odd/{mode}"
    compared: set[str] = set()
    if mode == "train":
        counts = case.figures[f"{prefix}/label_hist"]
        assert np.array_equal(np.bincount(truth.flatten(), minlength=256)[: len(counts)], counts)
        compared.add(f"{prefix}/label_hist")

    maps = model.backbone(torch.empty(0))
    logits = {"logits": model.classifier(maps)}
    if model.aux_classifier is not None:
        logits["aux_logits"] = model.aux_classifier(maps)
    if mode == "train":
        for name, x in logits.items():
            compared.update(check(case, f"{prefix}/{name}", x, limit))
        for key in (key for key in case.keys if "running_" in key):
            norm = model.get_buffer(rename(model, key)).double().norm()
            assert float(norm) == pytest.approx(float(case.figures[f"{prefix}/running_norm/{key}"]), rel=limit), key
            compared.add(f"{prefix}/running_norm/{key}")
    value = scalar(case, list(logits.values()))
    size = sum(float((x.detach() * case.make_input(*x.shape)).abs().mean()) for x in logits.values())
    assert abs(float(value.detach()) - case.figures[f"{prefix}/scalar"]) < limit * size
    compared.add(f"{prefix}/scalar")

    outputs = model(images)
    loss = downstream.segmentation_loss(outputs, truth)
    parts = [f"{prefix}/loss/{name}" for name in ("decode_ce", "aux_ce") if f"{prefix}/loss/{name}" in case.figures]
    assert len(parts) == len(outputs)
    assert float(loss.detach()) == pytest.approx(sum(float(case.figures[part]) for part in parts), rel=limit)
    compared.update(parts)

    for kind, target in (("grad", value), ("grad_loss", loss)):
        gradients = torch.autograd.grad(target, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected = float(case.figures[f"{prefix}/{kind}/{name}"])
            assert float(gradient.double().norm()) == pytest.approx(expected, rel=limit, abs=ZERO), name
            compared.add(f"{prefix}/{kind}/{name}")
    assert compared == {name for name in case.figures if name.startswith(f"{prefix}/")}
