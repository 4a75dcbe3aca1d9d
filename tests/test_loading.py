"""Batches for training and evaluation: which images they have, in which process, and what becomes of bad files."""

import multiprocessing
import os
import random
import signal
import threading
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

import mobilemamba
from mobilemamba import data
from mobilemamba.data.loading import Images, start_worker
from mobilemamba.data.preprocessing import to_tensor
from mobilemamba.data.randomness import mixed_seed
from mobilemamba.data.splits import InMemory

COUNT = 23
PREPROCESSING = data.Preprocessing(resize=8, crop=8, mean=(0.5,), std=(0.5,))


def split(count: int = COUNT) -> InMemory:
    """Image i has the value i everywhere, and the class i % 3."""
    index = torch.arange(count)
    return InMemory(index.byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), index % 3)


def noisy(image: Image.Image) -> torch.Tensor:
    """The image, with a pixel from each of the three generators."""
    pixels = to_tensor(image)
    drawn = (random.randrange(256), np.random.randint(256), int(torch.randint(256, ())))
    pixels[:, 0, :3] = torch.tensor(drawn, dtype=torch.uint8)
    return pixels


def epoch(part=None, transform=noisy, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(
        data.training_batches(part or split(), transform, **{"batch_size": 4, "seed": 0, "epoch": 0, **options})
    )


def assert_same(one, other):
    assert len(one) == len(other)
    for (images, labels), (others, others_labels) in zip(one, other, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, others_labels)


def generator_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_seed_and_epoch(workers):
    before = generator_states()
    batches = epoch(workers=workers)
    assert generator_states() == before
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.uint8
    assert images.shape == (20, 1, 8, 8)
    index = images[:, 0, 7, 7].long()
    assert len(index.unique()) == 20  # the last three of the order are no whole batch
    assert index.tolist() != sorted(index.tolist())
    assert torch.equal(labels, index % 3)
    assert_same(epoch(), batches)
    for options in ({"seed": 1}, {"epoch": 1}):
        others = torch.cat([images for images, _ in epoch(**options)])
        assert not torch.equal(others[:, 0, 7, 7].long(), index)
        by_index = dict(zip(index.tolist(), images[:, 0, 0, :3].tolist(), strict=True))
        assert all(by_index.get(int(image[0, 7, 7])) != image[0, 0, :3].tolist() for image in others)


def test_shares_and_resumed_epochs_have_the_same_images():
    whole = epoch()
    shares = [epoch(share=(rank, 2), workers=rank) for rank in (0, 1)]
    joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*shares, strict=True)]
    assert_same(joined, whole)
    assert_same(epoch(first=2, workers=1), whole[2:])
    assert epoch(first=5) == []


def test_seeds_differ():
    keys = [("image", 0, 1, 2), ("image", 0, 12, 0), ("order", 0, 1), ("image", 1, 0, 2), ("image", 0, 1, 3)]
    assert len({mixed_seed(*key) for key in keys}) == len(keys)
    assert bin(mixed_seed("image", 0, 0, 0) ^ mixed_seed("image", 0, 0, 1)).count("1") in range(16, 49)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_has_every_image_once_and_in_order(workers):
    before = generator_states()
    for world in (1, 3):
        for rank in range(world):
            batches = list(
                data.evaluation_batches(split(), PREPROCESSING, batch_size=4, share=(rank, world), workers=workers)
            )
            index = torch.cat([images[:, 0, 0, 0] for images, _ in batches]).tolist()
            assert index == list(range(rank, COUNT, world))
            assert all(len(images) == 4 for images, _ in batches[:-1])
            assert torch.cat([labels for _, labels in batches]).tolist() == [i % 3 for i in index]
    assert generator_states() == before
    assert list(data.evaluation_batches(split(1), PREPROCESSING, batch_size=4, share=(1, 2))) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a positive multiple of the 1 processes, got 0"),
        ({"batch_size": 5, "share": (0, 2)}, "batch_size: expected a positive multiple of the 2 processes, got 5"),
        ({"batch_size": 24}, "batch_size: expected at most the 23 images of the data, got 24"),
        ({"first": 6}, "first: expected 0 to 5, the batches of an epoch, got 6"),
        ({"share": (2, 2)}, r"share: expected a rank from 0 .*, got \(2, 2\)"),
        ({"workers": -1}, "workers: expected 0 or more processes, got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        data.training_batches(split(), noisy, **{"batch_size": 4, "seed": 0, "epoch": 0, **options})  # no iteration
    if "first" not in options and options.get("batch_size", 0) < 1:
        with pytest.raises(ValueError, match=message.replace("multiple of the 1 processes", "number")):
            data.evaluation_batches(split(), PREPROCESSING, **{"batch_size": 4, **options})


class Operators:
    """A transform that runs operators, forward and backward."""

    def __init__(self) -> None:
        self.network = mobilemamba.nano().fuse()
        self.images = torch.rand(2, 1, 28, 28)
        self.weight = torch.rand(16, 1, 3, 3, requires_grad=True)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self.network(self.images)
        mobilemamba.ops.depthwise_conv2d(torch.rand(8, 16, 32, 32), self.weight).sum().backward()
        return to_tensor(image)


def test_forked_workers_run_operators_after_the_parent_did():
    """A child of fork has none of the parent's OpenMP threads: one that waited for them would hang."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        operators = Operators()
        operators(Image.new("L", (8, 8)))
        loader = data.training_batches(split(4), operators, batch_size=2, seed=0, epoch=0, workers=2)
        watch = threading.Timer(60, lambda: [os.kill(worker, signal.SIGKILL) for worker in worker_ids()])
        watch.start()  # workers that hang become an error of the loader
        assert len([operators(Image.new("L", (8, 8))) for _ in loader]) == 2
        watch.cancel()
    finally:
        torch.set_num_threads(threads)


def test_workers_that_are_not_forked_get_what_they_need():
    """spawn and forkserver pickle the data, the transform and the initialisation."""
    images = Images(split(), data.Augmentation().image_transform(PREPROCESSING), ("image", 0, 0), {})
    copy, start = ForkingPickler.loads(ForkingPickler.dumps((images, start_worker)))
    assert start is start_worker
    assert torch.equal(copy[[3, 1]][0], images[[3, 1]][0])


def test_default_workers(tmp_path, monkeypatch):
    files = folder(tmp_path / "data", "skip").train
    for cpus, processes, expected in ((32, 1, 8), (32, 8, 4), (2, 1, 2), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        assert data.default_workers(files, processes) == expected
    assert data.default_workers(split()) == 0


def test_a_forkserver_imports_torch_once(monkeypatch):
    preloaded = []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_, **__: "forkserver")
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", preloaded.extend)
    assert len(epoch(workers=1)) == 5
    assert preloaded == ["__main__", "mobilemamba.data.loading"]


def worker_ids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(processes: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, processes))


def test_workers_leave_signals_to_the_trainer_and_end_with_the_iteration():
    loader = data.training_batches(split(), noisy, batch_size=1, seed=0, epoch=0, workers=2)
    first = next(loader)
    workers = worker_ids()
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker, number)
    assert_same([first, *loader], epoch(batch_size=1))
    assert not any(map(alive, workers))

    loader = data.training_batches(split(), noisy, batch_size=1, seed=0, epoch=0, workers=1)
    next(loader)
    workers = worker_ids()
    loader.close()
    assert len(workers) == 1
    assert not any(map(alive, workers))


OPEN = []


def leave_an_iteration_open(pipe) -> None:
    OPEN.append(data.training_batches(split(), noisy, batch_size=1, seed=0, epoch=0, workers=2))
    next(OPEN[0])
    pipe.send(worker_ids())


def test_a_process_ends_with_an_iteration_that_is_open():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=leave_an_iteration_open, args=(theirs,))
    process.start()
    workers = ours.recv()
    assert len(workers) == 2
    process.join(20)
    code = process.exitcode
    for left in [*workers, process.pid]:
        if alive(left):
            os.kill(left, signal.SIGKILL)
    assert code == 0


def train_until_killed(pipe) -> None:
    loader = data.training_batches(split(), noisy, batch_size=1, seed=0, epoch=0, workers=2)
    next(loader)
    pipe.send(worker_ids())
    time.sleep(60)


def test_workers_end_with_a_parent_that_was_killed(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.1)  # instead of 5 seconds
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=train_until_killed, args=(theirs,))
    parent.start()
    workers = ours.recv()
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.kill()
    parent.join()
    assert ended(workers)


def start_late(pipe) -> None:
    parent = os.getppid()
    pipe.send(os.getpid())
    while os.getppid() == parent:
        time.sleep(0.01)
    start_worker(0)
    pipe.send("waits for work")


def die_while_a_worker_starts(pipe) -> None:
    multiprocessing.get_context("fork").Process(target=start_late, args=(pipe,)).start()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_starts_after_its_parent_was_killed_ends():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=die_while_a_worker_starts, args=(theirs,))
    parent.start()
    theirs.close()
    worker = ours.recv()
    parent.join()
    with pytest.raises(EOFError):
        ours.recv()
    assert ended([worker])


def folder(root, on_bad_image="fail"):
    """Eight training images in two classes; the images ``a/1.png`` and ``b/2.png`` are damaged inside."""
    if not root.exists():
        for part in ("train", "val"):
            for name in "ab":
                (root / part / name).mkdir(parents=True)
                for i in range(4):
                    Image.effect_noise((20, 20), 80 + i).save(root / part / name / f"{i}.png")
            for bad in (root / part / "a" / "1.png", root / part / "b" / "2.png"):
                content = bad.read_bytes()
                bad.write_bytes(content[:200] + bytes(40) + content[240:])
    return data.load(f"folder:{root}", 16, on_bad_image)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_once_and_skipped(tmp_path, capfd, workers):
    loaded = folder(tmp_path / "data", "skip")
    pixels = loaded.preprocessing.pixels()
    names = [f"{name}/{i}.png" for name in "ab" for i in range(4)]
    good = {names.index(name): pixels(tmp_path / "data/train" / name) for name in names if name not in BAD}
    order = torch.randperm(8, generator=torch.Generator().manual_seed(mixed_seed("order", 0, 0)))
    expected = [i + 1 if names[i] in BAD else i for i in order.tolist()]
    for _ in range(2):  # the second time the files are known
        batches = epoch(loaded.train, pixels, batch_size=2, workers=workers)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(images, torch.stack([good[i] for i in expected]))
        assert labels.tolist() == [i // 4 for i in expected]
        tested = list(data.evaluation_batches(loaded.test, loaded.preprocessing, batch_size=3, workers=workers))
        assert torch.cat([labels for _, labels in tested]).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(loaded.bad_images()) == 4
    assert loaded.train.bad.keys() == {1, 6}
    lines = capfd.readouterr().err.splitlines()
    assert sorted(line.partition(": not a readable image: ")[0] for line in lines) == [
        f"skipped: {tmp_path}/data/{part}/{name}" for part in ("train", "val") for name in BAD
    ]


BAD = ("a/1.png", "b/2.png")


class MostlyBad(InMemory):
    skip = True

    def image(self, i: int) -> Image.Image:
        if i < 6:
            raise OSError(f"{i}.png: cannot be read")
        return super().image(i)


def test_images_that_several_workers_meet_are_named_once(monkeypatch, capfd):
    """Each worker looks for a good image, and meets the same bad ones."""
    monkeypatch.setattr(MostlyBad, "bad", {})
    part = MostlyBad(split(8).pixels, split(8).labels)
    images = torch.cat([images for images, _ in epoch(part, batch_size=1, workers=2)])
    assert sorted(images[:, 0, 7, 7].tolist()) == [6] * 7 + [7]
    assert sorted(capfd.readouterr().err.splitlines()) == [f"skipped: {i}.png: cannot be read" for i in range(6)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_error_with_its_name(tmp_path, workers):
    loaded = folder(tmp_path / "data")
    for batches in (
        data.training_batches(loaded.train, noisy, batch_size=8, seed=0, epoch=0, workers=workers),
        data.evaluation_batches(loaded.test, loaded.preprocessing, batch_size=8, workers=workers),
    ):
        with pytest.raises(
            ValueError, match=r"(a/1|b/2)\.png: not a readable image: .*: mend the file, or skip it with --on-"
        ) as caught:
            list(batches)
        assert "\n" not in str(caught.value)
    assert not loaded.bad_images()


def test_nothing_that_can_be_read(tmp_path, capfd):
    loaded = folder(tmp_path / "data", "skip")
    for path in (tmp_path / "data").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="expected images, got none that can be read"):
        epoch(loaded.train, batch_size=8)
    assert list(data.evaluation_batches(loaded.test, loaded.preprocessing, batch_size=8)) == []
    assert len(loaded.test.bad) == 8
    assert "skipped: " + str(tmp_path / "data/val/a/0.png") + ": no such image file" in capfd.readouterr().err


def broken(image: Image.Image) -> torch.Tensor:
    raise TypeError("a step that does not work")


def refusing(image: Image.Image) -> torch.Tensor:
    raise ValueError("an image that a step refuses")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_transform_name_the_image(workers):
    with pytest.raises(RuntimeError, match=r"image \d+: TypeError: a step that does not work") as error:
        epoch(transform=broken, workers=workers)
    assert not worker_ids(), f"workers are left while {error} is kept"
    with pytest.raises(ValueError, match=r"^image \d+: an image that a step refuses: mend the file"):
        epoch(transform=refusing, workers=workers)


def test_a_replacement_has_random_changes_of_its_own():
    part = split(2)
    images = Images(part, noisy, ("image", 0, 0), {0: "bad"})
    pixels, labels, _, _ = images[[0, 1]]
    assert pixels[:, 0, 7, 7].tolist() == labels.tolist() == [1, 1]
    assert not torch.equal(*pixels)
