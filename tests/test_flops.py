"""torch's flop counter on the operators and models: against the unfused forms and the published MACs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mobilemamba
from mobilemamba import ops, weights


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def with_backward(call: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: call().sum().backward()


@pytest.mark.parametrize(("kernel", "stride", "activation"), [(3, 1, "none"), (7, 1, "relu"), (5, 2, "silu")])
def test_depthwise(kernel: int, stride: int, activation: str) -> None:
    arguments = [*leaves((2, 5, 9, 8), (5, 1, kernel, kernel), (5,)), None, stride, activation]
    native, plain = (lambda: ops.depthwise_conv2d(*arguments)), (lambda: reference.depthwise_conv2d(*arguments))
    assert flops(native) == flops(plain) > 0
    # not the plain form's: torch counts a grouped convolution's gradient of the weight once for every group
    assert flops(with_backward(native)) == 3 * flops(native)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_packed(kernel: int, stride: int) -> None:
    x, weight, bias = leaves((2, 33, 5, 4), (70, 33, kernel, kernel), (70,))
    packed = ops.pack_conv2d_weight(weight)
    expected = flops(lambda: F.conv2d(x, weight, bias, stride, kernel // 2))
    assert flops(lambda: ops.packed_conv2d(x, packed, bias, None, kernel, stride, "relu")) == expected > 0
    assert flops(lambda: ops.packed_conv2d(x, packed, bias, kernel_size=kernel, stride=stride)) == expected


def test_ffn() -> None:
    x, *weights = leaves((2, 33, 5, 4), (70, 33), (70,), (33, 70), (33,))
    packed = [ops.pack_conv2d_weight(w[:, :, None, None]) if w.dim() == 2 else w for w in weights]
    rows = x.permute(0, 2, 3, 1)
    expected = flops(lambda: F.linear(F.linear(rows, *weights[:2]).relu(), *weights[2:]))
    assert flops(lambda: ops.ffn(x, None, *weights)) == expected > 0
    assert flops(lambda: ops.ffn(x, x, *packed)) == expected
    assert flops(with_backward(lambda: ops.ffn(x, None, *weights))) == 3 * expected


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_haar(size: tuple[int, int]) -> None:
    x, weight = leaves((2, 3, *size), (12, 1, 5, 5))
    expected = flops(lambda: reference.haar_conv2d(x, weight))
    assert flops(lambda: ops.haar_conv2d(x, weight)) == expected > 0
    assert flops(with_backward(lambda: ops.haar_conv2d(x, weight))) == 3 * expected


class Products(TorchDispatchMode):
    """Counts the elements that ``torch.mul`` computes; torch's counter ignores them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        self.count += y.numel() if func is torch.ops.aten.mul.Tensor else 0
        return y


def test_scan() -> None:
    shapes = [(2, 6, 7), (2, 2, 3, 7), (2, 6, 1), (2, 2, 1, 7), (2, 2, 1, 7), (2, 6), (2, 6, 3), (2, 6)]
    arguments = leaves(*shapes)
    with torch.no_grad(), Products() as products:
        of_matrices = flops(lambda: reference.bidirectional_scan(*arguments))
    expected = of_matrices + 2 * products.count
    assert flops(lambda: ops.bidirectional_scan(*arguments)) == expected > of_matrices > 0
    assert flops(with_backward(lambda: ops.bidirectional_scan(*arguments))) == 3 * expected


PUBLISHED = {"t2": 255, "t4": 413, "s6": 652, "b1": 1080, "b2": 2427, "b4": 4313}  # millions, by the paper


@pytest.mark.parametrize("name", PUBLISHED)
def test_models(name: str) -> None:
    with torch.device("meta"):  # which has shapes and no arithmetic
        model = mobilemamba.create_model(name).eval()
        side = weights.entry(name).preprocessing.crop
        macs = flops(lambda: model(torch.randn(1, 3, side, side))) / 2e6
    assert macs == pytest.approx(PUBLISHED[name], rel=0.01)


@torch.no_grad()
def test_the_ways_to_compute_a_model_cost_the_same() -> None:
    model = mobilemamba.nano().eval()
    fused, x = model.fuse(), torch.randn(3, 1, 28, 28)
    expected = flops(lambda: model(x))
    assert flops(lambda: fused(x)) == pytest.approx(expected, rel=1e-3)
    with reference.plain_pytorch():
        assert flops(lambda: model(x)) == pytest.approx(expected, rel=0.02)  # but for the scan's recurrence


@torch.no_grad()
def test_backbone() -> None:
    fused, x = mobilemamba.nano().fuse(), torch.randn(2, 1, 27, 30)

    def layers() -> None:
        y = fused.patch_embed(x)
        for stage in fused.stages:
            y = stage(y)
        fused.forward_head(y)

    assert flops(lambda: fused(x)) == flops(layers) > 0
    assert flops(lambda: fused.forward_features(x)) == flops(layers) - 2 * 2 * fused.num_features * fused.num_classes


@pytest.mark.parametrize("imports", ["mobilemamba, torch.utils.flop_counter", "torch.utils.flop_counter, mobilemamba"])
def test_formulas_are_registered_in_either_order_of_imports(tmp_path: Path, imports: str) -> None:
    code = f"import {imports}; print(torch.ops.mobilemamba.haar_conv2d in torch.utils.flop_counter.flop_registry)"
    code += "; import sys; print(sum('mobilemamba' in type(finder).__module__ for finder in sys.meta_path))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).split() == ["True", "0"]
