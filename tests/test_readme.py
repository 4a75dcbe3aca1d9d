"""The README's Python runs as it stands; its C++ is the example that tests/cpp compiles and runs."""

import re
from pathlib import Path

import pytest

from mobilemamba import zoo

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []  # the published weights are the one thing that is not here
    monkeypatch.setattr(zoo.weights, "load_pretrained", lambda model, name, *rest: loaded.append(name))
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert loaded == ["s6"]
    assert tuple(names["logits"].shape) == (1, 1000)
    assert [tuple(m.shape[1:]) for m in names["maps"]] == [(192, 14, 14), (384, 7, 7), (448, 4, 4)]


def test_cpp_block_is_the_example() -> None:
    blocks = re.findall(r"^```cpp\n(.*?)^```", README.read_text(), re.M | re.S)
    assert blocks == [(README.parent / "examples" / "cpp" / "snippet.cpp").read_text()]
