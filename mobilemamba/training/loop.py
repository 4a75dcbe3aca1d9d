"""The training loop: from a data set to a checkpoint of a model, in one process or several.

All random values depend only on the seed, the epoch, the step and the image. So a stored state needs no generators: a
run that was stopped anywhere and continued gives the same bits as one that was not, on one machine with the same number
of processes.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import torch

from .. import data
from ..data.coco import load_coco
from ..data.mask_folder import load_masks
from .config import MEASURES, TrainConfig
from .folder import RunFolder
from .interruption import Interrupted, Interruption
from .log import Log
from .processes import joined
from .run import Run

__all__ = ["train"]


def train(
    config: TrainConfig,
    out: Path,
    device: str = "cpu",
    resume: bool = False,
    *,
    threads: int | None = None,
    workers: int | None = None,
    save_every: float = 10.0,
) -> float:
    """Train a classifier, detector or segmenter and store it in the folder ``out``.

    Under torchrun, its processes train one model together.

    The run writes ``log.jsonl`` (one line per epoch), ``last.pt`` (the complete state) and, at the end, ``model.pt``
    (the moving average of the weights).

    Args:
        config: the options that determine the result.
        out: the folder; it is made if it is missing. All processes must see it.
        device: ``"cpu"`` or ``"cuda"``, perhaps with an index.
        resume: continue from ``last.pt``. The options must be those of the run (:func:`stored_config`), except that the
            data may be elsewhere and the number of epochs may be larger: the learning rate then follows the schedule
            of the new number.
        threads: CPU threads of each process of the run; None leaves them as they are.
        workers: processes that decode images, for each process of the run. 0: this process decodes. None:
            :func:`mobilemamba.data.default_workers`.
        save_every: minutes between two stored states. The state is also stored at the start, after the training part of
            each epoch, and when a signal stops the run.

    Returns:
        The measure of the stored weights on the test images, from 0 to 1: accuracy, AP or mIoU.

    Raises:
        ValueError: an option or the data cannot be used, or ``last.pt`` was made with other options or data.
        FileExistsError: ``out`` holds a run and ``resume`` is False.
        FileNotFoundError: ``out`` holds no run and ``resume`` is True; or the data are missing.
        BlockingIOError: another process trains in ``out``.
        FloatingPointError: the loss or its gradient is not finite. ``last.pt`` keeps the state that was stored last.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 stopped the run; its state after the latest step is stored.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with joined(device) as (processes, place):
        folder, first = RunFolder(out), processes.rank == 0
        if first:
            folder.check(resume)
        dataset = open_data(config, resume)
        run = Run(config, dataset, place, processes, resume)
        run.how = {"device": device, "threads": threads, "workers": workers, "save_every": save_every}
        run.workers = data.default_workers(dataset.train, processes.here) if workers is None else workers
        with ExitStack() as stack:
            if first:
                stack.enter_context(folder.locked())
            run.interruption = stack.enter_context(Interruption(launched=processes.count > 1))
            if first:
                folder.check(resume)  # another process may have trained here since
            if resume:
                run.load(folder.last)
            save: Callable[[], None] = (lambda: run.save(folder.last)) if first else (lambda: None)
            if not resume:
                save()  # before the first epoch: a folder that cannot be written costs no epoch
                stack.callback(lambda: folder.forget() if first and not run.epoch and not run.step else None)
            log = Log(folder.log, run.epoch) if first else None
            write: Callable[[dict[str, Any]], None] = log.write if log else (lambda entry: None)
            write({"config": asdict(config), **run.facts(), "epoch": run.epoch})
            stopped_in_evaluation = run.epoch > 0 and log is not None and run.epoch not in log.epochs
            if processes.first_says(stopped_in_evaluation):
                write(run.evaluate_epoch())
            while run.epoch < config.epochs:
                saved = time.monotonic()
                for _ in run.train_epoch():
                    if run.asked_to_stop:
                        save()
                        processes.wait()  # torchrun kills the first process while it writes if others have ended
                        raise Interrupted(f"{Signals(run.interruption.asked() or SIGTERM).name} after {run.position()}")
                    if time.monotonic() - saved > 60 * save_every:
                        save()
                        saved = time.monotonic()
                save()
                write(run.evaluate_epoch())
            measures = run.export(folder.model)
            bad = processes.count_different(dataset.bad_images())
            results = {f"test_{name}": value for name, value in measures.items()}
            write({**results, "file": folder.model.name, "bad_images": bad})
    if bad and first:
        print(f"{bad} bad images were skipped; each is named above", file=sys.stderr)
    return measures[MEASURES[config.task]]


def open_data(config: TrainConfig, resume: bool) -> data.DataSet | data.AnnotatedData:
    dataset: data.DataSet | data.AnnotatedData
    root, skip = Path(config.data.partition(":")[2]).expanduser(), config.on_bad_image == "skip"
    try:
        if config.task == "detect":
            dataset = load_coco(root, masks=config.kind == "mask_rcnn", skip=skip)
        elif config.task == "segment":
            dataset = load_masks(root, config.reduce_zero_label, skip)
        else:
            dataset = data.load(config.data, config.image_size, config.on_bad_image)
    except FileNotFoundError as error:
        hint = "; if the data have moved, say where with --data" if resume else ""
        raise FileNotFoundError(f"{error}{hint}") from error
    print(f"{config.data}: {dataset.describe()}", flush=True)
    return dataset
