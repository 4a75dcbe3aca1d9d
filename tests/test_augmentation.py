"""Augmentation: the published steps, in their order, and what works for which images."""

import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from mobilemamba.data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Preprocessing, seed_generators

RGB = Preprocessing(resize=36, crop=32)
PUBLISHED = Augmentation(
    flip=True,
    erase=0.25,
    crop_scale=0.08,
    interpolation="random",
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
)


@pytest.fixture
def libraries():
    """timm and torchvision: the extra ``train``."""
    try:
        import timm.data  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs pip install '.[train]': {error}")


def grey(size: int) -> Preprocessing:
    return Preprocessing(resize=size, crop=size, mean=(0.3,), std=(0.35,))


def photo(width: int = 50, height: int = 40, channels: int = 3) -> Image.Image:
    """Reproducible smooth noise."""
    shape = (height // 4 + 1, width // 4 + 1, channels) if channels > 1 else (height // 4 + 1, width // 4 + 1)
    small = Image.fromarray(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def drawn(transform, image: Image.Image, count: int = 30) -> list[torch.Tensor]:
    results = []
    for i in range(count):
        seed_generators("test", i)
        results.append(transform(image))
    return results


def test_no_augmentation_is_the_evaluation_and_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert torch.equal(Augmentation().image_transform(RGB)(photo()), RGB.pixels()(photo()))
    images, labels, logits = torch.rand(3, 3, 8, 8), torch.tensor([0, 4, 2]), torch.randn(3, 5)
    same, targets = Augmentation(label_smoothing=0.1).batch_transform(5)(images, labels)
    assert same is images
    assert targets.dtype == torch.float32
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)
    for options in ({"flip": True}, {"shift": 1}, {"crop_scale": 0.5}, {"rand_augment": "rand"}, {"color_jitter": 0.1}):
        with pytest.raises(ImportError, match=r"^augmentation needs timm and torchvision: pip install 'mobilemamba\["):
            Augmentation(**options).image_transform(RGB)
    for options in ({"erase": 0.1}, {"mixup": 0.1}, {"cutmix": 0.1}):
        with pytest.raises(ImportError, match=r"^augmentation needs timm and torchvision: pip install 'mobilemamba\["):
            Augmentation(**options).batch_transform(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"erase": 1.5}, "erase must be from 0 to 1, got 1.5"),
        ({"crop_scale": -0.1}, "crop_scale must be from 0 to 1, got -0.1"),
        ({"shift": -1}, "shift must not be negative, got -1"),
        ({"mixup": float("nan")}, "mixup must not be negative, got nan"),
        ({"interpolation": "nearest"}, "interpolation must be bicubic, bilinear, random, got 'nearest'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize("notation", ["m9", "rand-x3", "rand-m", "rand-m9.5", "rand-mstdx", "rand-tnone", "rand-"])
def test_bad_rand_augment(notation):
    with pytest.raises(ValueError, match=rf"^rand_augment must be like 'rand-m9-mstd0.5-inc1', got '{notation}'$"):
        Augmentation(rand_augment=notation)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("notation", ["rand", "rand-m5-n1-p0.8-mmax20-inc1", "rand-m9-tweights", "rand-m9-t3a"])
def test_rand_augment(notation):
    results = drawn(Augmentation(rand_augment=notation).image_transform(RGB), photo(), 10)
    assert len({result.sum().item() for result in results}) > 1


@pytest.mark.usefixtures("libraries")
def test_the_published_steps_are_those_of_timm(monkeypatch):
    """From the same state of the generators, the pixels and the erased rectangles are timm's, up to rounding."""
    from timm.data import create_transform

    of_pillow = ImageOps.posterize
    before_pillow_13 = lambda image, bits: of_pillow(image, bits) if bits else image.point(lambda _: 0)  # noqa: E731
    monkeypatch.setattr(ImageOps, "posterize", before_pillow_13)  # timm calls it
    published = create_transform(
        32,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    transform = pickle.loads(pickle.dumps(PUBLISHED.image_transform(RGB)))  # as workers get it
    assert drawn(transform, photo())[0].dtype == torch.uint8
    erase = Augmentation(erase=0.25).batch_transform(2)

    def ours(image: Image.Image) -> torch.Tensor:
        images, _ = erase(RGB.normalize(transform(image))[None], torch.tensor([0]))
        return images[0]

    results = drawn(ours, photo(), 60), drawn(published, photo(), 60)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert len({result.sum().item() for result in results[0]}) > 55


@pytest.mark.usefixtures("libraries")
def test_posterize_to_nothing_is_black():
    """At magnitude 10, which the published noise reaches, timm keeps 0 bits; Pillow 13 raises an error for that."""
    results = drawn(Augmentation(rand_augment="rand-m10-n1-p1-inc1").image_transform(RGB), photo())
    assert 0 < sum(not result.any() for result in results) < 15


@pytest.mark.usefixtures("libraries")
def test_color_jitter_gives_way_to_rand_augment():
    from torchvision.transforms import ColorJitter

    jitter, tensor = ColorJitter(0.4, 0.4, 0.4), Preprocessing(resize=32, crop=32).pixels()
    for both, one in (
        (Augmentation(color_jitter=0.4).image_transform(RGB), lambda image: tensor(jitter(RGB.fit(image)))),
        (
            Augmentation(color_jitter=0.4, rand_augment="rand-m9").image_transform(RGB),
            Augmentation(rand_augment="rand-m9").image_transform(RGB),
        ),
    ):
        assert all(torch.equal(*pair) for pair in zip(drawn(both, photo()), drawn(one, photo()), strict=True))


@pytest.mark.usefixtures("libraries")
def test_flip_mirrors_some_images():
    original = RGB.pixels()(photo())
    results = drawn(Augmentation(flip=True).image_transform(RGB), photo())
    mirrored = sum(torch.equal(result, original.flip(2)) for result in results)
    assert 5 < mirrored < 25
    assert mirrored + sum(torch.equal(result, original) for result in results) == 30


@pytest.mark.usefixtures("libraries")
def test_shift_moves_over_black():
    padded = F.pad(RGB.pixels()(photo()), (1, 1, 1, 1))
    places = [padded[:, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    results = drawn(Augmentation(shift=1).image_transform(RGB), photo())
    found = [[torch.equal(result, place) for place in places].index(True) for result in results]
    assert len(set(found)) > 4


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize(
    "options",
    [{"flip": True, "shift": 2}, {"crop_scale": 0.5}, {"rand_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}],
    ids=lambda options: next(iter(options)),
)
def test_grey_images(size, options):
    image = photo(size, size, channels=1)
    transform = Augmentation(**options).image_transform(grey(size))
    results = drawn(transform, image)
    assert all(result.shape == (1, size, size) and result.dtype == torch.uint8 for result in results)
    assert len({result.sum().item() for result in results}) > (1 if "flip" in options else 8)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 28, 28)])
def test_erase_replaces_a_rectangle_by_noise(shape):
    torch.manual_seed(0)
    erased = torch.zeros(shape)
    seed_generators("erase")
    for _ in range(20):
        images, targets = Augmentation(erase=1.0).batch_transform(3)(torch.zeros(shape), torch.arange(6) % 3)
        erased = (images != 0).float()
        share = erased.mean((1, 2, 3))
        assert (share > 0).all()
        assert (share < 0.45).all()  # a third, before sides are rounded
        for mask in erased[:, 0]:
            rows, columns = mask.amax(1), mask.amax(0)
            assert torch.equal(mask, rows[:, None] * columns)
            assert rows.nonzero().diff(dim=0).eq(1).all()
    assert torch.equal(targets, F.one_hot(torch.arange(6) % 3, 3).float())


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 28, 28)])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_the_shares_of_their_targets(shape, kind):
    seed_generators(kind)
    transform = Augmentation(**{kind: 1.0}, label_smoothing=0.1).batch_transform(4)
    base, labels = torch.rand(shape), torch.arange(4)
    for _ in range(10):
        images, targets = transform(base.clone(), labels)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        ratio = ((targets[0, 0] - 0.025) / 0.9).item()
        smooth = F.one_hot(labels, 4) * 0.9 + 0.025
        torch.testing.assert_close(targets, ratio * smooth + (1 - ratio) * smooth.flip(0))
        if kind == "mixup":
            torch.testing.assert_close(images, ratio * base + (1 - ratio) * base.flip(0))
        else:
            own = images == base
            assert torch.equal(torch.where(own, base, base.flip(0)), images)
            torch.testing.assert_close(own.float().mean().item(), ratio, atol=1e-4, rtol=0)
    untouched, _ = Augmentation(**{kind: 1.0}, mix_prob=0.0).batch_transform(4)(base.clone(), labels)
    assert torch.equal(untouched, base)
    with pytest.raises(ValueError, match="mixup and cutmix need an even number of images in a batch, got 3"):
        transform(torch.rand(3, *shape[1:]), labels[:3])


@pytest.mark.usefixtures("libraries")
def test_switch_chooses_cutmix():
    base = torch.rand(4, 1, 8, 8)
    for switch in (0.0, 1.0):
        seed_generators("switch")
        images, _ = Augmentation(mixup=1.0, cutmix=1.0, mix_switch=switch).batch_transform(4)(
            base.clone(), torch.arange(4)
        )
        assert bool(((images == base) | (images == base.flip(0))).all()) == bool(switch)
