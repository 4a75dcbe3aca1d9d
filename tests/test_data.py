"""Data sets: what is read is what was written, what is broken is refused; augmentation is reproducible."""

import gzip
import struct

import pytest
import torch
from PIL import Image

from mobilemamba import data


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    return header + values.numpy().tobytes()


def write_fashion_mnist(root, sizes=(6, 4)) -> None:
    for part, count in zip(("train", "t10k"), sizes, strict=True):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.arange(count, dtype=torch.uint8)))


@pytest.mark.parametrize("name", ["plain", "zipped.gz"])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 4)])
def test_idx_round_trip(tmp_path, name, shape):
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    raw = idx_bytes(values)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert torch.equal(data.read_idx(tmp_path / name), values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "expected an idx file"),
        ("text", b"hello, world", "expected an idx file"),
        ("floats", b"\0\0\x0d\x01\0\0\0\0", "expected an idx file"),
        ("header", b"\0\0\x08\x02\0\0\0\x01", "expected an idx file"),
        ("short", idx_bytes(torch.zeros(9, dtype=torch.uint8))[:-1], "expected 9 bytes .* got 8"),
        ("long", idx_bytes(torch.zeros(9, dtype=torch.uint8)) + b"x", "expected 9 bytes .* got 10"),
        ("plain.gz", idx_bytes(torch.zeros(9, dtype=torch.uint8)), "expected a complete gzip file"),
        ("cut.gz", gzip.compress(idx_bytes(torch.zeros(9, dtype=torch.uint8)))[:-9], "expected a complete gzip file"),
        ("garbled.gz", gzip.compress(b"")[:10] + b"\xff" * 20, "expected a complete gzip file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip's bytes hold the time
)
def test_broken_idx_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        data.read_idx(tmp_path / name)


def test_fashion_mnist(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    monkeypatch.setenv("MOBILEMAMBA_FASHION_MNIST", str(tmp_path))
    loaded = data.load("fashion-mnist")
    assert loaded.train.images(torch.tensor([5, 0])).shape == (2, 1, 28, 28)
    assert loaded.test.labels.tolist() == [0, 1, 2, 3]
    assert len(loaded.labels) == 10


def test_fashion_mnist_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte"):
        data.load(f"fashion-mnist:{tmp_path}")
    write_fashion_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(torch.zeros(3, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"'t10k' images .* got \(4, 28, 28\) with \(3,\)"):
        data.load(f"fashion-mnist:{tmp_path}")
    labels.write_bytes(idx_bytes(torch.full((4,), 10, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="labels from 0 to 9, got 10"):
        data.load(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "mnist", "folder", "folder:", "digits:here"])
def test_unknown_data(spec):
    with pytest.raises(ValueError, match="expected fashion-mnist"):
        data.load(spec)


def make_folder(root, classes=("ant", "bee")):
    for part in ("train", "val"):
        for shade, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20 + i, 30), (100 * shade, 0, 0)).save(root / part / name / f"{i}.png")


def test_folder(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    loaded = data.load(f"folder:{tmp_path}", image_size=16)
    assert loaded.labels == ("ant", "bee")
    assert loaded.train.labels.tolist() == [0, 0, 1, 1]
    images = loaded.train.images(torch.tensor([0, 3]))
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 16, 16)
    assert images[:, 0].float().mean((1, 2)).tolist() == [0, 100]


def test_folder_and_classify_prepare_alike(tmp_path):
    make_folder(tmp_path)
    loaded = data.load(f"folder:{tmp_path}", image_size=16)
    trained = loaded.preprocessing.normalize(loaded.test.images(torch.tensor([2])))
    classified = loaded.preprocessing.transforms()(tmp_path / "val" / "bee" / "0.png")
    assert torch.equal(trained[0], classified)


def test_folder_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="got no folder"):
        data.load(f"folder:{tmp_path}")
    make_folder(tmp_path)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="got cat"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "val" / "cat").rmdir()
    (tmp_path / "val" / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png"):
        data.load(f"folder:{tmp_path}").test.images(torch.tensor([0]))


def test_digits():
    pytest.importorskip("sklearn")
    loaded = data.load("digits")
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (1437, 360)
    assert loaded.train.images(torch.arange(3)).shape == (3, 1, 8, 8)
    assert set(loaded.test.labels.tolist()) == set(range(10))


def batch() -> torch.Tensor:
    return torch.randint(0, 256, (64, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"flip": False}, {"crop": 0}, {"erase": 1.0}])
def test_augmentation_is_a_function_of_the_generator(options):
    augment = data.Augmentation(**options)
    first, again, other = (augment(batch(), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first.dtype == torch.uint8
    assert first.shape == batch().shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_augmentation_changes_nothing():
    assert torch.equal(data.Augmentation(flip=False, crop=0, erase=0)(batch(), torch.Generator()), batch())


def test_flip_mirrors_some_images():
    images = batch()
    flipped = data.Augmentation(crop=0, erase=0)(images, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(flipped, images, strict=True)]
    assert 16 < sum(mirrored) < 48
    assert all(same or torch.equal(*pair) for same, *pair in zip(mirrored, flipped, images, strict=True))


def test_crop_shifts_each_image():
    images = batch()
    shifted = data.Augmentation(flip=False, crop=1, erase=0)(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    places = [(y, x) for y in range(3) for x in range(3)]
    for new, old in zip(shifted, padded, strict=True):
        assert any(torch.equal(new, old[:, y : y + 12, x : x + 10]) for y, x in places)


def test_erase_replaces_a_rectangle():
    images = torch.zeros(64, 1, 20, 20, dtype=torch.uint8)
    erased = data.Augmentation(flip=False, crop=0, erase=1.0)(images, torch.Generator().manual_seed(0))
    share = (erased != 0).float().mean((1, 2, 3))
    assert 0 < share.min()
    assert share.max() < 0.4
