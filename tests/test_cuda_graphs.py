"""``CUDAGraphs`` without a GPU: what is captured when, on a stand-in whose graphs record operators and run them again;
and fused models that move to CUDA.

tests/test_cuda_models.py has the real ones.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import CUDAGraphs
from mobilemamba.models.folded import Folded

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "rehearsal"
if not TOOLS.is_dir():
    pytest.skip("not in a checkout: no tools/", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a machine without a GPU is pretended to have one", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import pretended_cuda  # noqa: E402

PASSES = 4  # of the model for a capture: three that warm up, and the captured one


@pytest.fixture
def gpu() -> Iterator[None]:
    with pretended_cuda.pretended("cpu"):
        yield


class Network(nn.Module):
    """Counts its passes, and keeps the streams that they were in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("shift", torch.zeros(2))
        self.streams: list[int] = []
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        assert not torch.is_autocast_cache_enabled()  # casts of a capture are not there for others
        self.streams.append(torch.cuda.current_stream().cuda_stream)
        y = self.layer(x) + self.shift
        return {"y": y, "more": [y.relu() + 1]}

    @property
    def captures(self) -> float:
        return len(self.streams) / PASSES


def expected(network: Network, x: Tensor) -> Tensor:
    return network.layer(x) + network.shift


def check(graphs: CUDAGraphs, x: Tensor) -> None:
    result = graphs(x)
    y = expected(graphs.model, x)
    torch.testing.assert_close(result["y"], y)
    torch.testing.assert_close(result["more"][0], y.relu() + 1)


@torch.inference_mode()
def test_replays_compute_the_model(gpu: None) -> None:
    model = mobilemamba.nano().eval().fuse()
    graphs = CUDAGraphs(model)
    images = [torch.randn(2, 1, 28, 28) for _ in range(3)]
    results = [graphs(x) for x in images]  # all are kept: no call may write into the result of another
    for x, logits in zip(images, results, strict=True):
        assert torch.equal(logits, model(x))
    maps = CUDAGraphs(mobilemamba.FeatureExtractor(mobilemamba.nano()).eval())(images[0])
    assert [m.shape[1] for m in maps.values()] == [48, 96, 128]
    assert graphs(images[0][:0]).shape == (0, 10)


def test_a_capture_for_each_occasion(gpu: None) -> None:
    network = Network()
    graphs = CUDAGraphs(network)
    x = torch.randn(4, 3)
    occasions: list[Callable[[], Tensor]] = [
        lambda: x,
        lambda: torch.randn(5, 3),
        lambda: torch.randn(3, 4).t(),  # other strides
    ]
    for count, occasion in enumerate(occasions, start=1):
        for _ in range(2):
            check(graphs, occasion())
            assert network.captures == count
    with torch.cuda.stream(torch.cuda.Stream()):
        check(graphs, x)
    assert network.captures == 4
    with torch.autocast("cuda", torch.bfloat16):
        graphs(x)
    assert network.captures == 5
    network.double()
    graphs(x.double())
    assert network.captures == 6
    default = torch.cuda.current_stream().cuda_stream
    assert default not in network.streams
    graphs.clear()
    check(graphs, x := x.double())
    assert network.captures == 7
    graphs.clear()
    with torch.inference_mode():
        result = graphs(x)
    check(graphs, x)  # the graph's input is no tensor of inference mode
    assert result["y"].is_inference()


def test_the_graph_that_is_unused_longest_goes(gpu: None) -> None:
    network = Network()
    graphs = CUDAGraphs(network, limit=2)
    one, two, three = (torch.randn(size, 3) for size in (1, 2, 3))
    for x, captures in ((one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4), (three, 5), (two, 5)):
        check(graphs, x)
        assert network.captures == captures
        assert len(graphs._graphs) <= 2


@pytest.mark.parametrize("streams", [1, 4])
def test_threads(gpu: None, streams: int) -> None:
    """Each thread gets the results of its own images, whether it shares its stream or not."""
    network = Network()
    graphs = CUDAGraphs(network)
    wrong: list[str] = []
    own = [torch.cuda.Stream() for _ in range(streams)]

    def work(number: int) -> None:
        with pretended_cuda.OnCUDA("cpu"), torch.cuda.stream(own[number % streams]):
            kept = []
            for i in range(30):
                x = torch.full((2 + i % 2, 3), float(100 * number + i))
                kept.append((x, graphs(x)))
            wrong.extend(f"{number}" for x, result in kept if not torch.equal(result["y"], expected(network, x)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert network.captures == 2 * streams


def test_weights_that_change(gpu: None) -> None:
    network = Network()
    graphs = CUDAGraphs(network)
    x = torch.randn(2, 3)
    check(graphs, x)
    network.load_state_dict(Network().state_dict())  # in place: replays read the new values
    network.shift.fill_(3)
    check(graphs, x)
    assert network.captures == 1
    changes: list[Callable[[], object]] = [
        lambda: network.load_state_dict(Network().state_dict(), assign=True),
        lambda: setattr(network.layer, "weight", nn.Parameter(torch.randn(2, 3), False)),
        lambda: setattr(network, "layer", nn.Linear(3, 2).requires_grad_(False)),
        lambda: setattr(network.layer.weight, "data", torch.randn(2, 3)),
        lambda: network.register_buffer("other", torch.zeros(1)),
        lambda: network.double().float(),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        check(graphs, x)
        assert network.captures == count
        assert len(graphs._graphs) == 1


def test_refusals(gpu: None) -> None:
    network = Network()
    with pytest.raises(ValueError, match="limit is 0, expected at least 1"):
        CUDAGraphs(network, limit=0)
    graphs = CUDAGraphs(network)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"call it within torch.inference_mode\(\) or torch.no_grad\(\)"):
        graphs(x.clone().requires_grad_())
    network.layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="a replay has no gradients"):
        graphs(x)
    with torch.no_grad():
        check(graphs, x)
    network.layer.bias.requires_grad_(False)
    network.train()
    with pytest.raises(ValueError, match="the model is in training mode, expected evaluation"):
        graphs(x)
    network.eval()
    handle = network.layer.register_forward_hook(lambda *_: None)
    for _ in range(2):
        with pytest.raises(ValueError, match="layer has hooks, which a replay would not run"):
            graphs(x)
    handle.remove()
    check(graphs, x)
    graphs._parts.device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match="the model is on cuda:1, expected cuda:0 as the images"):
        graphs(x)


def test_refuses_the_cpu() -> None:
    graphs = CUDAGraphs(mobilemamba.nano().eval().fuse())
    with pytest.raises(ValueError, match="the images are on cpu, expected CUDA; there, call the model itself"):
        graphs(torch.randn(1, 1, 28, 28))


def test_a_fused_model_that_moves_is_packed_for_its_products() -> None:
    """On CUDA the products in float32 are torch's: a packed weight would be unpacked in every call."""
    model = mobilemamba.nano().eval().fuse()
    layers = [m for m in model.modules() if isinstance(m, Folded) and m.matrices]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    x = torch.randn(2, 1, 28, 28)
    logits, short = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert all(layer.packed for layer in layers)
    with pretended_cuda.pretended("cpu"):
        model.to("cuda")
        assert not any(layer.packed for layer in layers)
        torch.testing.assert_close(model(x), logits)
        assert torch.equal(copy.deepcopy(model).bfloat16()(x.bfloat16()), short)  # packed again
        assert not mobilemamba.nano().eval().fuse().stages[0].blocks[0].ffn0.packed
    model.to("cpu")
    assert all(layer.packed for layer in layers)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(x), logits)
