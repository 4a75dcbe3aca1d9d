"""The server of examples/serve on loopback: the model's answers, a refusal for every bad upload, bounded memory."""

import asyncio
import http.client
import io
import json
import re
import signal
import socket
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import mobilemamba
from mobilemamba import weights

pytest.importorskip("fastapi", reason="the extra serve is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/serve"))

import load as load_command  # noqa: E402
from batching import Batcher  # noqa: E402
from classifier import Classifier, load  # noqa: E402
from server import make_app, make_parser  # noqa: E402

DRESS = (ROOT / "examples/dress.png").read_bytes()
PIXELS = 1_000_000


@contextmanager
def serving(classifier: Classifier, *options: str) -> Iterator[int]:
    """The server in a thread, from its start to its clean end; the port."""
    limits = make_parser().parse_args(["nano", *options])
    config = uvicorn.Config(make_app(classifier, limits), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def exchange(port: int, body: object, kind: str | None, method: str = "POST") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, "/classify", body, {} if kind is None else {"Content-Type": kind})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def ask(port: int, body: object = DRESS, kind: str | None = "image/png", method: str = "POST") -> tuple[int, dict]:
    """The status and the content of the answer."""
    status, content = exchange(port, body, kind, method)
    return status, json.loads(content)


def status_of(port: int, body: bytes) -> int:
    """The status; 0 where the server closed the connection after a refusal, before it had read the whole body."""
    try:
        return exchange(port, body, "image/png")[0]
    except (ConnectionResetError, BrokenPipeError):
        return 0


def working_on(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())["working_on"]


def until_it_works_on(port: int, images: int) -> None:
    deadline = time.monotonic() + 30
    while working_on(port) != images:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def nano() -> Classifier:
    torch.set_num_threads(1)
    return load("nano")


@pytest.fixture(scope="module")
def port(nano) -> Iterator[int]:
    with serving(nano, "--bytes", "300000", "--pixels", str(PIXELS), "--upload", "1", "--topk", "3") as port:
        yield port


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Answers


def test_answers_are_the_models(port):
    entry = weights.entry("nano")
    model = mobilemamba.nano(pretrained=True).fuse()
    paths = sorted((ROOT / "examples").glob("*.png"))
    with torch.inference_mode():
        rows = model(torch.stack([entry.preprocessing.transforms()(path) for path in paths])).softmax(1)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda path: ask(port, path.read_bytes()), paths * 5))
    for (status, content), row in zip(answers, rows.repeat(5, 1), strict=True):
        top = row.topk(3)
        assert status == 200
        assert [p["class"] for p in content["predictions"]] == top.indices.tolist()
        assert [p["label"] for p in content["predictions"]] == [entry.labels[i] for i in top.indices.tolist()]
        assert [p["probability"] for p in content["predictions"]] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("image", "format"),
    [
        (Image.new("RGB", (40, 30), "red"), "JPEG"),
        (Image.new("CMYK", (40, 30)), "JPEG"),
        (Image.new("RGBA", (40, 30)), "WEBP"),
        (Image.new("P", (3, 900)), "PNG"),
        (Image.new("I;16", (30, 30)), "PNG"),
        (Image.new("1", (1, 1)), "PNG"),
    ],
)
def test_every_kind_of_good_image(port, image, format):
    status, content = ask(port, encoded(image, format), f"image/{format.lower()}; charset=utf-8")
    assert status == 200
    assert len(content["predictions"]) == 3


# Refusals


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file whose header states this size, with these chunks after it."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


NOISE = torch.randint(256, (200, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
JPEG = encoded(Image.fromarray(NOISE), "JPEG")
TEXT_BOMB = (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * 2**20)))  # 100 kB, 100 MiB when inflated
BAD = {
    "no content type": (DRESS, None, 415, "Content-Type: expected image/jpeg or image/png or image/webp, got none"),
    "another type": (DRESS, "text/plain", 415, "got text/plain"),
    "a form": (b"--x", "multipart/form-data; boundary=x", 415, "got multipart/form-data"),
    "a decoder that is shut": (b"%!PS-Adobe", "application/postscript", 415, "got application/postscript"),
    "a long type": (DRESS, "image/" + "x" * 5000, 415, "got image/xxx"),
    "empty": (b"", "image/png", 400, "expected a PNG image, got something else"),
    "text": (b"hello", "image/png", 400, "expected a PNG image"),
    "a program in place of an image": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/png", 400, "expected a PNG image"),
    "another format than the type": (DRESS, "image/jpeg", 400, "expected a JPEG image"),
    "no pixels": (png(0, 0), "image/png", 400, ""),
    "only a header": (png(100, 100), "image/png", 400, "not a readable image"),
    "bad pixels": (png(9, 9, (b"IDAT", b"hello")), "image/png", 400, "not a readable image"),
    "truncated": (JPEG[: len(JPEG) // 2], "image/jpeg", 400, "not a readable image"),
    "noise after the header": (JPEG[:30] + bytes(999), "image/jpeg", 400, ""),
    "a bomb": (png(100_000, 100_000), "image/png", 413, "expected at most 1000000 pixels, got many more"),
    "too wide": (png(1_000_001, 1), "image/png", 413, "expected at most 1000000 pixels, got 1000001 x 1"),
    "a bomb of text": (png(9, 9, TEXT_BOMB), "image/png", 400, "expected a PNG image, got something else"),
    "too many bytes": (bytes(300_001), "image/png", 413, "expected at most 300000 bytes, got more"),
    "endless": ((bytes(5000) for _ in range(100)), "image/png", 413, "expected at most 300000 bytes, got more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads(port, name):
    body, kind, expected, words = BAD[name]
    status, content = ask(port, body, kind)
    assert status == expected, content
    assert words in content["detail"]
    assert len(content["detail"]) < 200
    assert "\n" not in content["detail"]
    assert ask(port)[0] == 200


def test_other_calls(port):
    assert ask(port, method="GET", body=None)[0] == 405


def begun(port: int) -> socket.socket:
    """A connection whose upload has begun."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\nabc")
    until_it_works_on(port, 1)
    return client


def answer_on(client: socket.socket) -> tuple[int, str]:
    """Status and body, which may come in several parts."""
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.read().decode()


def test_slow_uploads_end(port):
    with begun(port) as client:
        status, line = answer_on(client)
    assert status == 408
    assert "expected the image within 1 s" in line
    until_it_works_on(port, 0)


def test_clients_that_leave_are_forgotten(port):
    begun(port).close()
    until_it_works_on(port, 0)
    assert ask(port)[0] == 200


# Batches and the queue


class Held:
    """A stand-in for the network: it answers when it is released. Its answers are the means of the images."""

    def __init__(self) -> None:
        self.release, self.batches = threading.Event(), []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        assert self.release.wait(30)
        return images.mean((1, 2, 3))[:, None]


def grey(level: int) -> bytes:
    return encoded(Image.new("L", (28, 28), level), "PNG")


def test_full_queue_is_refused_and_the_rest_answered(nano):
    held = Held()
    with (
        serving(Classifier(held, nano.preprocessing, ()), "--queue", "4", "--batch", "2") as port,
        ThreadPoolExecutor(4) as pool,
    ):
        waiting = [pool.submit(ask, port, grey(50 * i)) for i in range(4)]
        until_it_works_on(port, 4)
        assert ask(port) == (503, {"detail": "4 images are being worked on; try again"})
        held.release.set()
        answers = [future.result() for future in waiting]
        assert working_on(port) == 0
    assert [status for status, _ in answers] == [200] * 4
    levels = [content["predictions"][0]["probability"] for _, content in answers]  # each client got its own
    assert levels == pytest.approx([(50 * i / 255 - 0.286) / 0.353 for i in range(4)], abs=1e-5)
    assert max(held.batches) == 2


def test_an_error_of_the_network_fails_its_batch_only(nano):
    def run(images: torch.Tensor) -> torch.Tensor:
        if images.max() > 1:
            raise RuntimeError("planted")
        return images.mean((1, 2, 3))[:, None]

    with serving(Classifier(run, nano.preprocessing, ()), "--batch", "1") as port:
        assert exchange(port, grey(255), "image/png") == (500, b"Internal Server Error")
        assert ask(port, grey(0))[0] == 200


def test_batches_have_their_size_and_wait() -> None:
    batches = []

    def run(items: list[int]) -> list[int]:
        batches.append(len(items))
        return [item * item for item in items]

    async def all_of(count: int, wait: float) -> list[int]:
        batcher = Batcher(run, 4, wait)
        worker = asyncio.create_task(batcher.work())
        results = await asyncio.gather(*(batcher(i) for i in range(count)))
        worker.cancel()
        return results

    assert asyncio.run(all_of(10, 0.2)) == [i * i for i in range(10)]
    assert batches == [4, 4, 2]


# The program


def memory(process: int) -> int:
    """The largest resident memory of the process so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1]) // 1024


def test_memory_is_bounded_and_sigterm_is_clean(monkeypatch):
    """As a program: bombs and large uploads at once, then the end while images are being read."""
    started = []
    popen = load_command.subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[0]

    monkeypatch.setattr(load_command.subprocess, "Popen", start)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--queue", "8", "--bytes", "2000000", "--pixels", "4000000", "--decoders", "1"]
    with load_command.serving("nano", *options) as port:
        assert ask(port)[0] == 200
        before = memory(started[0].pid)
        bomb = encoded(Image.new("L", (12_000, 12_000)), "PNG")  # 140 kB, 144 MB when decoded
        uploads = [bomb, bytes(4_000_000), encoded(Image.new("L", (2000, 2000)), "PNG")] * 12
        with ThreadPoolExecutor(16) as pool:
            statuses = set(pool.map(lambda upload: status_of(port, upload), uploads))
        assert statuses <= {0, 200, 413, 503}
        assert {200, 413} <= statuses
        assert memory(started[0].pid) - before < 100  # 8 uploads of 2 MB, one decoded image of a few times 4 MB
        with begun(port) as client:
            started[0].send_signal(signal.SIGTERM)
            client.sendall(bytes(497))
            assert answer_on(client)[0] == 400
        rest = started[0].stderr.read()
    assert "Application shutdown complete" in rest
    assert "Traceback" not in rest
    assert started[0].returncode in (0, -signal.SIGTERM)


def test_files_that_are_no_classifier(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("other/version", "1")
    with pytest.raises(ValueError, match=r"other\.pt2: expected a classifier of mobilemamba export"):
        load(str(tmp_path / "other.pt2"))
    (tmp_path / "damaged.pt2").write_bytes((tmp_path / "other.pt2").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"damaged\.pt2: .*got a damaged file"):
        load(str(tmp_path / "damaged.pt2"))
    with pytest.raises(ValueError, match="nanno"):
        load("nanno")


@pytest.mark.full
def test_exported_file_answers_as_the_model(nano, tmp_path):
    entry = weights.entry("nano")
    model = mobilemamba.nano(pretrained=True).eval()
    path = str(tmp_path / "nano.pt2")
    mobilemamba.export(model, path, "aoti", preprocessing=entry.preprocessing, labels=entry.labels)
    file = load(path)
    assert file.preprocessing == nano.preprocessing
    assert list(file.labels) == list(nano.labels)
    with serving(file) as port, serving(nano) as expected:
        for image in sorted((ROOT / "examples").glob("*.png")):
            status, content = ask(port, image.read_bytes())
            other = ask(expected, image.read_bytes())[1]
            assert status == 200
            for got, wanted in zip(content["predictions"], other["predictions"], strict=True):
                assert got["probability"] == pytest.approx(wanted["probability"], abs=1e-5)


def test_load_command(capsys, monkeypatch, nano):
    """It prints its table; the servers here are threads, so that the test is short."""

    @contextmanager
    def in_a_thread(model: str, *options: str) -> Iterator[int]:
        with serving(nano, *options) as port:
            yield port

    monkeypatch.setattr(load_command, "serving", in_a_thread)
    monkeypatch.setattr(sys, "argv", ["load.py", "nano", "--requests", "20", "--clients", "4"])
    load_command.main()
    printed = capsys.readouterr().out
    assert re.search(r"^one at a time +\d+ +[\d.]+ +[\d.]+$", printed, re.M)
    assert re.search(r"^batches of 16 +\d+ +[\d.]+ +[\d.]+$", printed, re.M)
