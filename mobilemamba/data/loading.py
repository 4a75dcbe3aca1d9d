"""Batches of images for training and evaluation, decoded ahead by worker processes."""

import atexit
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .preprocessing import Preprocessing
from .randomness import mixed_seed, preserved_generators, seed_generators
from .splits import AnnotatedSplit, ImageSource, InMemory, Split

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MAX_WORKERS",
    "default_workers",
    "evaluation_batches",
    "training_batches",
]

MAX_WORKERS = 8  # by default

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # that the trainer answers

Target = dict[str, Tensor]
Batch = tuple[Any, Any]  # images, and labels or targets
Loaded = tuple[Any, Any, dict[int, str], str]  # images, labels or targets, bad images by index, why the batch failed


def default_workers(split: ImageSource, processes: int = 1) -> int:
    """Worker processes for ``split``: one for each CPU, at most :data:`MAX_WORKERS`; none for images in memory.

    Args:
        processes: that load images on this machine.
    """
    if isinstance(split, InMemory):
        return 0
    return min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) // processes))


def training_batches(
    split: Split | AnnotatedSplit,
    transform: "Callable[[Image.Image], Tensor] | Callable[[Image.Image, Target], tuple[Tensor, Target]]",
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first: int = 0,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """The batches of one epoch, with b = ``batch_size / world`` images each.

    Of images with classes: uint8 ``(b, C, H, W)`` and int64 ``(b,)``. Of images with targets (:class:`AnnotatedSplit`):
    a list of b images, which may have different sizes, and a list of their targets.

    The order of the images depends on ``seed`` and ``epoch`` only, the random changes of an image on these and its
    index. So every number of workers and processes gives the same images, bit for bit. The last, incomplete batch is
    dropped. The generators of the calling process stay as they are.

    A bad image is skipped if ``split.skip`` says so: it is named on stderr and in ``split.bad``, and the next good
    image takes its place.

    Args:
        transform: from a PIL image to uint8 ``(C, H, W)``, as :meth:`Augmentation.image_transform` returns. For
            images with targets: from a PIL image and its target to uint8 ``(C, H, W)`` and the target that fits it.
            Workers that are not forked need one that can be pickled.
        batch_size: images in a batch of all processes together.
        first: batches of the epoch that are left out, because they were trained before.
        share: rank and number of the processes that train together: each gets a contiguous share of every batch.
        workers: processes that decode ahead; with 0, the images are decoded in this process when they are needed.
        pin: put the batches into pinned memory, from which copies to a GPU are faster and need not be waited for.

    Raises:
        ValueError: an argument is out of its range. In the iteration: an image is bad and bad images are not skipped,
            or none can be read; the message names the file.
    """
    images = Images(split, transform, ("image", seed, epoch), dict(split.bad))
    return load(images, in_random_order(images, batch_size, seed, epoch, first, share, workers), workers, pin)


def in_random_order(
    images: "Images", batch_size: int, seed: int, epoch: int, first: int, share: tuple[int, int], workers: int
) -> Iterator[list[int]]:
    """The indices of this process's batches of an epoch. Arguments and errors: :func:`training_batches`."""
    check_workers(share, workers)
    rank, world = share
    count = len(images.split)
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size: expected a positive multiple of the {world} processes, got {batch_size}")
    if batch_size > count:
        raise ValueError(f"batch_size: expected at most the {count} images of the data, got {batch_size}")
    if not 0 <= first <= count // batch_size:
        raise ValueError(f"first: expected 0 to {count // batch_size}, the batches of an epoch, got {first}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed("order", seed, epoch)))
    shares = order[: count // batch_size * batch_size].view(-1, world, batch_size // world)[first:, rank]
    return (batch.tolist() for batch in shares)


def evaluation_batches(
    split: Split | AnnotatedSplit,
    preprocessing: "Preprocessing | Callable[[Image.Image, Target], tuple[Tensor, Target]]",
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Every image once, in order: uint8 ``(b, C, crop, crop)`` and int64 ``(b,)``, or lists of images and targets.

    Each target also has ``index``, int64 ``()``: the image's place in the data. The last batch may be smaller. A bad
    image is skipped if ``split.skip`` says so: it is named on stderr and in ``split.bad``, and its batch is smaller.

    Args:
        preprocessing: resizes and crops the images (:meth:`Preprocessing.pixels`). For images with targets: a
            transform, as for :func:`training_batches`.
        batch_size: largest number of images in a batch of this process.
        share: rank and number of the processes that evaluate together: the images ``rank``, ``rank + number`` ... are
            those of this process.
        workers, pin: as in :func:`training_batches`.

    Raises:
        ValueError: an argument is out of its range. In the iteration: an image is bad and bad images are not skipped;
            the message names the file.
    """
    transform = preprocessing.pixels() if isinstance(preprocessing, Preprocessing) else preprocessing
    images = Images(split, transform, None, dict(split.bad))
    return load(images, in_order(images, batch_size, share, workers), workers, pin)


def in_order(images: "Images", batch_size: int, share: tuple[int, int], workers: int) -> Iterator[list[int]]:
    """The indices of the batches of an evaluation. Arguments and errors: :func:`evaluation_batches`."""
    check_workers(share, workers)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    index = torch.arange(share[0], len(images.split), share[1])
    return (batch.tolist() for batch in index.split(batch_size) if len(batch))


def check_workers(share: tuple[int, int], workers: int) -> None:
    rank, world = share
    if not 0 <= rank < world:
        raise ValueError(f"share: expected a rank from 0 and a larger number of processes, got {share}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")


def load(images: "Images", batches: Iterable[list[int]], workers: int, pin: bool) -> Iterator[Batch]:
    """The batches with these indices. Bad images that a worker reports are named here, once."""
    bad = images.split.bad
    if workers and multiprocessing.get_start_method() == "forkserver":  # Python's default since 3.14
        multiprocessing.set_forkserver_preload(["__main__", __name__])  # or each worker imports torch, in each epoch
    loader = DataLoader(
        images,
        batch_size=None,  # an item of `images` is a whole batch
        sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # otherwise the loader draws a number from the caller's generator
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the workers ignore them
    try:
        iterator = [iter(loader)]  # the only reference: without it the iterator ends its workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # An iteration that is open while Python exits ends its workers before multiprocessing waits for them (Finalize, in
    # its processes) and before torch does (atexit, in any other process).
    end = Finalize(None, iterator.clear, exitpriority=10)
    atexit.register(end)
    try:
        while loaded := next(iterator[0], None):
            pixels, labels, found, failure = loaded
            for i in found.keys() - bad.keys():
                bad[i] = found[i]
                print(bad[i], file=sys.stderr)
            if failure:
                raise ValueError(failure)
            if len(labels):
                yield pixels, labels
    except BaseException as error:
        clear_frames(error.__traceback__)  # they hold the iterator as long as anybody holds the error
        raise
    finally:
        end()
        atexit.unregister(end)


def start_worker(worker: int) -> None:
    """Leave signals to the process that trains, and say nothing of odd metadata.

    Ctrl-C and batch systems signal all processes of a job. The trainer finishes its step and saves its state, and needs
    its workers until then. Then it tells them to end. If it dies, they notice within five seconds: torch's worker looks
    whether it still has the parent that it had when it began to wait for work. A trainer that dies earlier is noticed
    here.

    Pillow's warnings (EXIF data cut short, for one) do not name the file, and every worker would repeat them.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        # A forked worker asks for its parent, since the pipe that is_alive() watches may be open in other workers. The
        # parent of a worker of a server is the server.
        server = multiprocessing.get_start_method() == "forkserver"
        if not (trainer.is_alive() if server else os.getppid() == trainer.pid):
            raise SystemExit(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    warnings.filterwarnings("ignore", module="PIL")


@dataclass
class Images(Dataset[Loaded]):
    """Batches by the indices of their images. The copy of a worker process knows only the bad images that it met.

    Args:
        key: with the index of an image, the seed of its random changes. None in an evaluation, where nothing is random,
            and a bad image has no replacement.
        known: what is wrong with bad images, by index.
    """

    split: Split | AnnotatedSplit
    transform: Callable[..., Any]
    key: tuple[int | str, ...] | None
    known: dict[int, str]

    def __getitem__(self, batch: list[int]) -> Loaded:
        before, nothing = set(self.known), torch.empty(0, dtype=torch.long)
        try:
            with preserved_generators():
                images = [loaded for i in batch if (loaded := self.one(i)) is not None]
        except BadImageError as error:
            return nothing, nothing, {}, str(error)
        found = {i: self.known[i] for i in self.known.keys() - before}
        if not images:
            return nothing, nothing, found, ""
        indices, items = map(list, zip(*images, strict=True))
        if not hasattr(self.split, "target"):
            return torch.stack(items), self.split.labels[indices], found, ""
        pixels, targets = zip(*items, strict=True)
        numbered = [{**target, "index": torch.tensor(i)} for i, target in zip(indices, targets, strict=True)]
        return list(pixels), numbered, found, ""

    def one(self, start: int) -> tuple[int, Any] | None:
        """The index of image ``start``, or of its replacement, and what the transform makes of it."""
        count = 1 if self.key is None else len(self.split)
        for i in range(start, start + count):
            i %= len(self.split)
            if i in self.known:
                continue
            try:
                return i, self.read(i, start)
            except (OSError, ValueError) as error:
                if not self.split.skip:
                    raise BadImageError(f"{error}: mend the file, or skip it with --on-bad-image skip") from error
                self.known[i] = f"skipped: {error}"
        if self.key is not None:
            raise BadImageError("expected images, got none that can be read")
        return None

    def read(self, i: int, place: int) -> Any:
        """What the transform makes of image ``i`` and, in an :class:`AnnotatedSplit`, its target.

        Its random changes depend on ``place``: a replacement has other ones than its own.

        Raises:
            ValueError, OSError: the image is bad.
            RuntimeError: anything else went wrong; the message says with which image.
        """
        name = f"image {i}"
        try:
            image = self.split.image(i)
            name = getattr(image, "filename", "") or name
            arguments: tuple[Any, ...] = (image, self.split.target(i)) if hasattr(self.split, "target") else (image,)
            if self.key is not None:
                seed_generators(*self.key, place)
            try:
                return self.transform(*arguments)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error


class BadImageError(ValueError):
    """A bad image ends the epoch."""
