"""Checkpoints: every format that is read, what is written, and what is refused with which message."""

import copy
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from figures import small_cases
from torch import Tensor

from mobilemamba import MobileMamba, create_model, weights, zoo
from mobilemamba.data import Preprocessing
from mobilemamba.weights import Checkpoint, files, published

PREPROCESSING = Preprocessing(resize=28, crop=28, mean=(0.286,), std=(0.353,))


@pytest.fixture(scope="module")
def nano() -> MobileMamba:
    return create_model("nano")


@pytest.fixture(scope="module")
def t2() -> dict[str, Tensor]:
    """A published state dict."""
    return small_cases()[0].state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def full(model: MobileMamba) -> Checkpoint:
    """A checkpoint with everything known."""
    labels = [f"class {i}" for i in range(model.num_classes)]
    return Checkpoint(model.state_dict(), "nano", {"num_classes": model.num_classes}, labels, PREPROCESSING)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])
def test_round_trip(tmp_path: Path, nano: MobileMamba, name: str) -> None:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    stored = full(nano)
    weights.save(tmp_path / name, stored)
    back = weights.read(tmp_path / name)
    assert back.meta() == stored.meta()
    assert back.preprocessing == PREPROCESSING
    assert same(back.state_dict, stored.state_dict)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plain_state_dict(tmp_path: Path) -> None:
    model = create_model("nano", num_classes=7, in_chans=3, distillation=True)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    back = weights.read(tmp_path / "plain.pt")
    assert (back.preset, back.labels, back.preprocessing) == ("nano", None, None)
    assert back.model_args == {"num_classes": 7, "in_chans": 3, "distillation": True}
    torch.save(create_model("nano", num_classes=1000).state_dict(), tmp_path / "plain.pt")
    assert weights.read(tmp_path / "plain.pt").labels is None
    torch.save(create_model("nano", num_classes=0).state_dict(), tmp_path / "plain.pt")
    assert weights.read(tmp_path / "plain.pt").model_args["num_classes"] == 0


def test_training_checkpoint(tmp_path: Path, nano: MobileMamba) -> None:
    averaged = {key: tensor + 1 for key, tensor in nano.state_dict().items()}
    state = {"format": "mobilemamba-training", "version": 1, "meta": full(nano).meta(), "model": nano.state_dict()}
    for ema, expected in ((averaged, averaged), (None, nano.state_dict())):
        torch.save({**state, "ema": ema, "optimizer": {}}, tmp_path / "last.pt")
        back = weights.read(tmp_path / "last.pt")
        assert back.meta() == full(nano).meta()
        assert same(back.state_dict, expected)


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [("", "plain"), ("module.", "net"), ("module.", "net_E"), ("", "net_E is None"), ("module.", "safetensors")],
)
def test_published(tmp_path: Path, t2: dict[str, Tensor], prefix: str, wrap: str) -> None:
    tensors = {f"{prefix}{key}": tensor for key, tensor in t2.items()}
    wrong = {key: tensor + 1 for key, tensor in tensors.items()}
    path = tmp_path / "published"
    if wrap == "safetensors":
        pytest.importorskip("safetensors.torch").save_file({k: v.clone() for k, v in tensors.items()}, path)
    else:
        content = {"net": {"net": tensors}, "net_E": {"net": wrong, "net_E": tensors}}.get(wrap, {"net": tensors})
        content = {"net": tensors, "net_E": None} if wrap == "net_E is None" else content
        torch.save(tensors if wrap == "plain" else {**content, "epoch": 300}, path)
    back = weights.read(path)
    assert back.preset == "t2"
    assert back.model_args == {"num_classes": 1000, "in_chans": 3, "distillation": False}
    head, transition = back.state_dict["head.norm.weight"], back.state_dict["stages.2.transition.4.project.conv.weight"]
    assert torch.equal(head, t2["head.bn.weight"])
    assert torch.equal(transition, t2["blocks3.2.1.m.pw2.c.weight"])
    assert back.labels == list(weights.entry("t2").labels)
    if wrap == "plain":
        weights.load_into(create_model("t2"), back.state_dict)


def test_every_published_name_is_renamed_to_one_of_ours(t2: dict[str, Tensor]) -> None:
    constants = [key for key in t2 if key.endswith("wt_filter")]
    renamed = {published.rename(key, distilled=False) for key in t2 if key not in constants}
    assert len(constants) == 10
    assert renamed == set(create_model("t2").state_dict())
    assert published.rename("head_dist.l.bias", distilled=True) == "head.teacher.linear.bias"
    assert published.rename("head.l.bias", distilled=True) == "head.labels.linear.bias"


def test_haar_filters_are_checked(tmp_path: Path, t2: dict[str, Tensor]) -> None:
    key = next(key for key in t2 if key.endswith("iwt_filter"))
    for changed, message in ((t2[key] * 1.01, r"\+-0\.5, got values that differ by 0\.005"), (t2[key][:5], "of shape")):
        torch.save({**t2, key: changed}, tmp_path / "net.pth")
        with pytest.raises(ValueError, match=f"net.pth: {key}: expected .*{message}"):
            weights.read(tmp_path / "net.pth")


def test_read_whatever_the_default_device(tmp_path: Path, t2: dict[str, Tensor]) -> None:
    """Also where it was set before the import."""
    torch.save(t2, tmp_path / "net.pth")
    program = "import sys, torch; torch.set_default_device('meta'); from mobilemamba import weights; "
    program += "print(weights.read(sys.argv[1]).preset)"
    command = [sys.executable, "-c", program, str(tmp_path / "net.pth")]
    read = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (read.stdout, read.returncode) == ("t2\n", 0), read.stderr


def test_mismatches_are_listed_and_nothing_is_loaded(nano: MobileMamba) -> None:
    given = {key: torch.zeros_like(tensor) for key, tensor in nano.state_dict().items()}
    shifted = given.pop("patch_embed.0.norm.weight")
    given["patch_embed.0.norm.wait"] = shifted
    given["head.norm.bias"] = torch.zeros(5)
    given["head.norm.num_batches_tracked"] = torch.tensor(0.0)
    before = {key: tensor.clone() for key, tensor in nano.state_dict().items()}
    with pytest.raises(ValueError, match=r"^file: the weights do not fit the model; 1 missing: ") as caught:
        weights.load_into(nano, given, source="file")
    assert str(caught.value).endswith(
        "1 missing: patch_embed.0.norm.weight; 1 unexpected: patch_embed.0.norm.wait; 2 mis-shaped: "
        "head.norm.bias [5] instead of [128], head.norm.num_batches_tracked [] instead of [] of integers"
    )
    assert same(before, nano.state_dict())


def test_other_preset(nano: MobileMamba, t2: dict[str, Tensor]) -> None:
    given = published.convert(t2)
    with pytest.raises(ValueError, match=r"^file: expected weights of nano, got weights of t2$"):
        weights.load_into(nano, given, source="file")
    with pytest.raises(ValueError, match=r"expected weights of nano, got weights of no known preset; .* more; 1 unex"):
        weights.load_into(nano, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="the weights do not fit the model; 1 mis-shaped: "):
        weights.load_into(nano, {**nano.state_dict(), "head.linear.bias": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 4}, "expected a head of 4 classes, got a head of 10 classes"),
        ({"distillation": True}, "expected two heads of 10 classes, got a head of 10 classes"),
    ],
)
def test_other_head(nano: MobileMamba, arguments: dict, message: str) -> None:
    model = create_model("nano", **arguments)
    head = {key: tensor.clone() for key, tensor in model.head.state_dict().items()}
    with pytest.raises(ValueError, match=message + r" \(allow_head_mismatch=True keeps the model's\)"):
        weights.load_into(model, nano.state_dict())
    weights.load_into(model, nano.state_dict(), allow_head_mismatch=True)
    assert same(head, model.head.state_dict())
    assert same(model.stages.state_dict(), nano.stages.state_dict())


def test_head_that_fits_is_loaded_even_if_it_need_not(nano: MobileMamba) -> None:
    model = create_model("nano")
    weights.load_into(model, nano.state_dict(), allow_head_mismatch=True)
    assert same(model.state_dict(), nano.state_dict())


def test_model_without_head_takes_the_rest(nano: MobileMamba) -> None:
    model = create_model("nano", num_classes=0)
    weights.load_into(model, nano.state_dict())
    assert same(model.stages.state_dict(), nano.stages.state_dict())


def test_other_precision(nano: MobileMamba) -> None:
    half = {key: t.half() if t.is_floating_point() else t for key, t in nano.state_dict().items()}
    model = create_model("nano")
    weights.load_into(model, half)
    assert model.head.linear.weight.dtype == torch.float32


def test_weights_for_a_model_on_meta(nano: MobileMamba) -> None:
    """The parameters get memory and values. A model that would keep parts without values is refused."""
    with torch.device("meta"):
        made = create_model("nano", pretrained=True)
        opened, _ = zoo.open_model(weights.entry("nano"))
        without_head = create_model("nano", pretrained=True, num_classes=0)
        half = create_model("nano").half()
        with pytest.raises(
            ValueError, match=r"the model's head is on meta, without values: head\.norm\.weight, .* make"
        ):
            create_model("nano", pretrained=True, num_classes=3, allow_head_mismatch=True)
    expected = create_model("nano", pretrained=True)
    assert same(made.state_dict(), expected.state_dict())
    assert same(opened.state_dict(), expected.state_dict())
    assert same(without_head.stages.state_dict(), expected.stages.state_dict())
    empty = half.state_dict()
    half.patch_embed.to_empty(device="cpu")  # a part of the model is on meta, the rest is not
    half.stages[0].requires_grad_(False)
    weights.load_into(half, nano.state_dict())
    assert same(half.state_dict(), copy.deepcopy(nano).half().state_dict())
    assert not any(parameter.requires_grad for parameter in half.stages[0].parameters())
    assert all(parameter.requires_grad for parameter in half.stages[1].parameters())
    half.head.linear.weight.data.zero_()
    assert nano.head.linear.weight.any()  # no memory is shared
    with pytest.raises(ValueError, match="expected weights with values, got tensors on meta: patch_embed"):
        weights.load_into(nano, empty)


class Payload:
    """What loading with plain pickle would run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("payload-was-run",)


def test_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano: MobileMamba) -> None:
    monkeypatch.chdir(tmp_path)
    for content, name in ((Payload(), "posix.mkdir"), (nano, "mobilemamba.models.backbone.MobileMamba")):
        torch.save({"net": content}, "bad.pth")
        with pytest.raises(
            ValueError, match=rf"bad\.pth: expected only tensors and plain containers, .* runs code \({name}\): save"
        ) as caught:
            weights.read("bad.pth")
        assert "\n" not in str(caught.value)
    assert not Path("payload-was-run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a checkpoint, got an empty file"),
        (b"\n<!DOCTYPE html><html>" + b" " * 100, "expected a checkpoint, got an HTML or XML page"),
        (b"GIF89a" + b"\x01" * 100, "expected a checkpoint (torch or safetensors), got something else"),
        (b"PK\x03\x04" + b"\x00" * 100, "expected a complete torch file"),
        (b"\x10\0\0\0\0\0\0\0{" + b" " * 9, "expected a complete safetensors file"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="file: ") as caught:
        weights.read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict or a training checkpoint, got a list"),
        ({"a": 1, "b": 2}, "expected a state dict of tensors, also inside other dicts, got a, b"),
        ({}, "got nothing"),
        ({"net": None}, "got net"),
        ({"net_E": {"a": 1}}, "got net_E"),
        (
            {"format": "mobilemamba", "version": 9, "meta": {}, "state_dict": {"a": torch.zeros(1)}},
            "expected at most version 1 of the format, got 9",
        ),
        ({"format": "mobilemamba", "meta": {}, "state_dict": {"a": torch.zeros(1)}}, "expected version 1 .* got None"),
        (
            {"format": "mobilemamba", "version": 1, "meta": {"labels": 3}, "state_dict": {"a": torch.zeros(1)}},
            "labels: expected a list, got 3",
        ),
        ({"format": "mobilemamba-training", "version": 1, "meta": {}, "ema": None, "model": 4}, "got int"),
    ],
)
def test_other_torch_files(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=rf"file\.pt: .*{message}"):
        weights.read(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"model_args": {"pretrained": "/etc/passwd"}}, "expected arguments of MobileMamba, got 'pretrained'"),
        ({"model_args": {"name": "t2"}}, "expected arguments of MobileMamba, got 'name'"),
        ({"model_args": {"allow_head_mismatch": True}}, "expected arguments of MobileMamba, got 'allow_head_mismatch'"),
        ({"model_args": {"self": 1}}, "expected arguments of MobileMamba, got 'self'"),
        ({"model_args": {"num_classes": "7"}}, "expected num_classes of type int, got '7'"),
        ({"model_args": {"num_classes": True}}, "expected num_classes of type int, got True"),
        ({"model_args": {"ssm_ratio": None}}, "expected ssm_ratio of type float, got None"),
        ({"model_args": {"depths": [1, 2.5]}}, r"expected depths of type tuple\[int, ...\], got \[1, 2.5\]"),
        ({"model_args": {"local_kernels": [3, 3, 3]}}, "expected local_kernels of type tuple"),
        ({"labels": ["a", 3]}, r"labels: expected a list of names, got \['a', 3\]"),
        ([1], r"meta: expected a dict, got \[1\]"),
    ],
)
def test_stated_facts_are_checked(tmp_path: Path, nano: MobileMamba, meta: object, message: str) -> None:
    content = {"format": "mobilemamba", "version": 1, "meta": meta, "state_dict": nano.state_dict()}
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=rf"file\.pt: .*{message}"):
        weights.read(tmp_path / "file.pt")


def test_stated_architecture_is_used(tmp_path: Path) -> None:
    args = {"num_classes": 3, "depths": (1, 1, 1), "local_kernels": ((5, 3), (3,), (3,)), "drop_path_rate": 0}
    source = Checkpoint(create_model("nano", **args).state_dict(), "nano", args)
    for name in ("custom.pt", "custom.safetensors"):
        if name.endswith(".safetensors"):
            pytest.importorskip("safetensors")
        weights.save(tmp_path / name, source)
        model, _ = zoo.open_model(tmp_path / name)
        assert same(model.state_dict(), source.state_dict)


def test_scalars_in_place_of_weights(tmp_path: Path, nano: MobileMamba) -> None:
    for key in ("head.linear.weight", "patch_embed.0.conv.weight", "stages.0.blocks.0.mixer.proj.conv.weight"):
        torch.save({**nano.state_dict(), key: torch.tensor(1.0)}, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=rf"file\.pt: the weights do not fit the model.*; .*{key} \[\] instead"):
            zoo.open_model(tmp_path / "file.pt", "nano")


@pytest.mark.filterwarnings("error::UserWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    for folder in ("code/__torch__.py", "constants.pkl"):
        with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
            archive.writestr("program/data.pkl", b"")
            archive.writestr(f"program/{folder}", b"")
        with pytest.raises(ValueError, match=r"program\.pt: expected a checkpoint, got a TorchScript program; save"):
            weights.read(tmp_path / "program.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match="got a TorchScript program"):
        weights.read(tmp_path / "program.pt")


def test_safetensors_that_begins_like_a_page(tmp_path: Path) -> None:
    """Its header is 0x13c20 bytes long, and so the file begins with `` <``."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = create_model("nano").state_dict()
    path = tmp_path / "file"
    save_file(tensors, path, {"": ""})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, {"": "x" * (0x1_3C20 - header)})
    assert path.read_bytes().startswith(b" <")
    assert same(weights.read(path).state_dict, tensors)


def test_one_network_of_several_presets(tmp_path: Path) -> None:
    source, target = tmp_path / "b.pt", tmp_path / "out.pt"
    network = create_model("b4", num_classes=2).state_dict()
    torch.save(network, source)
    assert weights.read(source).preset is None
    with pytest.raises(ValueError, match=r"b\.pt: the weights fit b1 or b2 or b4, which are one network; expected"):
        zoo.convert(source, target)
    assert not target.exists()
    zoo.convert(source, target, preset="b4")
    back = weights.read(target)
    assert (back.preset, back.preprocessing.crop) == ("b4", 512)
    for preset, expected, crop in ((None, "b4", 512), ("b4", "b4", 512), ("b1", "b1", 256)):
        stored = zoo.open_model(target, preset)[1]
        assert (stored.preset, stored.preprocessing.crop) == (expected, crop)
    own = Preprocessing(resize=64, crop=64)  # of an own training
    weights.save(source, Checkpoint(network, "b1", {"num_classes": 2}, None, own))
    assert zoo.open_model(source)[1].preprocessing == zoo.open_model(source, "b1")[1].preprocessing == own


def test_preprocessing_has_the_channels_of_the_weights(tmp_path: Path) -> None:
    """The preset's mean and std are not given to weights for other images, and no file contradicts itself."""
    colour = create_model("nano", in_chans=3).state_dict()
    torch.save(colour, tmp_path / "colour.pt")
    model, stored = zoo.open_model(tmp_path / "colour.pt")
    assert (model.in_chans, stored.preprocessing) == (3, None)
    with pytest.raises(ValueError, match=r"expected mean and std with 3 values, .* got 1"):
        weights.save(tmp_path / "own.pt", Checkpoint(colour, "nano", {"in_chans": 3}, None, PREPROCESSING))
    own = Preprocessing(resize=28, crop=28)
    weights.save(tmp_path / "own.pt", Checkpoint(colour, "nano", {"in_chans": 3}, None, own))
    assert zoo.open_model(tmp_path / "own.pt")[1].preprocessing == own


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such checkpoint file"):
        weights.read(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected a checkpoint file, got a folder"):
        weights.read(tmp_path)


def test_cut_files(tmp_path: Path, nano: MobileMamba) -> None:
    for name in ("whole.pt", "whole.safetensors"):
        if name.endswith(".safetensors"):
            pytest.importorskip("safetensors")
        weights.save(tmp_path / name, full(nano))
        whole = (tmp_path / name).read_bytes()
        for length in (20, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"cut: expected a complete (torch|safetensors) file"):
                weights.read(tmp_path / "cut")


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, nano: MobileMamba) -> None:
    path = tmp_path / "weights.pt"
    weights.save(path, full(nano))
    old = path.read_bytes()

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(path, write)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    blocks = [bytes([i]) * 100_000 for i in range(8)]
    threads = [
        threading.Thread(target=files.atomic_write, args=(path, lambda temporary, b=b: temporary.write_bytes(b)))
        for b in blocks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in blocks
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_is_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    files.atomic_write(tmp_path / "link", lambda temporary: temporary.write_bytes(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    (tmp_path / "other").touch()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_bad_targets(tmp_path: Path, nano: MobileMamba) -> None:
    with pytest.raises(ValueError, match=r"weights\.bin: expected a name that ends with \.safetensors, \.pt or \.pth"):
        weights.save(tmp_path / "weights.bin", full(nano))
    with pytest.raises(FileNotFoundError, match=r"absent: no such folder to write weights\.pt into"):
        weights.save(tmp_path / "absent" / "weights.pt", full(nano))


def test_safetensors_is_optional(tmp_path: Path, nano: MobileMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ValueError, match="need the package safetensors: pip install safetensors"):
        weights.save(tmp_path / "weights.safetensors", full(nano))
    (tmp_path / "weights").write_bytes(b"\x10\0\0\0\0\0\0\0{" + b" " * 20)
    with pytest.raises(ValueError, match="weights: safetensors files need the package safetensors: pip install"):
        weights.read(tmp_path / "weights")


def test_convert(tmp_path: Path, t2: dict[str, Tensor]) -> None:
    pytest.importorskip("safetensors")
    source, target = tmp_path / "net.pth", tmp_path / "t2.safetensors"
    torch.save({"net": t2, "net_E": None}, source)
    summary = zoo.convert(source, target)
    assert json.loads(json.dumps(summary)) == {
        "preset": "t2",
        "model_args": {"num_classes": 1000, "in_chans": 3, "distillation": False},
        "parameters": sum(p.numel() for p in create_model("t2").parameters()),
        "tensors": len(create_model("t2").state_dict()),
        "sha256": files.sha256(target),
    }
    back = weights.read(target)
    assert (back.preset, back.preprocessing) == ("t2", Preprocessing(resize=219, crop=192))
    assert back.labels[999] == "toilet tissue"
    weights.load_into(create_model("t2"), back.state_dict)
    again = zoo.convert(target, tmp_path / "again.safetensors")
    assert again["sha256"] == summary["sha256"]


def test_convert_refuses(tmp_path: Path, t2: dict[str, Tensor]) -> None:
    source, target = tmp_path / "net.pth", tmp_path / "out.pt"
    torch.save(t2, source)
    with pytest.raises(ValueError, match=r"net\.pth: expected another file than the input"):
        zoo.convert(source, source)
    with pytest.raises(ValueError, match=r"net\.pth: expected weights of s6, got weights of t2$"):
        zoo.convert(source, target, preset="s6")
    with pytest.raises(ValueError, match="unknown model 't3'; did you mean"):
        zoo.convert(source, target, preset="t3")
    torch.save({key: tensor for key, tensor in t2.items() if "blocks3.4.mixer.m.attn.proj" not in key}, source)
    with pytest.raises(ValueError, match=r"6 missing: stages\.2\.blocks\.1\.mixer\.proj\.conv\.weight, "):
        zoo.convert(source, target)
    torch.save({"weight": torch.zeros(3)}, source)
    with pytest.raises(ValueError, match=r"net\.pth: the weights fit no known preset; expected the"):
        zoo.convert(source, target)
    assert not target.exists()
