"""Models in folders and on the Hugging Face Hub: one folder for this package, for timm and for transformers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import serve
from torch import nn

import mobilemamba
from mobilemamba import weights
from mobilemamba.data import Preprocessing
from mobilemamba.weights.timm_config import from_config, to_config

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from mobilemamba import hub

LABELS = ["cat", "dog", "bird"]
PREPROCESSING = Preprocessing(resize=33, crop=29, mean=(0.5,), std=(0.25,), interpolation="bilinear")


def lively(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def made(**options: Any) -> hub.HubMobileMamba:
    torch.manual_seed(0)
    options = {"num_classes": 3, **options}
    model = lively(mobilemamba.nano(**options))
    pre = PREPROCESSING if model.in_chans == 1 else None
    return hub.MobileMamba.from_checkpoint(weights.Checkpoint(model.state_dict(), "nano", options, LABELS, pre)).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"distillation": True}, {"in_chans": 5, "widths": (16, 32, 48), "local_kernels": ((3, 5), (3,), (3,))}],
)
@torch.no_grad()
def test_a_folder_gives_the_model_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = made(**options)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    found = hub.MobileMamba.from_pretrained(tmp_path).eval()
    x = torch.randn(2, model.in_chans, 28, 28)
    assert torch.equal(found(x), model(x))
    assert (found.preset, found.labels, found.preprocessing) == ("nano", LABELS, model.preprocessing)
    again = tmp_path / "again"
    found.save_pretrained(again)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    assert isinstance(found, mobilemamba.MobileMamba)
    fused = found.fuse()
    torch.testing.assert_close(torch.jit.script(fused)(x), fused(x))


def test_the_card_has_labels_and_preprocessing(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    made().save_pretrained(tmp_path, model_card_kwargs={"repository": "me/pets", "datasets": ["me/photos"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mobilemamba"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == ["me/photos"]
    for part in ("cat, dog, bird", "crop: `29`", "interpolation: `bilinear`", 'from_pretrained("me/pets")'):
        assert part in card.content
    model = hub.MobileMamba.from_checkpoint(
        weights.Checkpoint(mobilemamba.nano().state_dict(), "nano", {}, [str(i) for i in range(100)])
    )
    assert "19 and 80 more, in `config.json`" in model.generate_model_card().content


@torch.no_grad()
def test_options_replace_the_stored_ones(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    three = hub.MobileMamba.from_pretrained(tmp_path, in_chans=3).eval()
    grey = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(three(grey.expand(-1, 3, -1, -1)), model(grey), rtol=1e-4, atol=1e-5)
    assert three.preprocessing is not None
    assert three.preprocessing.channels == 3
    with pytest.raises(ValueError, match="expected a head of 7 classes, got a head of 3 classes"):
        hub.MobileMamba.from_pretrained(tmp_path, num_classes=7)
    seven = hub.MobileMamba.from_pretrained(tmp_path, num_classes=7, allow_head_mismatch=True).eval()
    assert seven(grey).shape == (2, 7)
    assert seven.labels is None
    assert torch.equal(seven.forward_features(grey), model.forward_features(grey))
    seven.save_pretrained(tmp_path / "seven")
    assert hub.MobileMamba.from_pretrained(tmp_path / "seven").num_classes == 7


def test_a_new_head_goes_along(tmp_path: Path) -> None:
    model = made()
    model.reset_classifier(5, distillation=True)
    model.save_pretrained(tmp_path)
    found = hub.MobileMamba.from_pretrained(tmp_path)
    assert (found.num_classes, found.distillation, found.labels) == (5, True, None)


@pytest.mark.parametrize("entry", weights.ENTRIES, ids=lambda entry: f"{entry.preset}-{entry.variant}")
def test_config_keeps_the_facts(entry: weights.WeightsEntry) -> None:
    args = {"num_classes": len(entry.labels), "distillation": entry.variant == "distilled"}
    stored = weights.Checkpoint({}, entry.preset, args, list(entry.labels), entry.preprocessing)
    found = from_config(json.loads(json.dumps(to_config(stored))))
    assert found == (entry.preset, args, list(entry.labels), entry.preprocessing)


def test_every_size_survives_timms_share() -> None:
    for resize in range(1, 400):
        for crop in {1, resize // 3 + 1, resize}:
            pre = Preprocessing(resize=resize, crop=crop)
            config = json.loads(json.dumps(to_config(weights.Checkpoint({}, "s6", {}, None, pre))))
            assert from_config(config)[3] == pre


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet18"}, "architecture: expected one that starts with 'mobilemamba_', got 'resnet18'"),
        ({"architecture": "mobilemamba_x9"}, "unknown model 'x9'"),
        ({"model_args": {"widht": 3}}, "model_args: expected arguments of MobileMamba, got 'widht'"),
        ({"model_args": {"global_pool": "max"}}, "global_pool: expected 'avg', got 'max'"),
        ({"model_args": [1]}, "model_args: expected a dict"),
        ({"label_names": [1, 2, 3]}, "label_names: expected a list of names"),
        ({"label_names": ["cat"]}, "label_names: expected 3 names, as num_classes says, got 1"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "pretrained_cfg: expected input_size, crop_pct, mean, std and interp"),
        ({"model_args": {"in_chans": 0}}, "in_chans: expected"),
    ],
)
def test_damaged_configs_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        hub.MobileMamba.from_pretrained(tmp_path)


def test_a_refused_model_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="expected a model that is not fused"):
        made().fuse().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_saved_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model that is not fused"):
        made().fuse().save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    with pytest.raises(ValueError, match=r"preset: expected a model of from_checkpoint\(\)"):
        hub.MobileMamba(**mobilemamba.PRESETS["nano"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"expected a config\.json"):
        hub.MobileMamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON: .*line 1 column 2"):
        hub.MobileMamba.from_pretrained(tmp_path)
    made().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model_args: expected arguments of MobileMamba, got 'widht'"):
        hub.MobileMamba.from_pretrained(tmp_path, widht=3)
    weights_file = tmp_path / "model.safetensors"
    for content, message in ((weights_file.read_bytes()[:5000], "complete safetensors file"), (b"", "an empty file")):
        weights_file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
            hub.MobileMamba.from_pretrained(tmp_path)
    weights_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        hub.MobileMamba.from_pretrained(tmp_path)


def test_a_config_without_classes_has_those_of_the_preset(tmp_path: Path) -> None:
    model = hub.MobileMamba.from_checkpoint(weights.entry("nano"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["num_classes"]
    path.write_text(json.dumps(config))
    again = hub.MobileMamba.from_pretrained(tmp_path)
    assert (again.num_classes, again.labels) == (10, model.labels)


@pytest.mark.parametrize("options", [{}, {"distillation": True}, {"in_chans": 3}])
@torch.no_grad()
def test_timm_and_transformers_read_the_folder(options: dict[str, Any], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    importlib.import_module("mobilemamba.timm")
    model = made(**options)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, model.in_chans, 28, 28)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(found(x), model(x))
    timm.models._hub.save_for_hf(found, tmp_path / "theirs", safe_serialization=True)
    back = hub.MobileMamba.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(back(x), model(x))
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForImageClassification

        wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(wrapped(x).logits, model(x))
        assert wrapped.config.id2label == dict(enumerate(LABELS))


#: Pushes a model and loads it again, in a process of its own: huggingface_hub reads HF_ENDPOINT at its import.
PUSH_AND_LOAD = """
import sys, torch, mobilemamba
from mobilemamba import weights, hub

model = hub.MobileMamba.from_checkpoint(weights.entry("nano")).eval()
print(model.push_to_hub("me/clothes", model_card_kwargs={"repository": "me/clothes"}))
x = torch.randn(2, 1, 28, 28)
found = hub.MobileMamba.from_pretrained("me/clothes").eval()
assert torch.equal(found(x), model(x)) and found.labels == list(weights.entry("nano").labels)
if sys.argv[1] == "timm":
    import timm, mobilemamba.timm
    assert torch.equal(timm.create_model("hf-hub:me/clothes", pretrained=True).eval()(x), model(x))
    theirs = timm.create_model("mobilemamba_nano", num_classes=2)
    timm.models.push_to_hf_hub(theirs, "me/theirs", safe_serialization=True)
    assert hub.MobileMamba.from_pretrained("me/theirs").num_classes == 2
try:
    hub.MobileMamba.from_pretrained("me/nothing")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_hub(tmp_path: Path) -> None:
    with serve() as server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_test"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        kind = "timm" if importlib.util.find_spec("timm") else "no timm"
        command = [sys.executable, "-c", PUSH_AND_LOAD, kind]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + "\n".join(server.calls)
    assert f"{server.url}/me/clothes/commit/" in done.stdout
    assert "me/nothing: expected a config.json" in done.stdout
    assert set(server.repositories["me/clothes"]) == {"README.md", "config.json", "model.safetensors"}
    assert b"ankle boot" in server.repositories["me/clothes"]["README.md"]
