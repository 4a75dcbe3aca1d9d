"""timm has the peers that are its; those that are made here cost what their authors state and compute what they say."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The modules of the folder, whose names are too short to stay."""
    before = set(sys.modules)
    with mock.patch.object(sys, "path", [str(FOLDER), *sys.path]):
        names = ("contestants", "efficientvmamba", "localvim", "mambas", "peers", "runtimes")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@torch.no_grad()
def macs(network: nn.Module, formulas: dict[object, object]) -> float:
    """Of one image of 224 x 224, in millions."""
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        network(torch.randn(1, 3, 224, 224))
    return counter.get_total_flops() / 2e6


#: Millions of parameters as the authors' logs state them, MACs in G of their table and in M by this package's counter.
EFFICIENT = {"t": (6.494, 0.8, 717), "s": (11.274, 1.3, 1223), "b": (33.717, 4.0, 3809)}


@pytest.mark.parametrize("size", EFFICIENT)
def test_efficientvmamba_costs_what_is_published(benchmarks, size: str) -> None:
    """Its authors count nine operations for each state and position as MACs, where the scan's definition has four."""
    parameters, published, counted = EFFICIENT[size]
    network = benchmarks.peers.HERE[f"efficientvmamba_{size}"]().eval()
    assert round(benchmarks.mambas.parameters(network) / 1e6, 3) == parameters
    assert macs(network, benchmarks.mambas.MACS) == pytest.approx(counted, abs=1)

    def theirs(u, delta, A_log, *_, out_shape=None) -> int:
        return 2 * math.prod(u) * (delta[2] + 9 * A_log[2] + 1)

    theirs_of_all = macs(network, {torch.ops.mobilemamba.bidirectional_scan: theirs})
    assert theirs_of_all == pytest.approx(1e3 * published, rel=0.03)


#: Millions of parameters, MACs in G of their table and in M by this package's counter.
LOCAL = {"t": (8, 1.5, 1658), "s": (28, 4.8, 5345)}


@pytest.mark.parametrize("size", LOCAL)
def test_localvim_costs_what_is_published(benchmarks, size: str) -> None:
    """Its authors count the convolution and the projections of one scan of the four, and five for each state."""
    parameters, published, counted = LOCAL[size]
    network = benchmarks.peers.HERE[f"localvim_{size}"]().eval()
    assert benchmarks.mambas.parameters(network) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert macs(network, benchmarks.mambas.MACS) == pytest.approx(counted, abs=1)

    def theirs(u, delta, A_log, *_, out_shape=None) -> int:
        return 2 * math.prod(u) * (delta[2] // 4 + 5 * A_log[2] + 2)

    theirs_of_all = macs(network, {torch.ops.mobilemamba.bidirectional_scan: theirs})
    for _, mixer in network.blocks:
        left_out = sum(tensor.numel() for tensor in (mixer.scans.project[1:], *(c.weight for c in mixer.convs[1:])))
        theirs_of_all -= 196 * left_out / 1e6
    assert theirs_of_all == pytest.approx(1e3 * published, rel=0.03)


def scan(u: Tensor, rows: Tensor, scans: nn.Module, i: int, way: int) -> Tensor:
    """Sequence i of ``(B, L, C)`` one way, a position at a time."""
    A, D, dt_weight, dt_bias = (t[2 * i + way] for t in (scans.A_log, scans.D, scans.dt_weight, scans.dt_bias))
    delta, B, C = rows.split(scans.splits, -1)
    dt = F.softplus(delta @ dt_weight.T + dt_bias)
    h, y = torch.zeros(u.size(0), *A.shape), torch.empty_like(u)
    for t in range(u.size(1))[:: -1 if way else 1]:
        h = (-A.exp() * dt[:, t, :, None]).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + D * u[:, t]
    return y


@pytest.mark.parametrize("way", [0, 1])
@torch.no_grad()
def test_the_idle_way_adds_nothing(benchmarks, way: int) -> None:
    torch.manual_seed(0)
    scans = benchmarks.mambas.Scans(24, 3, [False, bool(way)])
    u = torch.randn(2, 13, 24)
    expected = scan(u, F.linear(u, scans.project[1]), scans, 1, way)
    torch.testing.assert_close(scans([u, u])[1], expected, rtol=1e-4, atol=1e-5)
    assert scans.idle == 2 * 24 * (16 + 1 + 3 + 1)
    in_16_bits = scans.bfloat16()([u.bfloat16(), u.bfloat16()])[1]
    torch.testing.assert_close(in_16_bits.float(), expected, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_four_sequences_of_every_second_pixel(benchmarks) -> None:
    """Two by rows, two by columns; each pixel comes back to its place."""
    block = benchmarks.efficientvmamba.AtrousScan(8)
    places = torch.arange(4 * 6.0).view(1, 4, 6, 1).expand(-1, -1, -1, 16)
    seen = []
    block.scans.forward = lambda sequences: seen.extend(sequences) or sequences
    assert torch.equal(block._scanned(places), places)
    orders = [sequence[0, :, 0].int().tolist() for sequence in seen]
    assert orders == [[0, 2, 4, 12, 14, 16], [6, 18, 8, 20, 10, 22], [1, 3, 5, 13, 15, 17], [7, 19, 9, 21, 11, 23]]


@torch.no_grad()
def test_four_ways_through_a_map(benchmarks) -> None:
    """Against sequences that are reordered, flipped where they run from the end, convolved and scanned."""
    torch.manual_seed(0)
    mixer = benchmarks.localvim.MultiScan(8, "-h v 2 -7")
    x = torch.randn(2, 196, 8)
    u, z = mixer.in_proj(x).chunk(2, -1)
    grid = torch.arange(196).view(14, 14)
    windows = [
        torch.cat([grid[i : i + k, j : j + k].flatten() for i in range(0, 14, k) for j in range(0, 14, k)])
        for k in (2, 7)
    ]
    total = torch.zeros_like(u)
    for i, order in enumerate([grid.flatten().flip(0), grid.T.flatten(), windows[0], windows[1].flip(0)]):
        way = int(mixer.backward[i])
        taps = mixer.convs[i].weight[:, 0, 0].flip(-1) if way else mixer.convs[i].weight[:, 0, 0]
        sequence = F.pad(u[:, order].transpose(1, 2), (3, 0))
        v = F.silu(F.conv1d(sequence, taps[:, None], mixer.convs[i].bias, groups=16)).transpose(1, 2)
        rows = F.linear(v, mixer.scans.project[i])
        y = scan(v.flip(1), rows.flip(1), mixer.scans, i, 1).flip(1) if way else scan(v, rows, mixer.scans, i, 0)
        placed = torch.empty_like(y)
        placed[:, order] = y
        total += mixer.gate(placed * F.silu(z))
    torch.testing.assert_close(mixer(x), mixer.out_proj(total), rtol=1e-4, atol=1e-5)


def test_rotation_of_places(benchmarks) -> None:
    rotation = benchmarks.localvim.Rotation(8)
    ones = torch.view_as_complex(rotation(torch.tensor([1.0, 0] * 4).expand(1, 196, 8)).view(14, 14, 4, 2))
    row, column = 3, 5
    angles = torch.tensor([row, row / 100, column, column / 100])
    torch.testing.assert_close(ones[row, column], torch.polar(torch.ones(4), angles))


def test_peers_that_are_not_in_timm(benchmarks, tmp_path) -> None:
    """They are contestants like the others: folded, channels last, with their authors' accuracy."""
    pytest.importorskip("timm", reason="the extra bench is not installed")
    torch.manual_seed(0)
    setting = benchmarks.contestants.Setting(torch.device("cpu"), 1, torch.float32, 1, tmp_path)
    for name, top1, macs_of_one in (("efficientvmamba_t", 76.5, 717), ("localvim_t", 76.2, 1658)):
        (contestant,) = benchmarks.contestants.peer_contestants(name, "torch", setting)
        assert contestant.call().shape == (1, 1000)
        facts = contestant.facts
        assert (facts["network"], facts["top1"], round(facts["MMACs"])) == (name, top1, macs_of_one)
    network = benchmarks.efficientvmamba.EfficientVMamba(16, (1, 1, 1, 1))
    network = benchmarks.contestants.calibrate(network, torch.randn(2, 3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    expected = benchmarks.contestants.forward(network, images)
    folded = benchmarks.peers.fuse(network).to(memory_format=torch.channels_last)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(benchmarks.contestants.forward(folded, images), expected, rtol=1e-4, atol=1e-4)


def test_their_files_compute_the_same(benchmarks, tmp_path) -> None:
    """The scan is in them as ``mobilemamba.deploy`` translates it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra bench is not installed")
    torch.manual_seed(0)
    network = benchmarks.efficientvmamba.AtrousScan(8).eval()
    images = torch.randn(2, 6, 4, 8)
    benchmarks.runtimes.export(network, images, tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(scores), benchmarks.contestants.forward(network, images), rtol=1e-4, atol=1e-5
    )


def test_sides_that_do_not_divide(benchmarks) -> None:
    network = benchmarks.efficientvmamba.EfficientVMamba(16, (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"expected sides that are multiples of 32, got \(1, 3, 224, 200\)"):
        network(torch.randn(1, 3, 224, 200))
    network = benchmarks.localvim.LocalVim(16, ("h -h v -v",))
    with pytest.raises(ValueError, match=r"expected sides of 224, got \(1, 3, 256, 224\)"):
        network(torch.randn(1, 3, 256, 224))


def test_timm_has_its_peers(benchmarks) -> None:
    timm = pytest.importorskip("timm", reason="the extra bench is not installed")
    peers = benchmarks.peers
    assert {f"{name}.{peers.PEERS[name].weights}" for name in peers.IN_TIMM} <= set(timm.list_pretrained())
    titles = [peer.title for peer in peers.PEERS.values()]
    assert len(set(titles)) == len(titles)


def test_every_rendition_is_a_peer_and_says_its_source(benchmarks) -> None:
    peers = benchmarks.peers
    own = [name for name, peer in peers.PEERS.items() if peer.weights is None]
    assert own == list(peers.HERE)
    assert not set(own) & set(peers.IN_TIMM)
    assert peers.sources(["levit_128s"]).startswith("timm's results")
    assert peers.sources(own[:1]) == "their authors' tables, of weights that are not used here: efficientvmamba_t"
    assert peers.sources([own[0], "levit_128s"]).count(";") == 1
