"""Data sets: what is read is what was written, what is broken is refused; augmentation is reproducible."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mobilemamba import data
from mobilemamba.data.image_files import has_its_end, image_suffixes
from mobilemamba.data.preprocessing import to_tensor
from mobilemamba.data.splits import InMemory


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
    for i, image in enumerate(data.read_idx(tmp_path / "train-images-idx3-ubyte.gz")):
        assert torch.equal(loaded.preprocessing.pixels()(loaded.train.image(i)), image[None])
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
    image = loaded.train.image(3)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (21, 30), (100, 0, 0))
    ((images, labels),) = data.evaluation_batches(loaded.train, loaded.preprocessing, batch_size=9)
    assert labels.tolist() == [0, 0, 1, 1]
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 16, 16)
    assert images[:, 0].float().mean((1, 2)).tolist() == [0, 0, 100, 100]


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
    ((tested, _),) = data.evaluation_batches(loaded.test, loaded.preprocessing, batch_size=9)
    classified = loaded.preprocessing.transforms()(tmp_path / "val" / "bee" / "0.png")
    assert torch.equal(loaded.preprocessing.normalize(tested)[2], classified)


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
    assert (loaded.train.image(3).mode, loaded.train.image(3).size) == ("L", (8, 8))
    assert set(loaded.test.labels.tolist()) == set(range(10))


def test_images_in_memory_have_one_or_three_channels():
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    image = InMemory(pixels, torch.zeros(2)).image(1)
    assert (image.mode, image.size) == ("RGB", (4, 5))
    assert torch.equal(to_tensor(image), pixels[1])
    with pytest.raises(ValueError, match=r"image 1: expected 1 \(grey\) or 3 \(RGB\) channels, got 2"):
        InMemory(pixels[:, :2], torch.zeros(2)).image(1)


def test_every_kind_of_image_reaches_the_training(tmp_path, recwarn):
    """Each file shows the same picture, as far as its kind can; all are seen as a viewer shows them."""
    make_folder(tmp_path)
    train = tmp_path / "train" / "bee"
    for path in train.iterdir():
        path.unlink()
    (train / "deep" / "er").mkdir(parents=True)
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    picture = Image.fromarray(colours.view(2, 2, 3).numpy()).resize((24, 24), Image.Resampling.NEAREST)
    grey, expected = picture.convert("L"), {}

    def save(name: str, image: Image.Image, shown: Image.Image, **options) -> None:
        image.save(train / name, **options)
        expected[name] = to_tensor(shown.convert("RGB"))

    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    save("exif.png", turned, picture, exif=orientation)
    save("exif.tif", turned, picture, exif=orientation)
    save("exif-garbage.png", picture, picture, exif=b"Exif\0\0garbage")
    save("capital.PNG", picture, picture)
    save("deep/er/nested.WebP", picture, picture, lossless=True)
    save("grey.png", grey, grey)
    save("grey-alpha.png", grey.convert("LA"), grey)
    save("black-white.png", grey.convert("1", dither=0), grey.convert("1", dither=0))
    deep = np.asarray(grey, dtype=np.uint16) * 256 + 37
    save("deep.png", Image.fromarray(deep), grey)
    save("deep.tiff", Image.fromarray(deep), grey)
    save("deep.pgm", Image.fromarray(deep), grey)
    save("cmyk.tif", picture.convert("CMYK"), picture)
    save("palette.gif", picture.quantize(4), picture)
    palette = picture.quantize(4)
    save("palette-clear.png", palette, picture, transparency=bytes([0, 128, 255, 255]))
    save("clear.png", Image.merge("RGBA", (*picture.split(), Image.new("L", (24, 24), 0))), picture)
    save("bitmap.bmp", picture, picture)
    target = tmp_path / "elsewhere.png"
    picture.save(target)
    (train / "linked.png").symlink_to(target)
    expected["linked.png"] = to_tensor(picture)
    picture.save(train / ".hidden.png")

    loaded = data.load(f"folder:{tmp_path}", 24)
    names = [name.removeprefix("bee/") for name in loaded.train.names[2:]]
    assert set(names) == expected.keys()
    part = data.folder.ImageFiles(str(train), names, torch.arange(len(names)), data.Preprocessing(resize=24, crop=24))
    transform = data.Augmentation().image_transform(part.preprocessing)
    batches = data.training_batches(part, transform, batch_size=len(names), seed=0, epoch=0, workers=1)
    ((images, labels),) = batches
    assert sorted(labels.tolist()) == list(range(len(names)))
    for image, label in zip(images, labels.tolist(), strict=True):
        assert torch.equal(image, expected[names[label]]), names[label]
    assert torch.equal(to_tensor(part.image(names.index("palette-clear.png"))), expected["palette.gif"])
    assert not [warning for warning in recwarn if "Palette" in str(warning.message)]
