"""Data for an evaluation as they lie on disks: class folders, a flat folder with a file of classes, tar files."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mobilemamba import data
from mobilemamba.data import Preprocessing, evaluation_batches, load_split
from mobilemamba.data.datasets import FASHION_MNIST_LABELS
from mobilemamba.data.imagenet import IMAGENET_LABELS, IMAGENET_SYNSETS

PREPROCESSING = Preprocessing(resize=8, crop=8)
#: Synset, class number and name of three classes. The images of class i have the shade i.
CLASSES = (("n01440764", 0, "tench"), ("n02012849", 134, "crane bird"), ("n03126707", 517, "crane"))
#: The flat validation images: number i is of class CLASSES[i % 3].
FLAT = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(6)]


def encoded(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256,) * 3).save(content, "PNG")
    return content.getvalue()


def lay(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def in_folders(prefix: str = "", names: int = 0) -> dict[str, bytes]:
    """Two images of each class in folders called by the synset (0) or by the name (2)."""
    return {f"{prefix}{kind[names]}/{i}.JPEG": encoded(kind[1]) for kind in CLASSES for i in range(2)}


def flat(prefix: str = "") -> dict[str, bytes]:
    return {prefix + name: encoded(CLASSES[i % 3][1]) for i, name in enumerate(FLAT)}


def check(split: data.Split, numbers: dict[int, int] | None = None) -> None:
    """Each image has the class that its shade tells; ``numbers`` are the model's, if they are not ImageNet's."""
    assert len(split.labels) == 6
    for i, label in enumerate(split.labels.tolist()):
        shade = split.image(i).getpixel((0, 0))[0]
        (number,) = (number for _, number, _ in CLASSES if number % 256 == shade)
        assert label == (numbers or {}).get(number, number)


def test_the_list_of_imagenet() -> None:
    assert len(set(IMAGENET_SYNSETS)) == len(set(IMAGENET_LABELS)) == 1000
    assert list(IMAGENET_SYNSETS) == sorted(IMAGENET_SYNSETS)
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in IMAGENET_SYNSETS)
    for synset, number, name in (*CLASSES, ("n15075141", 999, "toilet tissue"), ("n03888257", 701, "parachute")):
        assert (IMAGENET_SYNSETS[number], IMAGENET_LABELS[number]) == (synset, name)


@pytest.mark.parametrize("prefix", ["val/", ""])
@pytest.mark.parametrize("names", [0, 2])
def test_class_folders(prefix, names, tmp_path) -> None:
    lay(tmp_path, {**in_folders(prefix, names), prefix + "read.me": b""})
    split, told = load_split(f"folder:{tmp_path}", "val", IMAGENET_LABELS, PREPROCESSING)
    check(split)
    assert told.endswith("6 images, 3 classes; skipped files: 1 .me")


def test_parts_of_a_folder(tmp_path) -> None:
    lay(tmp_path, {**in_folders("train/"), "test/tench/1.png": encoded(0), "test/loose.png": encoded(0)})
    split, told = load_split(f"folder:{tmp_path}", "test", IMAGENET_LABELS, PREPROCESSING)
    assert split.labels.tolist() == [0]
    assert told.endswith("1 images, 1 classes; skipped files: 1 outside the class folders")
    check(load_split(f"folder:{tmp_path}", "train", IMAGENET_LABELS, PREPROCESSING)[0])
    with pytest.raises(FileNotFoundError, match=r"expected a folder val, got test, train \(--split\)"):
        load_split(f"folder:{tmp_path}", "val", IMAGENET_LABELS, PREPROCESSING)


@pytest.mark.parametrize(
    "labels", [["crane", "other", "crane bird", "tench"], ["n03126707", "x", "n02012849", "tench"]]
)
def test_classes_are_matched_by_name(labels, tmp_path) -> None:
    """The model has other classes too, in another order, and calls them by synset or name."""
    lay(tmp_path, in_folders())
    check(load_split(f"folder:{tmp_path}", "val", labels, PREPROCESSING)[0], {0: 3, 134: 2, 517: 0})


def test_a_model_without_names_of_classes(tmp_path) -> None:
    lay(tmp_path, in_folders())
    check(load_split(f"folder:{tmp_path}", "val", 1000, PREPROCESSING)[0])
    with pytest.raises(ValueError, match=r"does not know the names of its 3 classes; state them \(--labels\)"):
        load_split(f"folder:{tmp_path}", "val", 3, PREPROCESSING)


@pytest.fixture
def fashion(tmp_path) -> str:
    """A small data set in the files of Fashion-MNIST: three images for training and two others, 8x8 pixels."""
    for part, labels in (("train", b"\0\1\2"), ("t10k", b"\5\3")):
        count = bytes([0, 0, 0, len(labels)])
        images = b"\0\0\x08\3" + count + b"\0\0\0\x08" * 2 + bytes(64 * len(labels))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + count + labels)
    return f"fashion-mnist:{tmp_path}"


def test_data_with_labels_of_their_own(fashion) -> None:
    labels = [*reversed(FASHION_MNIST_LABELS), "no dress at all"]
    for part, name, expected in (("val", "test", [4, 6]), ("test", "test", [4, 6]), ("train", "train", [9, 8, 7])):
        split, told = load_split(fashion, part, labels, PREPROCESSING)
        assert split.labels.tolist() == expected
        assert told == f"{fashion} ({name}): {len(expected)} images, 10 classes"


GROUND_TRUTHS: dict[str, Callable[[int], str]] = {
    "numbers": lambda i: f"{FLAT[i]} {CLASSES[i % 3][1]}",
    "synsets, tabs, paths": lambda i: f"images/{FLAT[i]}\t{CLASSES[i % 3][0]}",
    "names, commas, no suffix": lambda i: f"{FLAT[i][:-5]}, {CLASSES[i % 3][2]}",
    "names, spaces": lambda i: f"{FLAT[i]} {CLASSES[i % 3][2]}",
    "kaggle": lambda i: f"{FLAT[i][:-5]},{CLASSES[i % 3][0]} 1 2 3 4 n01443537 5 6 7 8 ",
    "in order": lambda i: CLASSES[i % 3][0],
}


@pytest.mark.parametrize("layout", GROUND_TRUTHS)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_flat_folder_and_a_file_of_classes(layout, kind, tmp_path) -> None:
    lines = [GROUND_TRUTHS[layout](i) for i in range(6)]
    if layout == "kaggle":
        lines.insert(0, "ImageId,PredictionString")
    truth = tmp_path / "truth.txt"
    truth.write_text("\n".join(lines) + "\n")
    if kind == "folder":
        where = lay(tmp_path / "val", flat("images/"))
    else:
        where = pack(tmp_path / "val.tar", flat("images/" if "paths" in layout else ""))
        if "paths" in layout:  # folders that all images share are no part of their names
            truth.write_text(truth.read_text().replace("images/", ""))
    split, _ = load_split(f"{kind}:{where}", "val", IMAGENET_LABELS, PREPROCESSING, ground_truth=truth)
    check(split)


def test_images_without_a_class_are_counted(tmp_path) -> None:
    lay(tmp_path / "val", flat())
    truth = tmp_path / "some.txt"
    truth.write_text(f"{FLAT[1]} 134\nelsewhere.png 3\n")
    split, told = load_split(f"folder:{tmp_path}/val", "val", 1000, PREPROCESSING, ground_truth=truth)
    assert (split.labels.tolist(), told.split("; ")[1]) == ([134], "skipped files: 5 not in some.txt")


def test_the_numbers_of_ilsvrc_need_their_table(tmp_path) -> None:
    """They are in another order than the classes, from 1."""
    lay(tmp_path / "val", flat())
    truth = tmp_path / "kit/ILSVRC2012_validation_ground_truth.txt"
    truth.parent.mkdir()
    truth.write_text("3\n1\n2\n" * 2)
    args = (f"folder:{tmp_path}/val", "val", IMAGENET_LABELS, PREPROCESSING)
    with pytest.raises(ValueError, match=r"their order is not that of the classes, and .*/kit/meta.mat"):
        load_split(*args, ground_truth=truth)
    scipy_io = pytest.importorskip("scipy.io")
    import numpy as np

    rows = [(3, "n01440764", 0), (1, "n02012849", 0), (2, "n03126707", 0), (4, "n00001740", 3)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    scipy_io.savemat(truth.parent / "meta.mat", {"synsets": synsets[:, None]})
    check(load_split(*args, ground_truth=truth)[0])
    truth.write_text("3\n1\n4\n" * 2)
    with pytest.raises(ValueError, match="expected ILSVRC2012's class numbers from 1 to 1000, got 4"):
        load_split(*args, ground_truth=truth)


def tars_of_classes() -> dict[str, bytes]:
    """ImageNet's training images: a tar file for each class, in a tar file."""
    found = {}
    for synset, number, _ in CLASSES:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as archive:
            for i in range(2):
                info = tarfile.TarInfo(f"{synset}_{i}.JPEG")
                info.size = len(encoded(number))
                archive.addfile(info, io.BytesIO(encoded(number)))
        found[f"{synset}.tar"] = inner.getvalue()
    return found


@pytest.mark.parametrize(
    "files",
    [
        in_folders("./val/"),
        {**in_folders("imagenet/val/"), "imagenet/train/tench/1.png": encoded(7), "imagenet/val/n0/.x.png": b""},
        in_folders("anything/"),
        tars_of_classes(),
    ],
    ids=["val", "parts", "one folder above", "tar of tars"],
)
def test_tar_files(files, tmp_path) -> None:
    path = pack(tmp_path / "a.tar", files)
    split, told = load_split(f"tar:{path}", "val", IMAGENET_LABELS, PREPROCESSING)
    check(split)
    assert told == f"{path}: 6 images, 3 classes"
    assert split.fingerprint().keys() == {synset for synset, _, _ in CLASSES}


def test_workers_read_a_tar_file(tmp_path) -> None:
    lay(tmp_path / "folder", in_folders())
    tar, folder = (
        load_split(spec, "val", IMAGENET_LABELS, PREPROCESSING)[0]
        for spec in (f"tar:{pack(tmp_path / 'a.tar', in_folders())}", f"folder:{tmp_path / 'folder'}")
    )
    for read, expected in zip(
        evaluation_batches(tar, PREPROCESSING, batch_size=2, workers=2),
        evaluation_batches(folder, PREPROCESSING, batch_size=2),
        strict=True,
    ):
        assert all(map(torch.equal, read, expected))


def test_a_bad_image_in_a_tar_file(tmp_path, capsys) -> None:
    files = {**in_folders(), "tench/text.png": b"text", "tench/cut.png": encoded(0)[:45]}
    path = pack(tmp_path / "a.tar", files)
    args = (f"tar:{path}", "val", IMAGENET_LABELS, PREPROCESSING)
    with pytest.raises(ValueError, match=r"a\.tar/tench/cut\.png: not a readable image.*--on-bad-image skip"):
        list(evaluation_batches(load_split(*args)[0], PREPROCESSING, batch_size=8))
    split, _ = load_split(*args, on_bad_image="skip")
    assert sum(len(labels) for _, labels in evaluation_batches(split, PREPROCESSING, batch_size=8)) == 6
    assert capsys.readouterr().err.count("skipped: ") == len(split.bad) == 2


def test_bad_files_of_a_folder_are_found_before_the_evaluation(tmp_path) -> None:
    lay(tmp_path, {**in_folders(), "n01440764/cut.png": encoded(0)[:45]})
    with pytest.raises(ValueError, match=r"cut\.png: not a readable image"):
        load_split(f"folder:{tmp_path}", "val", IMAGENET_LABELS, PREPROCESSING)


def refusals() -> dict[str, tuple[str, dict[str, bytes], str, str]]:
    """Spec, files, ground truth and message."""
    one = {"val/tench/1.png": encoded(0)}
    two = {"val/tench/1.png": encoded(0), "val/crane/1.png": encoded(0)}
    return {
        "no folder": ("folder:{}/none", one, "", "none: expected a folder of images, got no folder"),
        "a file": ("folder:{}/val/tench/1.png", one, "", "1.png: expected a folder of images, got a file"),
        "no images": ("folder:{}", {"a/1.txt": b""}, "", "expected images, got none; skipped files: 1 .txt"),
        "flat": ("folder:{}", flat("val/"), "", "expected a folder for each class, got 6 images without; a file can"),
        "others": (
            "folder:{}",
            {"val/tencg/1.png": encoded(0)},
            "",
            "expected the model's 1000 classes, such as tench",
        ),
        "no tar": ("tar:{}/val/tench/1.png", one, "", "expected a complete tar file, not compressed"),
        "none": ("tar:{}/a.tar", one, "", "a.tar: expected a tar file, got no file"),
        "tar folder": ("tar:{}", one, "", "expected a tar file, got a folder"),
        "split": ("", {}, "", "split: expected train, val or test for data 'fashion-mnist:"),
        "truth": ("", {}, "a.png 1", "ground truth: expected folder:DIR or tar:FILE with it, got 'fashion-mnist:"),
        "empty": ("folder:{}", one, "\n", "truth.txt: expected the classes of images, got an empty file"),
        "one word": ("folder:{}", one, "a.png 1\nhalf\n", "truth.txt, line 2: expected FILE CLASS, got 'half'"),
        "twice": ("folder:{}", one, "1.png 1\n1.png 2\n", "truth.txt, line 2: a second class for 1.png"),
        "elsewhere": ("folder:{}", one, "2.png 1\n", "expected the classes of the images, such as tench/1.png; it has"),
        "ambiguous": ("folder:{}", two, "1.png 1\n", "'1.png' may be crane/1.png or tench/1.png; expected paths"),
        "number": ("folder:{}", one, "1.png 1000\n", "expected the model's 1000 classes, such as tench"),
        "lines": ("folder:{}", one, "n01440764\n" * 2, "expected a line for each of the 1 images, got 2 lines"),
        "bytes": ("folder:{}", one, "\udcff", "truth.txt: expected text in UTF-8, got other bytes"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals(case, tmp_path, fashion) -> None:
    spec, files, lines, message = refusals()[case]
    lay(tmp_path / "data", files)
    truth = tmp_path / "truth.txt"
    truth.write_bytes(os.fsencode(lines))
    split = "half" if case == "split" else "val"
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        load_split(
            spec.format(tmp_path / "data") if files else fashion,
            split,
            IMAGENET_LABELS if files else FASHION_MNIST_LABELS,
            PREPROCESSING,
            ground_truth=truth if lines else None,
        )


def test_refusals_of_labels_and_of_tar_files(tmp_path) -> None:
    lay(tmp_path, in_folders())
    with pytest.raises(ValueError, match="labels: expected names that differ, got 'tench' twice"):
        load_split(f"folder:{tmp_path}", "val", ["tench", "n01440764"], PREPROCESSING)
    with pytest.raises(ValueError, match="on_bad_image: expected fail or skip, got 'hide'"):
        load_split(f"folder:{tmp_path}", "val", IMAGENET_LABELS, PREPROCESSING, on_bad_image="hide")
    path = pack(tmp_path / "a.tar", in_folders())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.tar: expected a complete tar file, not compressed .*: unexpected end"):
        load_split(f"tar:{path}", "val", IMAGENET_LABELS, PREPROCESSING)
    pack(path, {**in_folders("a/val/"), **in_folders("b/val/")})
    with pytest.raises(ValueError, match="expected one folder val, got several with images of the same name"):
        load_split(f"tar:{path}", "val", IMAGENET_LABELS, PREPROCESSING)
    pack(path, in_folders("train/"))
    with pytest.raises(FileNotFoundError, match=r"a\.tar: expected a folder val, got train \(--split\)"):
        load_split(f"tar:{path}", "val", IMAGENET_LABELS, PREPROCESSING)
