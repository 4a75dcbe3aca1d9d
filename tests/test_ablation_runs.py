"""The benchmark that trains variants of nano: its runs are resumed, and its table says what the log says."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def ablations(monkeypatch, tmp_path):
    """The benchmark as a module, with 40 random images as Fashion-MNIST, in the folder of the test."""
    for name in ("timm", "torchvision"):
        pytest.importorskip(name, reason="augmentation needs the extra train")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("t10k", 8)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        for kind, values in (("images-idx3", images), ("labels-idx1", torch.arange(count).to(torch.uint8) % 10)):
            head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.numpy().tobytes()))
    monkeypatch.setenv("MOBILEMAMBA_FASHION_MNIST", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    threads = torch.get_num_threads()
    import ablations

    yield ablations
    torch.set_num_threads(threads)


ARGUMENTS = ["--images", "24", "--epochs", "1", "--seeds", "2", "--rounds", "1", "--batch", "2", "--json", "table.json"]


def test_runs_are_finished_once(ablations, monkeypatch, capsys):
    arguments = [*ARGUMENTS, "--variant", "mixer ttt"]
    assert ablations.main(arguments) == 0
    lines = Path("ablations.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["variant"], run["seed"]) for run in runs] == [
        (variant, seed) for seed in (0, 1) for variant in ("nano", "mixer ttt")
    ]
    assert not list(Path("build/ablations").glob("nano-*")), "the state of a finished run is removed"

    # what is missing is trained again, and nothing else; the last line was not whole
    Path("ablations.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    trained = []

    def train(config, out, device, resume, **options):
        trained.append((config.arguments, config.seed, resume))
        out.mkdir(parents=True)
        return 0.5

    monkeypatch.setattr(ablations, "train", train)
    assert ablations.main(arguments) == 0
    assert trained == [({"mixer": "ttt"}, 1, False)]
    assert json.loads(Path("ablations.jsonl").read_text().splitlines()[-1])["accuracy"] == 0.5
    rows = json.loads(Path("table.json").read_text())["results"]
    assert [row["variant"] for row in rows] == ["nano", "mixer ttt"]
    assert rows[1]["accuracies"] == [runs[1]["accuracy"], 0.5]
    assert f"| {rows[1]['parameters'] / 1e6:.3f} |" in capsys.readouterr().out

    # another size is another run
    ablations.main([*arguments, "--images", "30", "--variant", "nano"])
    assert [seed for _, seed, _ in trained[1:]] == [0, 1]


def test_a_stopped_run_goes_on(ablations, tmp_path):
    size, log = ablations.Size(2, 24, 1), ablations.Log(tmp_path / "log.jsonl")
    data = ablations.first_images(24, tmp_path / "first")
    out = tmp_path / "runs/nano-2-24-float32-0"
    ablations.train(ablations.config("nano", 0, ablations.Size(1, 24, 1), data), out, "cpu", threads=1, workers=0)
    (out / "model.pt").unlink()
    ablations.train_all(["nano"], size, log, tmp_path / "runs", "cpu")
    assert [entry["resumed"] for entry in log.entries] == [True]
    assert not out.exists()


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.90, 0.91, 0.92], ("-1.00 ± 0.00", "yes")),
        ([0.93, 0.94, 0.95], ("+2.00 ± 0.00", "no")),
        ([0.90, 0.93, 0.93], ("+0.00 ± 2.48", "not seen")),
        ([0.90], ("-1.00", "one seed")),
    ],
)
def test_the_difference_from_nano(ablations, accuracies, expected):
    found = ablations.difference(accuracies, [0.91, 0.92, 0.93][: len(accuracies)])
    assert found == expected


def test_every_variant_is_a_network_and_a_run(ablations):
    size = ablations.Size(4, 60000, 3)
    for variant in ablations.VARIANTS:
        model, config = ablations.create(variant), ablations.config(variant, 0, size, "fashion-mnist")
        assert config.epochs == 4
        with torch.device("meta"):
            again = type(model)(num_classes=10, in_chans=1, **{**_preset(), **config.backbone_options})
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


def _preset():
    from mobilemamba import PRESETS

    return {name: value for name, value in PRESETS["nano"].items() if name not in ("num_classes", "in_chans")}


def test_refused_numbers(ablations, capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--seeds", "0"])
    assert "--seeds: expected at least 1, got 0" in capsys.readouterr().err
