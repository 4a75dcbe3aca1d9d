"""Gathers items that arrive one at a time into batches for a function that runs in a thread."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio


class Batcher:
    """Calls ``run`` on up to ``size`` items at once; the first of them waits at most ``wait`` seconds for the others.

    One batch runs at a time. Items that arrive meanwhile form the next one.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], size: int, wait: float) -> None:
        self.run, self.size, self.wait = run, size, wait
        # The same thread for every batch: torch makes a team of threads for each caller.
        self.thread = ThreadPoolExecutor(1)
        self.waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()

    async def __call__(self, item: Any) -> Any:
        """The result of ``run`` for ``item``.

        Raises: what ``run`` raises for the batch.
        """
        result = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((item, result))
        return await result

    async def work(self) -> None:
        """Runs batches until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            with anyio.move_on_after(self.wait):
                while len(batch) < self.size:
                    batch.append(await self.waiting.get())
            try:
                outputs = await loop.run_in_executor(self.thread, self.run, [item for item, _ in batch])
            except Exception as error:
                for _, result in batch:
                    if not result.done():  # it is done if the request was cancelled
                        result.set_exception(error)
            else:
                for (_, result), output in zip(batch, outputs, strict=True):
                    if not result.done():
                        result.set_result(output)
