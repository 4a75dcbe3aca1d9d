"""Weights by name: the table, downloads from a server on this machine with all that can go wrong, and loading."""

import errno
import fcntl
import hashlib
import http.server
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mobilemamba import create_model, weights

BROKEN_PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
QUESTION = b"""<html><title>Virus scan warning</title><form id="download-form" action="%s/download" method="get">
<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t&amp;1"></form></html>"""


@dataclass
class Server:
    """What the server on 127.0.0.1 sends, and what it was asked."""

    url: str = ""
    body: bytes = b""
    html: bytes | None = None  # sent instead of the body
    question: bool = False  # ask Google Drive's question about large files first
    cut: int | None = None  # close the connection after this many bytes
    ranges: bool = True  # answer requests for a part of the file
    ranges_asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges_asked.append(asked)
            page = state.html
            if state.question and "confirm=t%261" not in self.path:
                page = QUESTION % state.url.rpartition("/")[0].encode()
            if page is not None:
                return self.reply(200, page, {"Content-Type": "text/html; charset=utf-8"})
            start = int(asked[6:-1]) if asked and state.ranges else 0
            size = len(state.body)
            if start >= size:
                return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
            partial = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if asked and state.ranges else {}
            self.reply(206 if partial else 200, state.body[start:], partial)

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: state.cut])

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        state.url = f"http://127.0.0.1:{http_server.server_port}/file"
        threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()  # seconds to stop
        yield state
        http_server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOBILEMAMBA_WEIGHTS", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"head.weight": torch.rand(1000, 50)}, buffer)
    return buffer.getvalue()


T2 = weights.entry("t2")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_table() -> None:
    published = [entry for entry in weights.ENTRIES if entry.drive_id]
    assert len(published) == len({entry.drive_id for entry in published}) == 12
    assert all(len(entry.drive_id) == 33 for entry in published)
    assert len({entry.file_name for entry in weights.ENTRIES}) == 13
    sizes = {entry.preset: entry.preprocessing.crop for entry in weights.ENTRIES}
    assert sizes == {"nano": 28, "t2": 192, "t4": 192, "s6": 224, "b1": 256, "b2": 384, "b4": 512}
    assert [entry.preprocessing.resize for entry in published[::2]] == [219, 219, 256, 292, 438, 585]
    assert weights.entry("s6", distilled=True).top1 == 80.7
    assert len(weights.entry("nano").labels) == 10
    imagenet = weights.entry("s6").labels
    assert all(entry.labels is imagenet for entry in published)
    assert len(set(imagenet)) == 1000
    assert all(label and label == label.strip() for label in imagenet)
    spots = {0: "tench", 134: "crane bird", 281: "tabby", 388: "giant panda", 517: "crane", 999: "toilet tissue"}
    assert {index: imagenet[index] for index in spots} == spots
    with pytest.raises(ValueError, match="unknown model 'zz'; expected one of nano, t2, t4, s6, b1, b2, b4"):
        weights.entry("zz")
    with pytest.raises(ValueError, match="no distilled weights for model 'nano'; expected one of t2, t4, s6, b1"):
        weights.entry("nano", distilled=True)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert weights.cache_dir() == cache
    monkeypatch.delenv("MOBILEMAMBA_WEIGHTS")
    assert weights.cache_dir() == Path(torch.hub.get_dir()) / "checkpoints"


def test_download(server: Server, cache: Path, torch_file: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    server.body = torch_file
    digest = hashlib.sha256(torch_file).hexdigest()
    for _ in range(2):  # the second time from the cache
        path = weights.download(T2, url=server.url)
        assert path.read_bytes() == torch_file
    assert len(server.ranges_asked) == 1
    assert names(cache) == ["mobilemamba-t2-plain.pth", "mobilemamba-t2-plain.pth.sha256"]
    assert (cache / "mobilemamba-t2-plain.pth.sha256").read_text() == f"{digest}  mobilemamba-t2-plain.pth\n"
    assert "mobilemamba-t2-plain.pth: 0.2 of 0.2 MB (100%)" in capsys.readouterr().err
    weights.download(T2, sha256=digest.upper())
    with pytest.raises(ValueError, match=f"expected sha256 {'0' * 64}, got {digest}"):
        weights.download(T2, sha256="0" * 64)


@pytest.mark.parametrize("ranges", [True, False])
def test_continues_after_a_cut(server: Server, cache: Path, torch_file: bytes, ranges: bool) -> None:
    server.body, server.cut, server.ranges = torch_file, 100_000, ranges
    with pytest.raises(OSError, match=rf"failed: the connection ended after 100000 of {len(torch_file)} bytes; try"):
        weights.download(T2, url=server.url, progress=False)
    assert names(cache) == ["mobilemamba-t2-plain.pth.part"]
    server.cut = None
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file
    assert server.ranges_asked == [None, "bytes=100000-"]
    assert names(cache) == ["mobilemamba-t2-plain.pth", "mobilemamba-t2-plain.pth.sha256"]


def test_part_that_is_whole_already(server: Server, cache: Path, torch_file: bytes) -> None:
    server.body = torch_file
    cache.mkdir()
    (cache / "mobilemamba-t2-plain.pth.part").write_bytes(torch_file)
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file


def test_part_of_another_file(server: Server, cache: Path, torch_file: bytes) -> None:
    server.body = torch_file
    cache.mkdir()
    for stale in (b"x" * 100, torch_file[:500] + b"?" + torch_file[501:900], torch_file + b"longer"):
        (cache / "mobilemamba-t2-plain.pth.part").write_bytes(stale)
        with pytest.raises(ValueError, match=r"download of mobilemamba-t2-plain\.pth refused: .*"):
            weights.download(T2, url=server.url, progress=False)
        assert names(cache) == []
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file


@pytest.mark.parametrize("page", [BROKEN_PAGE, QUESTION % b"http://elsewhere.invalid"])
def test_a_page_instead_of_the_rest_loses_nothing(server: Server, cache: Path, torch_file: bytes, page: bytes) -> None:
    server.body, server.html = torch_file, page
    cache.mkdir()
    part = cache / "mobilemamba-t2-plain.pth.part"
    part.write_bytes(torch_file[:100_000])
    with pytest.raises(ValueError, match="refused: expected the file, got a web page that says"):
        weights.download(T2, url=server.url, progress=False)
    assert part.read_bytes() == torch_file[:100_000]
    server.html = None
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file
    assert server.ranges_asked[-1] == "bytes=100000-"


def test_google_drives_question(server: Server, torch_file: bytes) -> None:
    server.body, server.question = torch_file, True
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file


@pytest.mark.parametrize(
    ("html", "body", "message"),
    [
        (BROKEN_PAGE, b"", "expected the file, got a web page that says 'Google Drive - Quota exceeded'"),
        (QUESTION % b"http://elsewhere.invalid", b"", "got a web page that says 'Virus scan warning'"),
        (None, BROKEN_PAGE, "expected the file, got a web page"),
        (None, b"something else", "expected a torch file, got something else"),
        (None, None, "expected a complete torch file, got one that is cut off"),
    ],
)
def test_refused(
    server: Server, cache: Path, torch_file: bytes, html: bytes | None, body: bytes | None, message: str
) -> None:
    server.html, server.body = html, torch_file[:-100] if body is None else body
    with pytest.raises(ValueError, match=f"download of {T2.file_name} refused: .*{message}") as caught:
        weights.download(T2, url=server.url, progress=False)
    assert "\n" not in str(caught.value)
    assert names(cache) == []


def test_no_server(cache: Path) -> None:
    with pytest.raises(OSError, match=r"failed: .*refused; try again to continue it, or put the file from http"):
        weights.download(T2, url="http://127.0.0.1:9/file", progress=False)
    assert names(cache) == []


def test_wrong_hash_is_not_installed(server: Server, cache: Path, torch_file: bytes) -> None:
    server.body = torch_file
    with pytest.raises(ValueError, match=f"expected sha256 {'a' * 64}, got {hashlib.sha256(torch_file).hexdigest()}"):
        weights.download(T2, url=server.url, progress=False, sha256="a" * 64)
    assert names(cache) == []


def test_changed_file(server: Server, cache: Path, torch_file: bytes) -> None:
    server.body = torch_file
    path = weights.download(T2, url=server.url, progress=False)
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"as at the first download, got .*; to download the file again, remove"):
        weights.download(T2)
    with pytest.raises(ValueError, match="as at the first download"):
        create_model("t2", pretrained=True)


def test_simultaneous_downloads(server: Server, cache: Path, torch_file: bytes) -> None:
    server.body = torch_file
    results: list[Path | Exception] = []

    def run() -> None:
        try:
            results.append(weights.download(T2, url=server.url, progress=False))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / "mobilemamba-t2-plain.pth"] * 8
    assert len(server.ranges_asked) == 1
    assert names(cache) == ["mobilemamba-t2-plain.pth", "mobilemamba-t2-plain.pth.sha256"]


def read_only(path: Path, write: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_a_file_in_a_folder_that_cannot_be_written(
    cache: Path, torch_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used, without a record of its hash."""
    cache.mkdir()
    (cache / T2.file_name).write_bytes(torch_file)
    monkeypatch.setattr(weights.files, "atomic_write", read_only)
    assert weights.download(T2) == cache / T2.file_name
    with pytest.raises(ValueError, match=f"expected sha256 {'0' * 64}"):
        weights.download(T2, sha256="0" * 64)
    assert names(cache) == [T2.file_name]


@pytest.mark.parametrize("place", ["file/cache", "file", "/proc/cache"])
def test_a_download_that_cannot_be_stored(
    server: Server, tmp_path: Path, torch_file: bytes, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    server.body = torch_file
    (tmp_path / "file").touch()
    folder = tmp_path / place
    monkeypatch.setenv("MOBILEMAMBA_WEIGHTS", str(folder))
    message = (
        f"{T2.file_name} cannot be stored in {folder}: .*; put the file from {server.url} at {folder}/{T2.file_name}"
    )
    with pytest.raises(OSError, match=f"^{message}, or let MOBILEMAMBA_WEIGHTS name a folder that can be wr") as caught:
        weights.download(T2, url=server.url, progress=False)
    assert "\n" not in str(caught.value)
    assert server.ranges_asked == []


def test_a_disk_that_is_full(server: Server, cache: Path, torch_file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The received data is kept, as after a cut."""
    server.body = torch_file

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot be stored in .*: No space left on device; put the file from http"):
            weights.download(T2, url=server.url, progress=False)
    assert names(cache) == [f"{T2.file_name}.part"]
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(
    server: Server, cache: Path, torch_file: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    server.body, server.cut = torch_file, 100_000
    with pytest.raises(OSError, match=r"failed: the connection ended after 100000 of \d+ bytes; try again, or put"):
        weights.download(T2, url=server.url, progress=False)
    assert names(cache) == []  # nobody would continue it
    server.cut = None
    assert weights.download(T2, url=server.url, progress=False).read_bytes() == torch_file
    assert names(cache) == [T2.file_name, f"{T2.file_name}.sha256"]


def test_create_model_downloads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = create_model("t2", distillation=True)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    server.body = buffer.getvalue()
    monkeypatch.setattr(weights.table, "DRIVE_URL", server.url + "?id={id}")
    model = create_model("t2", pretrained="distilled")
    assert model.distillation
    assert weights.load(weights.entry("t2", distilled=True)).labels[281] == "tabby"
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="expected two heads of 10 classes, got two heads of 1000 classes"):
        create_model("t2", pretrained="distilled", num_classes=10)
    model = create_model("t2", pretrained="distilled", num_classes=10, allow_head_mismatch=True)
    assert torch.equal(
        model.stages[2].blocks[1].mixer.proj.conv.weight, source.stages[2].blocks[1].mixer.proj.conv.weight
    )
    assert model.head.labels.linear.weight.shape == (10, 368)


def test_pretrained_argument(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="expected True, 'distilled' or a checkpoint, got 'distiled', which is not a file"
    ):
        create_model("nano", pretrained="distiled")
    with pytest.raises(ValueError, match="pretrained: expected True, False, 'distilled' or a path, got 3"):
        create_model("nano", pretrained=3)
    with pytest.raises(ValueError, match="no distilled weights for model 'nano'"):
        create_model("nano", pretrained="distilled")
    path = tmp_path / "weights.pt"
    source = create_model("nano")
    torch.save(source.state_dict(), path)
    model = create_model("nano", pretrained=path)
    assert torch.equal(model.head.linear.weight, source.head.linear.weight)
