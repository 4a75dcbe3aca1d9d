"""A classifier behind HTTP: batches, limits on what is uploaded, and one clear line for every refusal.

    python examples/serve/server.py nano.pt2
    curl --data-binary @examples/dress.png -H 'Content-Type: image/png' http://127.0.0.1:8000/classify

docs/serving.md describes the limits, and what belongs in front of this server.
"""

import argparse
import asyncio
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import torch
import uvicorn
from batching import Batcher
from classifier import Classifier, load
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor

from mobilemamba.data import open_image

#: The content types that are taken, with Pillow's names. Its other decoders stay shut: some start other programs.
FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}


def make_app(classifier: Classifier, limits: argparse.Namespace) -> FastAPI:
    """The application. ``limits`` has the options of :func:`make_parser`."""
    prepare = classifier.preprocessing.transforms()
    decoders = ThreadPoolExecutor(limits.decoders)  # bounds how many decoded images are in memory
    batcher = Batcher(lambda images: classifier.run(torch.stack(images)), limits.batch, limits.wait / 1000)
    admitted = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield  # uvicorn goes on from here when it has answered what it had begun
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
        decoders.shutdown()

    app = FastAPI(title="mobilemamba", lifespan=lifespan)

    def decode(content: bytes, format: str) -> Tensor:
        try:
            with Image.open(io.BytesIO(content), formats=[format]) as image:  # reads the header only
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise HTTPException(413, f"expected at most {limits.pixels} pixels, got many more") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError ...
            raise HTTPException(400, f"expected a {format} image, got something else") from error
        if width * height > limits.pixels:
            raise HTTPException(413, f"expected at most {limits.pixels} pixels, got {width} x {height}")
        try:
            return prepare(open_image("the upload", content))
        except ValueError as error:
            raise HTTPException(400, " ".join(str(error).split())) from error

    async def read(request: Request) -> bytes:
        content = bytearray()
        try:
            with anyio.fail_after(limits.upload):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > limits.bytes:
                        raise HTTPException(413, f"expected at most {limits.bytes} bytes, got more")
        except TimeoutError as error:
            raise HTTPException(408, f"expected the image within {limits.upload} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the client left before the end of its image") from error
        return bytes(content)

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        """The most probable classes of the image that is the body of the request."""
        nonlocal admitted
        kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
        if kind not in FORMATS:
            raise HTTPException(415, f"Content-Type: expected {' or '.join(FORMATS)}, got {kind:.40}")
        if admitted >= limits.queue:
            raise HTTPException(503, f"{admitted} images are being worked on; try again", {"Retry-After": "1"})
        admitted += 1
        try:
            content = await read(request)
            image = await asyncio.get_running_loop().run_in_executor(decoders, decode, content, FORMATS[kind])
            row = await batcher(image)
        finally:
            admitted -= 1
        top = row.topk(min(limits.topk, len(row)))
        return {
            "predictions": [
                {"class": index, "label": classifier.labels[index] if classifier.labels else None, "probability": value}
                for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
        }

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"working_on": admitted}

    return app


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got '{text}'")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a .pt2 file of mobilemamba export, a checkpoint, or a name such as nano")
    for name, default, text in (
        ("batch", 16, "images in a batch"),
        ("wait", 5, "milliseconds that an image waits for others"),
        ("queue", 128, "images being read, decoded or classified; one more is answered by 503"),
        ("bytes", 10 * 2**20, "bytes of an image"),
        ("pixels", 25_000_000, "pixels of an image"),
        ("upload", 10, "seconds for the upload of an image"),
        ("decoders", 2, "images decoded at the same time"),
        ("topk", 5, "classes in an answer"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one (default: %(default)s)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    try:
        classifier = load(args.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"server: error: {error}") from error
    uvicorn.run(
        make_app(classifier, args),
        host=args.host,
        port=args.port,
        access_log=False,
        limit_concurrency=4 * args.queue,  # open connections, idle ones too
        timeout_graceful_shutdown=30,
    )


if __name__ == "__main__":
    main()
