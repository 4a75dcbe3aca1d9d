"""Writes the files that the C++ tests read: exported models, and Python's logits and preprocessed images."""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sklearn.datasets
import torch
from PIL import Image
from torch import nn

import mobilemamba
from mobilemamba import weights
from mobilemamba.data import Preprocessing
from mobilemamba.deploy import export

SIZES = {
    "nano": [(1, 28, 28), (5, 28, 28), (3, 37, 19), (2, 1, 1), (1, 64, 224)],
    "s6": [(1, 224, 224), (3, 224, 224), (2, 160, 192), (2, 65, 97), (1, 30, 33)],
}


def make_model(name: str, **kwargs: object) -> mobilemamba.MobileMamba:
    """Nano with its weights; other models with random weights and BatchNorm statistics as after training."""
    if name == "nano" and not kwargs:
        return mobilemamba.nano(pretrained=True).eval()
    torch.manual_seed(0)
    model = mobilemamba.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def write_model(folder: Path, name: str, dtype: str, format: str) -> None:
    model, entry = make_model(name), weights.entry(name)
    path = folder / f"{name}-{dtype}.{'pt2' if format == 'aoti' else 'pt'}"
    export(model, path, format, preprocessing=entry.preprocessing, labels=entry.labels, dtype=dtype)


def write_cases(folder: Path, name: str, dtype: str) -> None:
    model = make_model(name).fuse().to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(b, model.in_chans, h, w, generator=generator) for b, h, w in SIZES[name]]
    with torch.inference_mode():
        torch.save([(x, model(x.to(getattr(torch, dtype)))) for x in images], folder / f"{name}-{dtype}.cases")


def write_images(folder: Path) -> list[Path]:
    """Photographs as they are, and in every format that the decoders must know."""
    photos = [Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg" for name in ("china", "flower")]
    photo = Image.open(photos[0])
    small = photo.resize((200, 133))
    forms = {
        "grey.jpg": (photo.convert("L"), {}),
        "progressive.jpg": (photo, {"progressive": True, "quality": 60}),
        "subsampled.jpg": (photo.crop((0, 0, 333, 301)), {"subsampling": "4:2:0"}),
        "strip.png": (photo.resize((640, 12)), {}),
        "tiny.png": (photo.resize((3, 2)), {}),
        "palette.png": (small.quantize(50), {}),
        "bits.png": (small.convert("1"), {}),
        "alpha.png": (Image.merge("RGBA", (*small.split(), small.split()[0])), {}),
        "grey-alpha.png": (small.convert("LA"), {}),
        "deep.png": (Image.fromarray((torch.rand(50, 70) * 65535).to(torch.uint16).numpy()), {}),
    }
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = value
        forms[f"turned{value}.{'jpg' if value % 2 else 'png'}"] = (small, {"exif": exif})
    paths = []
    for name, (image, options) in forms.items():
        image.save(folder / name, **options)
        paths.append(folder / name)
    return photos + paths


def write_pixels(path: Path, images: list[Path], preprocessing: Preprocessing) -> None:
    pixels, transforms = preprocessing.pixels(), preprocessing.transforms()
    torch.save([(str(image), pixels(image), transforms(image)) for image in images], path)


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    models = [(name, dtype) for name in SIZES for dtype in ("float32", "bfloat16")]
    with ProcessPoolExecutor(2) as pool:  # AOTInductor mostly waits for its compiler
        jobs = [
            pool.submit(write_model, folder, *model, format) for model in models for format in ("aoti", "torchscript")
        ]
        jobs += [pool.submit(write_cases, folder, *model) for model in models]
        for job in jobs:
            job.result()

    nano, entry = make_model("nano"), weights.entry("nano")
    export(nano, folder / "nano-trainable.pt", "torchscript", preprocessing=entry.preprocessing, fuse=False)
    bilinear = Preprocessing(resize=61, crop=50, interpolation="bilinear")
    export(make_model("nano", in_chans=3), folder / "bilinear.pt", "torchscript", preprocessing=bilinear)
    images = write_images(folder)
    write_pixels(folder / "nano-float32.images", images, entry.preprocessing)
    write_pixels(folder / "s6-float32.images", images, weights.entry("s6").preprocessing)
    write_pixels(folder / "bilinear.images", images, bilinear)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
