"""Images with boxes and masks: drawn shapes, COCO's JSON, mask folders, joint augmentation, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mobilemamba import data
from mobilemamba.data import shapes
from mobilemamba.data.coco import load_coco, load_coco_split
from mobilemamba.data.joint import DetectionTransform, SegmentationTransform, as_tensors, fitted_size
from mobilemamba.data.mask_folder import load_masks, load_masks_split
from mobilemamba.data.masks import decode, mask_library, mask_problem, run_lengths, text_counts

torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install 'mobilemamba[downstream]'")
pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'mobilemamba[downstream]'")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of small drawings. No test changes it."""
    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    shapes.write(folder, images=6, val_images=2, size=48, seed=3)
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(drawn, tmp_path / "shapes")


def edit(folder, change, part: str = "train"):
    """Change the content of a JSON file by the function ``change``."""
    content = json.loads((folder / f"{part}.json").read_text())
    change(content)
    (folder / f"{part}.json").write_text(json.dumps(content))


def test_drawings_come_from_the_seed(drawn):
    picture, found = shapes.draw(48, (3, 0, 0))
    again, same = shapes.draw(48, (3, 0, 0))
    assert np.array_equal(picture, again)
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(found, same, strict=True))
    assert not np.array_equal(picture, shapes.draw(48, (4, 0, 0))[0])
    with Image.open(drawn / "masks/train/000000.png") as mask:
        classes = np.asarray(mask)
    for kind, visible in found:
        assert (classes[visible] == kind + 1).all()
    assert (classes == 0).sum() == classes.size - sum(visible.sum() for _, visible in found)
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        shapes.write(drawn)
    with pytest.raises(ValueError, match="size: expected at least 32 pixels, got 8"):
        shapes.draw(8, (0,))


def test_shapes_hide_at_most_half_of_another():
    for seed in range(20):
        for _, visible in shapes.draw(48, (seed,))[1]:
            assert visible.any()


def test_coco_targets(drawn):
    dataset = load_coco(drawn, masks=True)
    assert dataset.describe() == "6 training images, 2 test images, 4 classes"
    assert (dataset.labels, dataset.category_ids) == (("circle", "square", "triangle", "star"), (1, 3, 4, 7))
    for i in range(6):
        picture, found = shapes.draw(48, (3, 0, i))
        target = dataset.train.target(i)
        assert target["labels"].tolist() == [kind + 1 for kind, _ in found]
        assert torch.equal(target["masks"].bool(), torch.stack([torch.from_numpy(visible) for _, visible in found]))
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert dataset.train.image(i).size == picture.shape[:2]


def test_polygons_and_run_lengths_are_one_mask():
    square = np.zeros((6, 8), dtype=bool)
    square[1:4, 2:5] = True
    lengths = run_lengths(square)
    assert sum(lengths["counts"]) == 48
    assert np.array_equal(decode(lengths, 6, 8), square)
    assert np.array_equal(decode([[2, 1, 5, 1, 5, 4, 2, 4]], 6, 8), square)
    assert np.array_equal(decode(run_lengths(~square), 6, 8), ~square)


def test_crowds_and_images_without_objects(folder):
    def change(content):
        first, second = content["images"][0]["id"], content["images"][1]["id"]
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] != second]
        for each in content["annotations"]:
            each["iscrowd"] = int(each["image_id"] == first)
        content["annotations"].append({**content["annotations"][-1], "id": 999, "bbox": [3, 4, 0, 5]})

    edit(folder, change)
    dataset = load_coco(folder)
    assert len(dataset.train) == 4
    assert "2 training images without objects left out (000000.jpg, 000001.jpg)" in dataset.describe()
    assert "1 training boxes without area left out" in dataset.describe()
    split = load_coco_split(folder, "train")
    assert len(split.target(0)["labels"]) == 0  # crowds
    assert split.target(1)["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][0].update(image_id=99),
            r"train\.json: annotation 1: expected the id of an",
        ),
        (lambda c: c["annotations"][0].update(category_id=2), r"expected one of the categories 1, 3, 4, 7, got 2"),
        (
            lambda c: c["annotations"][0].update(bbox=[40, 0, 20, 5]),
            r"annotation 1 of 000000\.jpg: .*inside the",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"expected a box of four numbers, got \[1, 2, 3\]"),
        (lambda c: c["annotations"][0]["segmentation"].update(size=[40, 48]), r"annotation 1 .*mask of 48 x 48 .*\[40"),
        (lambda c: c["annotations"][0]["segmentation"].update(counts=[1, 2]), r"run lengths of 2304 pixels, got 3"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), r"annotation 1 .*polygons of three corners"),
        (
            lambda c: c["images"][1].update(id=c["images"][0]["id"]),
            r"images: expected ids that differ, got 1",
        ),
        (lambda c: c["images"][0].pop("width"), r"train\.json: images\[0\]: expected .* got no width"),
        (lambda c: c.pop("categories"), r"train\.json: .*without a list 'categories'"),
        (lambda c: c["categories"].pop(1), r"categories 1, 4, 7, got 3"),
    ],
)
def test_bad_annotations_are_one_line_with_the_file(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_coco(folder, masks=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": []}, r"expected a box of four numbers, got \[\]"),
        ({"bbox": None}, r"expected a box of four numbers, got None"),
        ({"bbox": "all"}, r"expected a box of four numbers, got 'all'"),
        ({"bbox": [0, 0, True, 4]}, r"expected a box of four numbers, got \[0, 0, True"),
        ({"bbox": [0, 0, float("nan"), 4]}, r"expected a box .* inside the"),
        ({"category_id": 2}, r"expected one of the categories 1, 3, 4, 7, got 2"),
        ({"category_id": [1]}, r"expected one of the categories 1, 3, 4, 7, got \[1\]"),
        ({"iscrowd": "0"}, r"expected iscrowd to be 0 or 1, got '0'"),
        ({"area": "9"}, r"expected an area of 0 or more, got '9'"),
        ({"segmentation": None}, r"expected a mask \(polygons or run lengths\), got None"),
        ({"segmentation": [["a"] * 6]}, r"expected polygons of three corners or more, .* got \['a'"),
        ({"segmentation": [[1, 1, 5, 1, 5, 5, 1]]}, r"expected polygons of three corners or more, x and y of each"),
        ({"segmentation": [[1, 1, 5, 1, 5, 10**400]]}, r"expected polygons near the 48 x 48 pixels"),
        ({"segmentation": {"size": [48, 48.0], "counts": [2304]}}, r"expected a mask of 48 x 48 .*got \[48, 48\.0\]"),
        ({"segmentation": {"size": [48, 48], "counts": ["a"]}}, r"expected run lengths, got \['a'\]"),
        ({"segmentation": {"size": [48, 48], "counts": [-1, 2305]}}, r"expected run lengths, got \[-1, 2305\]"),
        ({"segmentation": {"size": [48, 48], "counts": "zz"}}, r"expected run lengths, got 'zz'"),
        ({"segmentation": {"size": [48, 48], "counts": ""}}, r"expected run lengths, got ''"),
        ({"segmentation": {"size": [48, 48], "counts": "oooooooo0"}}, r"expected run lengths, got 'oooo"),
        ({"segmentation": {"size": [48, 48], "counts": "51"}}, r"expected run lengths of 2304 pixels, got 6"),
    ],
)
def test_bad_objects_make_their_image_bad(drawn, folder, change, message, capsys):
    """An error that names the file; with ``skip``, the image is named once and left out."""
    edit(folder, lambda content: content["annotations"][0].update(change))
    with pytest.raises(ValueError, match=r"train\.json: annotation 1 of 000000\.jpg: " + message) as error:
        load_coco_split(folder, "train", masks=True)
    assert str(error.value).endswith("or skip the image with --on-bad-image skip")
    split = load_coco(folder, masks=True, skip=True).train
    batches = data.evaluation_batches(split, as_tensors, batch_size=6)
    assert [int(target["index"]) for _, targets in batches for target in targets] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("000000.jpg: expected") == 1


def test_run_lengths_as_text_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = generator.random((53, 70)) < share
        text = mask_library().encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert text_counts(text) == run_lengths(mask)["counts"]
        assert mask_problem({"size": [53, 70], "counts": text}, 53, 70) == ""


@pytest.mark.parametrize("side", ["48", 0, 48.0, None])
def test_bad_sizes_make_an_image_bad(folder, side, capsys):
    edit(folder, lambda content: content["images"][0].update(width=side))
    with pytest.raises(
        ValueError, match=r"train\.json: image 000000\.jpg: expected a width and height of at least one"
    ):
        load_coco_split(folder, "train")
    split = load_coco(folder, skip=True).train
    batches = data.evaluation_batches(split, as_tensors, batch_size=6)
    assert sum(len(images) for images, _ in batches) == 5
    assert "000000.jpg: expected a width and height" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"][0].update(id=[1]), r"categories\[0\]: expected a whole number as id, got \[1\]"),
        (lambda c: c["categories"][0].update(id="1"), r"categories\[0\]: expected a whole number as id, got '1'"),
        (lambda c: c["images"][0].update(id=None), r"images\[0\]: expected a whole number or text as id, got None"),
        (lambda c: c["images"][0].update(file_name=""), r"images\[0\]: expected the name of a file, got ''"),
        (lambda c: c["images"][0].update(file_name=None), r"images\[0\]: expected the name of a file, got None"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"expected the id of an image in the file, got \[1\]"),
    ],
)
def test_bad_ids_and_names(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        load_coco_split(folder, "train")


def test_sizes_are_compared_before_training(folder):
    edit(folder, lambda content: content["images"][3].update(height=50))
    with pytest.raises(ValueError, match=r"000003\.jpg: expected 48 x 50 pixels, as .*train\.json says, got 48 x 48"):
        load_coco_split(folder, "train")


def test_the_first_image_may_be_missing(folder):
    (folder / "images/train/000000.jpg").unlink()
    split = load_coco(folder, skip=True).train
    assert split.folder == str(folder / "images/train")
    with pytest.raises(ValueError, match=r"000000\.jpg: no such image file"):
        load_coco_split(folder, "train")
    shutil.rmtree(folder / "images")
    with pytest.raises(FileNotFoundError, match=r"train\.json: expected images such as 000000\.jpg in one of"):
        load_coco_split(folder, "train", skip=True)


def test_boxes_that_rounding_removes_are_left_out(folder):
    def change(content):
        keys = {each["image_id"]: each for each in content["annotations"]}
        content["annotations"] = [keys[1], keys[2], keys[3]]
        keys[1]["bbox"] = [40, 3, 1e-9, 5]  # in float32, no width
        keys[2]["bbox"] = [48, 3, 1, 5]  # in the tolerance beyond the image
        keys[3]["bbox"] = [40, 3, 0.001, 5]

    edit(folder, change)
    dataset = load_coco(folder)
    assert dataset.train.names == ["000002.jpg"]
    assert "2 training boxes without area left out" in dataset.describe()
    split = load_coco_split(folder, "train")
    assert [len(split.target(i)["boxes"]) for i in range(3)] == [0, 0, 1]
    box = split.target(2)["boxes"] * 0.77
    assert bool((box[:, 2:] > box[:, :2]).all())


def test_bad_files_of_coco(folder):
    edit(folder, lambda content: content["categories"][0].update(name="disc"), "val")
    with pytest.raises(ValueError, match=r"val\.json: expected the categories of .*train\.json, got others: 1 circle"):
        load_coco(folder)
    (folder / "images/train/000002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000002\.jpg: expected an image"):
        load_coco_split(folder, "train")
    (folder / "images/train/000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"000002\.jpg: no such image file"):
        load_coco_split(folder, "train")
    with pytest.raises(FileNotFoundError, match=r"expected one of test\.json and annotations/instances_test\*\.json"):
        load_coco_split(folder, "test")
    (folder / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train\.json: expected JSON in COCO's format"):
        load_coco_split(folder, "train")


def test_cocos_own_folders(drawn, folder, tmp_path):
    """annotations/instances_train2017.json and train2017/."""
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (folder / f"{part}.json").rename(tmp_path / f"coco/annotations/instances_{part}2017.json")
        (folder / "images" / part).rename(tmp_path / f"coco/{part}2017")
    theirs, ours = load_coco(tmp_path / "coco"), load_coco(drawn)
    assert theirs.fingerprint() == ours.fingerprint()


def test_bad_images_are_skipped_and_named(folder, capsys):
    def change(content):
        content["annotations"][0]["image_id"] = 99
        next(each for each in content["annotations"] if each["image_id"] == 3)["bbox"] = [-9, 0, 4, 4]
        content["images"][3]["width"] = 50

    edit(folder, change)
    split = load_coco_split(folder, "train", skip=True)
    assert "annotation 1 is of image 99" in capsys.readouterr().err
    batches = list(data.evaluation_batches(split, as_tensors, batch_size=4))
    indices = [int(target["index"]) for _, targets in batches for target in targets]
    assert indices == [0, 1, 4, 5]
    told = capsys.readouterr().err
    assert "000002.jpg: expected a box" in told
    assert "000003.jpg: expected 50 x 48 pixels, as" in told
    with pytest.raises(ValueError, match=r"000003\.jpg: expected 50 x 48 pixels"):
        split.image(3)


def test_that_workers_and_processes_change_nothing(drawn):
    split = load_coco(drawn, masks=True).train
    transform = DetectionTransform(flip=True, photometric=True, iou_crop=True, scale=(0.5, 1.5), size=48)

    def epoch(**options):
        batches = data.training_batches(split, transform, batch_size=2, seed=1, epoch=0, **options)
        return [pair for images, targets in batches for pair in zip(images, targets, strict=True)]

    one = epoch()
    halves = [epoch(share=(0, 2)), epoch(share=(1, 2), workers=1)]
    other = [pair for pairs in zip(*halves, strict=True) for pair in pairs]
    assert len(one) == 6
    for (image, target), (image2, target2) in zip(one, other, strict=True):
        assert type(image) is torch.Tensor
        assert torch.equal(image, image2)
        assert target.keys() == target2.keys() == {"boxes", "labels", "masks", "index"}
        assert all(torch.equal(target[name], target2[name]) for name in target)
        height, width = image.shape[1:]
        assert target["masks"].shape == (len(target["boxes"]), height, width)
        assert bool((target["boxes"][:, 2:] > target["boxes"][:, :2]).all())
        assert bool((target["boxes"][:, 2] <= width).all())


def test_steps_remove_boxes_below_one_pixel(drawn):
    split = load_coco(drawn).train
    target = {"boxes": torch.tensor([[4.0, 4.0, 4.9, 9.0], [4.0, 4.0, 5.0, 9.0]]), "labels": torch.tensor([1, 2])}
    assert DetectionTransform()(split.image(0), target)[1]["labels"].tolist() == [1, 2]
    assert DetectionTransform(flip=True)(split.image(0), target)[1]["labels"].tolist() == [2]


def test_flipped_boxes_fit_their_masks(drawn):
    split = load_coco(drawn, masks=True).train
    target = split.target(0)
    torch.manual_seed(0)
    plain = as_tensors(split.image(0), target)[0]
    results = [DetectionTransform(flip=True)(split.image(0), target) for _ in range(8)]
    mirrored = [result for result in results if torch.equal(result[0], plain.flip(-1))]
    assert 0 < len(mirrored) < 8
    boxes, masks = mirrored[0][1]["boxes"], mirrored[0][1]["masks"]
    assert torch.equal(masks, target["masks"].flip(-1))
    assert torch.equal(boxes[:, 0], 48 - target["boxes"][:, 2])


def test_masks(drawn):
    dataset = load_masks(drawn)
    assert dataset.describe() == "6 training images, 2 test images, 5 classes"
    assert dataset.labels == ("background", "circle", "square", "triangle", "star")
    target = dataset.train.target(1)["mask"]
    for kind, visible in shapes.draw(48, (3, 0, 1))[1]:
        assert (target.numpy()[visible] == kind + 1).all()
    reduced = load_masks(drawn, reduce_zero_label=True).train.target(1)["mask"]
    assert bool((reduced[target == 0] == 255).all())
    assert bool((reduced[target > 0] == target[target > 0] - 1).all())


def test_ade20ks_folders(folder, drawn):
    for ours, theirs in (("train", "training"), ("val", "validation")):
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "images" / ours).rename(folder / "images" / theirs)
        (folder / "masks" / ours).rename(folder / "annotations" / theirs)
    names = (folder / "classes.txt").read_text().splitlines()
    rows = [f"{i}\t0.1\t1\t1\t1\t{name}\n" for i, name in enumerate(names, 1)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(rows))
    (folder / "classes.txt").unlink()
    assert load_masks(folder).fingerprint() == load_masks(drawn).fingerprint()


def test_bad_masks(folder, capsys):
    mask = folder / "masks/train/000001.png"
    mask.rename(folder / "aside.png")
    with pytest.raises(FileNotFoundError, match=r"000001\.jpg: expected a mask of this name in .*, got none"):
        load_masks(folder)
    assert len(load_masks_split(folder, "train", skip=True)) == 5
    assert "000001.jpg: expected a mask" in capsys.readouterr().err
    for content, message in (
        (Image.new("L", (40, 48)), r"000001\.png: expected a mask of 48 x 48 pixels, as its image, got 40 x 48"),
        (Image.new("L", (48, 48), 5), r"000001\.png: expected class numbers 0 to 4 or 255, got 5"),
        (
            Image.new("RGB", (48, 48)),
            r"000001\.png: expected a mask with a class number for each pixel .*, got the mode RGB",
        ),
    ):
        content.save(mask)
        with pytest.raises(ValueError, match=message):
            load_masks_split(folder, "train", skip=True).target(1)
        if "class numbers" not in message:  # they need decoding
            with pytest.raises(ValueError, match=message):
                load_masks_split(folder, "train")
    mask.write_bytes(b"")
    with pytest.raises(ValueError, match=r"000001\.png: expected an image"):
        load_masks(folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected classes\.txt"):
        load_masks(folder)
    with pytest.raises(FileNotFoundError, match=r"expected the folders images/test and masks/test"):
        load_masks_split(folder, "test")


def test_masks_of_two_classes_may_have_one_bit(folder):
    Image.fromarray(np.eye(48, dtype=bool)).save(folder / "masks/train/000000.png")
    mask = load_masks_split(folder, "train").target(0)["mask"]
    assert torch.equal(mask, torch.eye(48, dtype=torch.uint8))
    mask = load_masks_split(folder, "train", reduce_zero_label=True).target(0)["mask"]
    assert torch.equal(mask, torch.where(torch.eye(48) > 0, 0, 255).to(torch.uint8))


def test_bad_names_of_classes(folder):
    for content, message in (
        (b"one\n\ntwo\n", r"classes\.txt, line 2: expected the name of a class, got an empty line"),
        (b"", r"classes\.txt: expected 1 to 255 names of classes, one in each line, got 0"),
        (b"\xff\n", r"classes\.txt: expected text in UTF-8"),
    ):
        (folder / "classes.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_masks_split(folder, "train")


def test_turned_images_fit_their_masks(folder):
    """The size in the header of an image that EXIF turns is that of the image upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 30)).save(folder / "images/train/000000.jpg", exif=exif)
    Image.new("L", (30, 48)).save(folder / "masks/train/000000.png")
    assert load_masks_split(folder, "train").target(0)["mask"].shape == (48, 30)


def test_segmentation_transform(drawn):
    split = load_masks(drawn).train
    image, target = split.image(2), split.target(2)
    pixels, same = SegmentationTransform(48, training=False)(image, target)
    assert torch.equal(pixels, as_tensors(image, target)[0])
    assert same is target
    assert SegmentationTransform(24, training=False)(image, target)[0].shape == (3, 24, 24)
    assert fitted_size(100, 50, 20) == (40, 20)
    assert fitted_size(1000, 50, 20) == (80, 4)  # the long side is at most four times 20
    assert fitted_size(1000, 50, 20, 0.5) == (40, 2)
    seen = set()
    for seed in range(12):
        data.seed_generators(seed)
        small, mask = SegmentationTransform(48, (0.5, 2.0), flip=True, photometric=True)(image, target)
        assert small.shape == (3, 48, 48)
        assert mask["mask"].shape == (48, 48)
        beyond = mask["mask"] == 255
        seen.add(bool(beyond.any()))
        assert set(mask["mask"].unique().tolist()) <= {*target["mask"].unique().tolist(), 255}
    assert seen == {True, False}
