"""The model on a GPU: against the CPU in float64, a training step, and as CUDA graphs."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cuda import CUDA, float32_is_float32, turns_of_processes  # noqa: F401  (fixtures)
from torch import Tensor, nn

import mobilemamba


@pytest.fixture(scope="module")
def s6() -> mobilemamba.MobileMamba:
    """In float64 on the CPU, with residual branches that are not zero, as they are at initialisation."""
    torch.manual_seed(0)
    model = mobilemamba.s6()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.weight, 0.3, 0.03)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.double().eval()


IMAGES = (8, 3, 224, 224)


@torch.no_grad()
def test_model(s6):
    x = torch.randn(IMAGES)
    expected = s6(x.double())
    device_model, device_x = copy.deepcopy(s6).float().to(CUDA), x.to(CUDA)
    last = device_x.contiguous(memory_format=torch.channels_last)
    results = [device_model(device_x), device_model(last), device_model.fuse()(device_x)]
    for y in results:
        assert error(y, expected) < 1e-4
    torch.testing.assert_close(results[1], results[0])  # for either layout of the input
    maps = device_model.forward_features(last, stages=True)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            assert error(device_model(device_x), expected) < 5e-2


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the norm."""
    return ((actual.detach().cpu().double() - expected).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-8), (torch.float32, 5e-2)],  # float32 on the CPU is off by up to 1e-2
    ids=str,
)
def test_training_step(s6, dtype, tolerance):
    """Loss, gradients and statistics."""
    x, labels = torch.randn(IMAGES), torch.arange(IMAGES[0])

    def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.requires_grad_()
        loss = nn.functional.cross_entropy(model.train()(x), labels.to(x.device))
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {"loss": loss.detach(), "image": x.grad, **grads, **dict(model.named_buffers())}

    expected = train(copy.deepcopy(s6), x.double())
    actual = train(copy.deepcopy(s6).to(CUDA, dtype), x.to(CUDA, dtype))
    assert error(actual["loss"], expected["loss"]) < 1e-5
    for name, value in actual.items():
        assert value.isfinite().all(), name
        if expected[name].double().norm() > 1e-9:  # the gradient of a bias before BatchNorm is 0 up to rounding
            assert error(value, expected[name]) < tolerance, name


@pytest.fixture
def fused(s6) -> mobilemamba.MobileMamba:
    return copy.deepcopy(s6).float().to(CUDA).fuse()


def draw(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device=CUDA)


def close(actual: Tensor, expected: Tensor) -> bool:
    return error(actual, expected.cpu().double()) < 1e-4  # torch may choose another algorithm for a product


@torch.inference_mode()
def test_model_as_cuda_graphs(fused):
    graphs = mobilemamba.CUDAGraphs(fused)
    images = [draw(), draw(2), draw(), draw(2), draw().to(memory_format=torch.channels_last)]
    results = [graphs(x) for x in images]
    assert len(graphs._graphs) == 3
    for x, logits in zip(images, results, strict=True):
        assert close(logits, fused(x))
    with torch.autocast("cuda", torch.bfloat16):
        assert error(graphs(images[0]), fused(images[0]).cpu().double()) < 2e-2
    other = fused.to(torch.bfloat16)
    assert error(graphs(images[0].bfloat16()), other(images[0].bfloat16()).cpu().double()) < 2e-2
    assert len(graphs._graphs) == 1


@torch.inference_mode()
def test_graphs_see_weights_that_change(fused):
    graphs, x = mobilemamba.CUDAGraphs(fused), draw()
    before = graphs(x).clone()
    for parameter in fused.head.parameters():
        parameter.mul_(0.5)
    assert len(graphs._graphs) == 1
    assert close(graphs(x), before / 2)
    moved = {name: weight * 2 if name.startswith("head") else weight for name, weight in fused.state_dict().items()}
    fused.load_state_dict(moved, assign=True)
    assert close(graphs(x), before)


@torch.inference_mode()
@pytest.mark.parametrize("streams", [1, 4])
def test_graphs_in_threads(fused, streams):
    """Each thread gets the logits of its own images, whether it shares its stream or not; some graphs are replaced."""
    graphs = mobilemamba.CUDAGraphs(fused, limit=6)
    images = [[draw(1 + i % 2) for i in range(8)] for _ in range(4)]
    expected = [[fused(x).cpu() for x in own] for own in images]
    side = [torch.cuda.Stream() for _ in range(streams)]
    torch.cuda.synchronize()

    def work(number: int) -> list[Tensor]:
        with torch.inference_mode(), torch.cuda.stream(side[number % streams]):
            results = [graphs(x) for x in images[number]]
            return [logits.cpu() for logits in results]

    with ThreadPoolExecutor(4) as pool:
        for results, logits in zip(pool.map(work, range(4)), expected, strict=True):
            assert all(close(a, b) for a, b in zip(results, logits, strict=True))


@torch.inference_mode()
def test_graphs_of_maps_and_of_evicted_shapes(fused):
    graphs = mobilemamba.CUDAGraphs(mobilemamba.FeatureExtractor(fused), limit=1)
    for batch in (1, 2, 1):
        x = draw(batch)
        for actual, expected in zip(graphs(x).values(), graphs.model(x).values(), strict=True):
            assert close(actual, expected)
        assert len(graphs._graphs) == 1
    with pytest.raises(ValueError, match="the images are on cpu, expected CUDA"):
        graphs(x.cpu())
