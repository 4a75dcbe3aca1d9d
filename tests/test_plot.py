"""Curves of runs: what the logs say, and the pictures of them."""

import json
from pathlib import Path

import pytest

from mobilemamba import cli
from mobilemamba.training.curves import read_curves

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "benchmarks/results/nano.jsonl"


def write_log(folder: Path, entries: list[object], rest: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + rest)
    return folder


def epoch(number: int, **other: object) -> dict[str, object]:
    return {"epoch": number, "loss": 2 / number, "ema_accuracy": 1 - 1 / number, **other}


def test_the_log_of_a_finished_run() -> None:
    curves = read_curves(NANO)
    assert list(curves.loss) == list(curves.accuracy) == list(range(1, 19))
    assert (curves.loss[1], curves.accuracy[18]) == (1.17614, 0.9316)
    assert (curves.name, curves.state) == ("nano", "93.18 %")


def test_the_log_of_a_run_in_progress(tmp_path) -> None:
    """It was resumed, the epoch that was interrupted has two lines, and the last line is not whole yet."""
    start = {"config": {"epochs": 4}, "epoch": 0}
    entries = [start, epoch(1), epoch(2, loss=9.0), {**start, "epoch": 1}, epoch(2)]
    curves = read_curves(write_log(tmp_path / "mine", entries, '{"epoch": 3, "lo'))
    assert curves.loss == {1: 2.0, 2: 1.0}
    assert (curves.name, curves.state) == ("mine", "epoch 2 of 4")
    going_on = read_curves(write_log(tmp_path / "mine", [start, epoch(1), {"test_accuracy": 0.5}, start]))
    assert going_on.state == "epoch 1 of 4"


def test_pictures(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[train]'")
    from PIL import Image

    runs = [write_log(tmp_path / name, [epoch(n) for n in range(1, 4)]) for name in ("a/same", "b/same", "own")]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *map(str, runs), str(NANO), "--out", "four.png"]) == 0
    told = "four.png: same (epoch 3), same (epoch 3), own (epoch 3), nano (93.18 %)\n"
    assert capsys.readouterr().out == told
    with Image.open("four.png") as image:
        assert image.size[0] == 1500
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)} <= colours

    assert cli.main(["plot", *map(str, runs[:2]), "--out", "two.SVG"]) == 0
    text = (tmp_path / "two.SVG").read_text()
    for label in ("training loss", "test accuracy", "epoch", "a/same/log.jsonl  (epoch 3)", "b/same/log.jsonl"):
        assert label in text


@pytest.mark.parametrize(
    ("lines", "out", "message"),
    [
        (None, "a.png", "run: expected the folder of a run or its log, got a folder without log.jsonl"),
        ("[1]\n", "a.png", "log.jsonl, line 1: expected a JSON object, got b'[1]'"),
        ('{"epoch": 1, "loss": 2}\nhalf\n{"epoch": 2}\n', "a.png", "log.jsonl, line 2: expected a JSON object"),
        ('{"epoch": 1, "loss": "big"}\n', "a.png", "log.jsonl, line 1: expected numbers, got b'"),
        ('{"config": {"epochs": 3}, "epoch": 0}\n', "a.png", "log.jsonl: expected a finished epoch, got none so far"),
        ('{"epoch": 1, "loss": 2}\n', "a.pdf", "a.pdf: expected a name that ends with .png or .svg"),
        ('{"epoch": 1, "loss": 2}\n', "none/a.png", "none: no such folder to write a.png into"),
    ],
)
def test_refusals_are_one_line(lines, out, message, tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    if lines is not None:
        (tmp_path / "run/log.jsonl").write_text(lines)
    assert cli.main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mobilemamba plot: error: ")
    assert message in told
    assert told.count("\n") == 1
