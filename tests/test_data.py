"""Data sets: what is read is what was written, what is broken is refused; augmentation is reproducible."""

import gzip
import struct

import pytest
import torch
from PIL import Image

from mobilemamba import data
from mobilemamba.data.image_files import has_its_end, image_suffixes


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
    assert loaded.train.batch(torch.tensor([5, 0]))[0].shape == (2, 1, 28, 28)
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
    images, labels = loaded.train.batch(torch.tensor([0, 3]))
    assert labels.tolist() == [0, 1]
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 16, 16)
    assert images[:, 0].float().mean((1, 2)).tolist() == [0, 100]


def test_what_counts_as_an_image_of_a_folder(tmp_path):
    make_folder(tmp_path)
    train = tmp_path / "train"
    image = Image.new("L", (4, 4))
    for name in (".ipynb_checkpoints/0.png", "ant/._0.png", "ant/.trash/0.png", "ant/deep/er/0.PGM", "ant/2.jfif"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(train / name, format="JPEG" if name.endswith("jfif") else None)
    for name in ("ant/notes.txt", "ant/deep/more.TXT", "bee/archive.h5", "bee/README", "readme.md"):
        (train / name).touch()
    (train / "bee" / "linked").symlink_to(train / "ant" / "deep")
    (train / "bee" / "up").symlink_to(train)  # a folder that contains the link
    (train / "bee" / "self").symlink_to("self")  # a link that leads nowhere
    loaded = data.load(f"folder:{tmp_path}", 16)
    assert loaded.labels == ("ant", "bee")
    assert loaded.train.names == [
        *("ant/0.png", "ant/1.png", "ant/2.jfif", "ant/deep/er/0.PGM"),
        *("bee/0.png", "bee/1.png", "bee/linked/er/0.PGM"),
    ]
    assert loaded.train.labels.tolist() == [0] * 4 + [1] * 3
    assert loaded.describe() == (
        "7 training images, 4 test images, 2 classes (smallest: bee, 3 training images); "
        "skipped files: 1 .h5, 3 .txt, 1 outside the class folders, 2 without suffix"
    )


def test_suffixes_are_those_that_pillow_decodes():
    assert {".jpg", ".pgm", ".jfif", ".webp", ".mpo"} <= image_suffixes()
    assert not {".pdf", ".h5", ".mpg", ".txt", ""} & image_suffixes()


def damage(path, cut: bool) -> None:
    """Cut the file in the middle, or change bytes there and leave both ends."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] if cut else content[: middle - 20] + bytes(40) + content[middle + 20 :])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_cut_files_are_found_before_training(tmp_path, suffix):
    make_folder(tmp_path)
    noise = Image.effect_noise((60, 60), 80)
    for name in ("train/ant/a", "train/bee/b", "val/ant/c"):
        noise.save(tmp_path / f"{name}.{suffix}")
    data.load(f"folder:{tmp_path}")
    assert has_its_end(str(tmp_path / f"val/ant/c.{suffix}")) == (suffix != "bmp")
    for name in ("train/ant/a", "train/bee/b", "val/ant/c"):
        damage(tmp_path / f"{name}.{suffix}", cut=True)
    with pytest.raises(
        ValueError, match=rf"ant/a\.{suffix}: not a readable.*; 1 more: .*bee/b\.{suffix}: mend or remove"
    ):
        data.load(f"folder:{tmp_path}")
    for part in ("ant/a", "bee/b"):
        (tmp_path / f"train/{part}.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"val/ant/c\.{suffix}: not a readable"):
        data.load(f"folder:{tmp_path}")


def test_bad_images_stop_or_are_skipped(tmp_path, capsys):
    make_folder(tmp_path)
    for part in ("train", "val"):
        Image.effect_noise((60, 60), 80).save(tmp_path / part / "ant" / "2.png")
        damage(tmp_path / part / "ant" / "2.png", cut=False)
    loaded = data.load(f"folder:{tmp_path}", 16)
    for split in (loaded.train, loaded.test):
        with pytest.raises(
            ValueError, match=r"ant/2\.png: not a readable image: .*: mend the file, or skip it with --on-"
        ):
            split.batch(torch.arange(5), replace=True)

    loaded = data.load(f"folder:{tmp_path}", 16, "skip")
    assert loaded.bad_images() == 0
    for _ in range(2):  # the second time the file is known
        images, labels = loaded.train.batch(torch.tensor([1, 2, 2]), replace=True)  # the next image is bee/0.png
        assert labels.tolist() == [0, 1, 1]
        assert torch.equal(images[1], loaded.train.batch(torch.tensor([3]))[0][0])
        images, labels = loaded.test.batch(torch.arange(5))
        assert (len(images), labels.tolist()) == (4, [0, 0, 1, 1])
    assert loaded.test.batch(torch.tensor([2]))[0].shape == (0, 3, 16, 16)
    assert loaded.bad_images() == 2
    lines = capsys.readouterr().err.splitlines()
    assert [
        line.startswith(f"skipped: {tmp_path}/{part}/ant/2.png: not")
        for line, part in zip(lines, ("train", "val"), strict=True)
    ]

    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="expected images, got none that can be read"):
        data.load(f"folder:{tmp_path}", 16, "skip").train.batch(torch.tensor([0]), replace=True)


def test_home_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "D")
    write_fashion_mnist(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("folder:~/D").train.labels) == 4
    assert len(data.load("fashion-mnist:~").train.labels) == 6
    monkeypatch.setenv("MOBILEMAMBA_FASHION_MNIST", "~")
    assert data.fashion_mnist_dir() == tmp_path


def test_fingerprint_follows_the_names_and_not_the_place(tmp_path):
    for place in ("here", "there"):
        make_folder(tmp_path / place)
    here, there = (data.load(f"folder:{tmp_path / place}") for place in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    (tmp_path / "there/val/bee/1.png").rename(tmp_path / "there/val/bee/2.png")
    changed = data.load(f"folder:{tmp_path}/there").fingerprint()
    assert [group for group in changed if changed[group] != here.fingerprint()[group]] == ["test/bee"]


def test_folder_and_classify_prepare_alike(tmp_path):
    make_folder(tmp_path)
    loaded = data.load(f"folder:{tmp_path}", image_size=16)
    trained = loaded.preprocessing.normalize(loaded.test.batch(torch.tensor([2]))[0])
    classified = loaded.preprocessing.transforms()(tmp_path / "val" / "bee" / "0.png")
    assert torch.equal(trained[0], classified)


def test_folder_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with train/CLASS and val/CLASS, got no folder$"):
        data.load(f"folder:{tmp_path}/none")
    for name in ("ant", "bee", ".git"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"train: expected a folder of class folders, got none; .* has ant, bee$"
    ):
        data.load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=rf"unknown data '{tmp_path}'; did you mean folder:{tmp_path}\?"):
        data.load(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="got no folder"):
        data.load(f"folder:{tmp_path}")
    make_folder(tmp_path)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="got cat"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "val" / "cat").rmdir()
    for name in ("cat", "dog"):
        (tmp_path / "train" / name / ".cache").mkdir(parents=True)
        (tmp_path / "train" / name / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"train: expected images in each class folder, got none in cat, dog$"):
        data.load(f"folder:{tmp_path}")


def test_digits():
    pytest.importorskip("sklearn")
    loaded = data.load("digits")
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (1437, 360)
    assert loaded.train.batch(torch.arange(3))[0].shape == (3, 1, 8, 8)
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
