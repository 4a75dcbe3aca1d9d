"""Preprocessing: torchvision's figures, every kind of image, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilemamba.data import Preprocessing, open_image

GREY = Preprocessing(resize=28, crop=28, mean=(0.286,), std=(0.353,))


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    """Reproducible random pixels."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (256, 301), (33, 17), (1, 1), (1, 16)])
@pytest.mark.parametrize("crop", [192, 225])
def test_is_resize_and_centre_crop(size: tuple[int, int], crop: int) -> None:
    """As torchvision on PIL images: short side, bicubic with antialiasing, crop with its rounding, mean and std."""
    short = int(crop / 0.875)
    preprocessing, image = Preprocessing(resize=short, crop=crop), noise(*size)
    width, height = (int(short * side / min(size)) for side in size)
    left, top = round((width - crop) / 2.0), round((height - crop) / 2.0)
    expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))
    pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert torch.equal(preprocessing.pixels()(image), pixels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    actual = preprocessing.transforms()(image)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, (pixels / 255 - mean) / std)


def test_grey_without_margin_is_the_image() -> None:
    image = noise(28, 28, channels=1)
    actual = GREY.transforms()(image)
    assert actual.shape == (1, 28, 28)
    torch.testing.assert_close(actual[0], (torch.from_numpy(np.array(image)) / 255 - 0.286) / 0.353)


def test_normalize_takes_batches() -> None:
    """Bit for bit the same as one image at a time, so that ``classify`` computes what the training loop measured."""
    preprocessing, images = Preprocessing(resize=30, crop=30), [noise(30, 30), noise(31, 30)]
    pixels = torch.stack([preprocessing.pixels()(image) for image in images])
    batch = preprocessing.normalize(pixels.contiguous(memory_format=torch.channels_last))
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([preprocessing.transforms()(image) for image in images]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(mode: str, channels: int) -> None:
    image = noise(40, 30)
    image = image.convert("L").convert(mode) if mode.startswith("I") else image.convert(mode)
    preprocessing = GREY if channels == 1 else Preprocessing(resize=28, crop=28)
    pixels = preprocessing.pixels()(image)
    assert pixels.shape == (channels, 28, 28)
    assert pixels.dtype == torch.uint8


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_reduced_not_clipped(tmp_path: Path, name: str) -> None:
    deep = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28) * 83
    Image.fromarray(deep).save(tmp_path / name)
    assert torch.equal(GREY.pixels()(tmp_path / name)[0], torch.from_numpy((deep >> 8).astype(np.uint8)))


def test_transparency_is_dropped() -> None:
    image = noise(28, 28)
    clear = image.copy()
    clear.putalpha(0)
    pixels = Preprocessing(resize=28, crop=28).pixels()
    assert torch.equal(pixels(image), pixels(clear))


def test_a_path_is_turned_upright_and_an_image_is_not(tmp_path: Path) -> None:
    image = noise(40, 28)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise for display
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = Preprocessing(resize=28, crop=28).pixels()
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert open_image(tmp_path / "turned.png").size == (28, 40)
    assert torch.equal(pixels(tmp_path / "turned.png"), pixels(upright))
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(pixels(opened), pixels(image))


def test_a_long_strip_takes_no_more_memory() -> None:
    strip = Image.new("RGB", (3, 1_000_000), (255, 0, 0))
    assert torch.equal(Preprocessing(resize=256, crop=224).pixels()(strip)[0], torch.full((224, 224), 255).byte())


def test_json() -> None:
    for preprocessing in (GREY, Preprocessing(resize=256, crop=224, interpolation="bilinear")):
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    with pytest.raises(ValueError, match=r"preprocessing: expected the fields of Preprocessing, got \{'size': 3\}"):
        Preprocessing.from_dict({"size": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": 20, "crop": 28}, "expected a crop of 1 to resize=20 pixels, got 28"),
        ({"resize": 20, "crop": 0}, "expected a crop of 1 to resize=20 pixels, got 0"),
        ({"mean": (), "std": ()}, "mean and std with a value for each channel"),
        ({"mean": (0.5,)}, "mean and std with a value for each channel"),
        ({"mean": (0, 0, float("nan"))}, "expected a finite mean"),
        ({"std": (1, 0, 1)}, "expected a positive std"),
        ({"std": (1, float("nan"), 1)}, "expected a positive std"),
        ({"crop": 27.5}, "expected resize and crop in whole pixels, got 28 and 27.5"),
        ({"interpolation": "magic"}, "interpolation: expected bicubic or bilinear, got 'magic'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"resize": 28, "crop": 28, **arguments})


def test_bad_images(tmp_path: Path) -> None:
    prepare = GREY.transforms()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    noise(300, 300).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20000])
    Image.new("F", (30, 30)).save(tmp_path / "float.tif")
    for name in ("text.png", "empty.png"):
        with pytest.raises(ValueError, match=rf"{name}: expected an image, got a file of no known image format$"):
            prepare(tmp_path / name)
    for name, message in (("cut.png", "not a readable image"), ("float.tif", "got floating point"), ("", "a folder")):
        with pytest.raises(ValueError, match=f"{name}: .*{message}") as caught:
            prepare(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"absent\.png: no such image file"):
        prepare(tmp_path / "absent.png")
    with pytest.raises(TypeError, match="image: expected a PIL image or a path, got int"):
        prepare(3)
    with pytest.raises(ValueError, match="expected 8 or 16 bits per channel, got values from 0 to 70000"):
        prepare(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))


def test_any_number_of_channels_but_not_from_files() -> None:
    four = Preprocessing(resize=8, crop=8, mean=(0, 0.5, 0, 0), std=(1, 0.5, 1, 1))
    pixels = torch.full((2, 4, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(four.normalize(pixels), torch.ones(2, 4, 8, 8))
    for function in (four.transforms, four.pixels):
        with pytest.raises(ValueError, match=r"image files are read into .* channels; the model takes 4"):
            function()
