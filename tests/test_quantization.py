"""Products in 8 bits: the operator against integers in float64, the same bits everywhere, models, files, refusals."""

import copy
import io
import os
import pickle
import sys

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mobilemamba
from mobilemamba import cli, ops, weights
from mobilemamba.data import load
from mobilemamba.models.quantization import scale_of

TYPES = {torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # rounding of the result, relative


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same values with all instruction sets, which torch's own generator has not."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def expected_conv2d(x: Tensor, weight: Tensor, scale: float, zero_point: int, stride: int = 1) -> Tensor:
    """The convolution of the rounded values, in float64, by the documented formulas."""
    inverse = torch.tensor(1 / scale, dtype=torch.float32)
    rounded = ((x.float() * inverse).round().double() + zero_point).clamp(0, 255) - zero_point
    own = weight.abs().flatten(1).amax(1) / 127
    own = own.where(own > 0, 1)
    integers = (weight / own[:, None, None, None]).round().double()
    y = F.conv2d(rounded, integers, None, stride, weight.size(3) // 2)
    return y * (own * torch.tensor(scale, dtype=torch.float32)).double()[:, None, None]


@given(
    st.integers(1, 3),
    st.integers(1, 200),
    st.integers(1, 140),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([1, 1, 3, 5]),
    st.integers(1, 3),
    st.sampled_from([0, 3, 128, 255]),
    st.sampled_from(sorted(TYPES, key=str)),
)
def test_on_random_shapes(batch, inputs, outputs, height, width, kernel, stride, zero_point, dtype):
    """Products and sums are exact, so only the last roundings differ."""
    scale = 0.03125
    x, weight = randn(batch, inputs, height, width), randn(outputs, inputs, kernel, kernel, seed=1)
    x = ((x * 31).round() + 0.25).mul(scale).to(dtype)  # no value is in the middle of two
    bias, residual = randn(outputs), randn(batch, outputs, -(-height // stride), -(-width // stride), seed=2).to(dtype)
    packed = ops.quantize_conv2d_weight(weight, scale, zero_point)
    assert packed.shape == (-(-outputs // 32), -(-inputs * kernel**2 // 4) + 3, 32, 4)
    y = ops.packed_conv2d(x, packed, bias, residual, kernel, stride, "relu")
    plain = expected_conv2d(x, weight, scale, zero_point, stride) + bias.double()[:, None, None]
    expected = plain.relu() + residual.double()
    assert y.dtype == dtype
    assert float((y.double() - expected).abs().max()) <= TYPES[dtype] * max(1, float(plain.abs().max()))


def test_values_beyond_the_range():
    """They count as its ends, and NaN as the lower one."""
    packed = ops.quantize_conv2d_weight(torch.eye(4)[:, :, None, None], 0.5, 100)
    x = torch.tensor([-1e30, 1e30, float("nan"), -0.2])[None, :, None, None]
    y = ops.packed_conv2d(x, packed, torch.zeros(4))
    torch.testing.assert_close(y.flatten(), torch.tensor([-50.0, 77.5, -50.0, 0.0]))


def test_slices_of_channels_and_other_strides():
    x = randn(2, 40, 6, 5).contiguous(memory_format=torch.channels_last)
    for kernel in (1, 3):
        packed = ops.quantize_conv2d_weight(randn(33, 24, kernel, kernel, seed=1), 0.02, 128)
        for view in (x[:, 3:27], x.contiguous()[:, 3:27], x[:, 3:27, ::2, ::2]):
            y = ops.packed_conv2d(view, packed, randn(33), None, kernel)
            assert torch.equal(y, ops.packed_conv2d(view.clone(), packed, randn(33), None, kernel))


PROGRAM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_quantization import results
torch.set_num_threads(int(sys.argv[2]))
print(hashlib.sha256(b"".join(y.float().contiguous().numpy().tobytes() for y in results())).hexdigest())
"""


def results() -> list[Tensor]:
    found = []
    for i, (inputs, outputs, kernel, side) in enumerate([(192, 384, 1, 14), (75, 45, 1, 9), (24, 48, 3, 17)]):
        packed = ops.quantize_conv2d_weight(randn(outputs, inputs, kernel, kernel, seed=i), 0.02, 120)
        for dtype in TYPES:
            x, residual = (
                randn(3, inputs, side, side, seed=9).to(dtype),
                randn(3, outputs, side, side, seed=8).to(dtype),
            )
            found.append(ops.packed_conv2d(x, packed, randn(outputs), residual, kernel, 1, "relu"))
    return found


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
def test_same_bits_with_all_instruction_sets_and_numbers_of_threads(capability):
    hashes = set()
    for settings, threads in (({}, 1), ({"ATEN_CPU_CAPABILITY": capability}, 3)):
        command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), str(threads)]
        done = processes.run(command, settings)
        processes.check(done)
        hashes.add(done.stdout.split()[-1])
    assert len(hashes) == 1


def test_opcheck():
    packed = ops.quantize_conv2d_weight(randn(5, 8, 1, 1), 0.02, 128)
    arguments = (randn(2, 8, 3, 3), packed, randn(5), None, 1, 1, "none")
    torch.library.opcheck(torch.ops.mobilemamba.packed_conv2d.default, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: ops.quantize_conv2d_weight(w, 0.0, 1), "scale is 0, expected a positive number"),
        (lambda w: ops.quantize_conv2d_weight(w, float("nan"), 1), "scale is nan, expected a positive number"),
        (lambda w: ops.quantize_conv2d_weight(w, 0.1, 256), "zero_point is 256, expected 0 to 255"),
        (lambda w: ops.quantize_conv2d_weight(w * float("inf"), 0.1, 1), "weight has infinite elements or NaN"),
        (lambda w: ops.quantize_conv2d_weight(w.long(), 0.1, 1), "weight is Long, expected a floating-point type"),
        (lambda w: ops.quantize_conv2d_weight(w[0], 0.1, 1), "expected 4 dimensions"),
        (lambda w: ops.quantize_conv2d_weight(w.new_zeros(1, 70000, 1, 1), 0.1, 1), "has 70000 inputs for each output"),
    ],
)
def test_refused_weights(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(randn(5, 8, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {**a, "input": a["input"].double()},
            "weight is quantized; input is Double, expected Float",
        ),
        (lambda a: {**a, "weight": a["weight"][:, 1:]}, r"weight has shape \[1, 4, 32, 4\], expected .*as quantized"),
        (lambda a: {**a, "input": a["input"][:, :4]}, r"expected \[1, 4, 32, 4\] = as quantized"),
    ],
)
def test_refused_arguments(change, message):
    packed = ops.quantize_conv2d_weight(randn(5, 8, 1, 1), 0.02, 128)
    with pytest.raises(RuntimeError, match=message):
        ops.packed_conv2d(**change({"input": randn(2, 8, 3, 3), "weight": packed, "bias": randn(5)}))


def test_no_gradients():
    x = randn(2, 8, 3, 3).requires_grad_()
    y = ops.packed_conv2d(x, ops.quantize_conv2d_weight(randn(5, 8, 1, 1), 0.02, 128), randn(5))
    with pytest.raises(RuntimeError, match="a weight is quantized, which serves inference"):
        y.sum().backward()


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Normalised images of Fashion-MNIST, or random ones where it is not installed."""
    try:
        pixels = load("fashion-mnist").test.pixels[:1000]
    except OSError:
        return randn(256, 1, 28, 28)
    return weights.entry("nano").preprocessing.normalize(pixels)


@pytest.fixture(scope="module")
def quantized(images):
    return mobilemamba.nano(pretrained=True).quantize(images[:256].split(64))


@torch.inference_mode()
def test_classes_of_nano(images, quantized):
    """Of 1000 images few change their class. The products are in 8 bits, but for those that are documented."""
    fused = mobilemamba.nano(pretrained=True).fuse()
    assert float((fused(images).argmax(1) == quantized(images).argmax(1)).double().mean()) > 0.97
    names = {name for name, parameter in quantized.named_parameters() if parameter.dtype == torch.int8}
    dense = {name for name, parameter in fused.named_parameters() if parameter.dim() == 4 and parameter.size(3) == 2}
    rest = {name for name in dense - names if "squeeze_excite" not in name and not name.endswith("x_weight")}
    assert rest == {"patch_embed.0.weight", "head.conv.weight"}
    assert len(names) == 4 * (4 + 3) + 2 * (4 + 2) + 2  # blocks, transitions, the patch embedding


@torch.inference_mode()
def test_forms_of_a_quantized_model(images, quantized):
    x = images[:5]
    expected = quantized(x)
    script, archive = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(quantized), script)
    script.seek(0)
    torch.save(quantized.state_dict(), archive)
    archive.seek(0)
    other = mobilemamba.nano().quantize([x])
    other.load_state_dict(torch.load(archive))
    forms = (
        torch.jit.load(script),
        pickle.loads(pickle.dumps(quantized)),
        copy.deepcopy(quantized),
        other,
        quantized.fuse(),
        torch.fx.symbolic_trace(quantized),
    )
    assert all(torch.equal(form(x), expected) for form in forms)
    layers = copy.deepcopy(quantized)
    layers.stages[0].register_forward_hook(lambda *_: None)  # layer by layer instead of the one operator
    torch.testing.assert_close(layers(x), expected)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(quantized).to(dtype)
        assert cast(x.to(dtype)).dtype == dtype
        assert float((cast(x.to(dtype)).float() - expected).norm() / expected.norm()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x).dtype == torch.bfloat16


def test_compile(images, quantized):
    with torch.inference_mode():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images[:3]), quantized(images[:3]))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (1.0, 2.0), (-2.0, -1.0), (0.0, 0.0)])
def test_a_range_contains_zero_and_all_that_was_seen(low, high):
    scale, zero_point = scale_of(low, high)
    assert 0 <= zero_point <= 255
    assert -zero_point * scale <= min(low, 0) + scale / 2
    assert (255 - zero_point) * scale >= max(high, 0) - scale / 2


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches has no images"),
        ([torch.full((1, 1, 28, 28), float("nan"))], FloatingPointError, "finite inputs of patch_embed.2, got .* nan"),
        ([torch.zeros(1, 3, 28, 28)], ValueError, "expected images of shape"),
    ],
)
def test_refused_images(batches, error, message):
    with pytest.raises(error, match=message):
        mobilemamba.nano().quantize(batches)


def test_a_fused_model_is_refused():
    with pytest.raises(ValueError, match="expected a model that is not fused"):
        mobilemamba.nano().fuse().quantize([torch.zeros(1, 1, 28, 28)])


def test_standard_operators_refuse_a_quantized_model(quantized):
    with pytest.raises(ValueError, match="expected a model that is not quantized"):
        mobilemamba.deploy.portable(quantized)


def test_command(tmp_path, capsys):
    try:
        load("fashion-mnist")
    except OSError:
        pytest.skip("Fashion-MNIST is not installed")
    file = tmp_path / "nano.pt"
    assert cli.main(["quantize", "--data", "fashion-mnist", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    before, after = (float(line.split("top-1")[1].split("%")[0]) for line in printed.splitlines() if "top-1" in line)
    assert before - 0.3 <= after <= before + 0.3
    records = {"mobilemamba.dtype": ""}
    model = torch.jit.load(str(file), _extra_files=records)
    assert records["mobilemamba.dtype"] in (b"float32", "float32")
    assert any(parameter.dtype == torch.int8 for parameter in model.parameters())
