"""The shipped result: nano's weights are inside the package, and score what the README says."""

import re
from pathlib import Path

import pytest
import torch

import mobilemamba
from mobilemamba import cli, data, weights

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "ankle-boot": "ankle boot",
    "bag": "bag",
    "dress": "dress",
    "sneaker": "sneaker",
    "t-shirt": "T-shirt/top",
    "trouser": "trouser",
}


@pytest.fixture(scope="module")
def nano():
    return mobilemamba.nano(pretrained=True).fuse()


def test_is_small():
    assert sum(parameter.numel() for parameter in mobilemamba.nano().parameters()) < 1_000_000
    assert weights.download(weights.entry("nano")).stat().st_size <= 2 * 2**20


def test_examples_are_named_right(nano):
    entry = weights.entry("nano")
    paths = sorted((ROOT / "examples").glob("*.png"))
    assert [path.stem for path in paths] == sorted(EXAMPLES)
    with torch.inference_mode():
        logits = nano(torch.stack([entry.preprocessing.transforms()(path) for path in paths]))
    assert [entry.labels[i] for i in logits.argmax(1)] == [EXAMPLES[path.stem] for path in paths]


def test_accuracy_is_the_one_stated(capsys):
    root = data.fashion_mnist_dir()
    if not root.is_dir():
        pytest.skip(f"Fashion-MNIST is not installed in {root} (Debian: dataset-fashion-mnist)")
    stated = weights.entry("nano").top1
    assert cli.main(["evaluate", "--model", "nano", "--data", "fashion-mnist", "--batch-size", "128"]) == 0
    printed = capsys.readouterr().out
    accuracy, right = re.search(r"top-1 +(\d+\.\d\d) %  \((\d+) of 10000 images\)", printed).groups()
    assert float(accuracy) == int(right) / 100
    assert f"published  top-1 {stated} %, on the 10,000 test images of Fashion-MNIST" in printed
    # an image on the border between two classes may fall on the other side on another CPU
    assert float(accuracy) == pytest.approx(stated, abs=0.011)


def test_readme_states_the_same():
    stated = re.findall(r"nano\b.*?(\d\d\.\d\d) ?%", (ROOT / "README.md").read_text())
    assert stated, "the README does not state nano's accuracy"
    assert {float(figure) for figure in stated} == {weights.entry("nano").top1}
