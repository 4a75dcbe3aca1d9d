"""Downloads one large file: resumable, atomic, safe beside other processes. The received data is checked."""

import errno
import fcntl
import html
import http.client
import http.cookiejar
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .files import is_page

__all__ = ["fetch"]

TIMEOUT = 30  # seconds without data before a read fails
BLOCK = 1 << 18  # bytes
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of flock
NOT_STORED = (  # errors of a folder; those of the network have other numbers, or none
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)
CONFIRM_HOST = "drive.usercontent.google.com"  # Google Drive's form may send its answer here


def fetch(url: str, target: Path, check: Callable[[Path], object], progress: bool = True) -> Path:
    """Download ``url`` to ``target``, unless ``target`` exists. Returns ``target``.

    The data is in ``target`` + ``.part`` until it is complete and ``check(path)`` has passed. An interrupted download
    is continued. If another process downloads the same file, this one waits for it. On a file system without locks each
    process downloads to a part of its own, and an interrupted download starts again. Google Drive asks for confirmation
    before it sends a large file; the function confirms.

    Args:
        check: called with the path of the complete data; raises ValueError to refuse it.
        progress: show a progress line on stderr.

    Raises:
        OSError: no connection, or the connection broke: the received data is kept, and the next call continues. Or the
            folder of ``target`` cannot be written.
        ValueError: the received data is a web page or a damaged file. It is deleted. If a web page arrives instead of
            the rest of a file, the data of earlier calls is kept.
    """
    elsewhere = f"put the file from {url} at {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".part"), until=target) as file:
            if file is not None:
                _fetch_into(file, url, target, check, progress, elsewhere)
    except OSError as error:
        if error.errno not in NOT_STORED:
            raise
        raise OSError(
            f"{target.name} cannot be stored in {target.parent}: {error.strerror}; {elsewhere}, or let "
            "MOBILEMAMBA_WEIGHTS name a folder that can be written"
        ) from error
    return target


def _fetch_into(
    file: BinaryIO, url: str, target: Path, check: Callable[[Path], object], progress: bool, elsewhere: str
) -> None:
    """Receive the rest of ``url`` in the part ``file``, check it, and rename it to ``target``."""
    part = Path(file.name)
    try:
        _receive(url, file, target.name, progress)
        file.flush()
        os.fsync(file.fileno())
        _check_whole(part)
        check(part)
    except ValueError as error:
        if not isinstance(error, _WebPageError) or part.stat().st_size == 0:
            part.unlink()
        raise ValueError(f"download of {target.name} refused: {error} ({url})") from error
    except (OSError, http.client.HTTPException) as error:
        if part.stat().st_size == 0:
            part.unlink()
        if isinstance(error, OSError) and error.errno in NOT_STORED:
            raise
        reason = getattr(error, "reason", error)
        again = "try again to continue it" if part.suffix == ".part" else "try again"
        raise OSError(f"download of {target.name} failed: {reason}; {again}, or {elsewhere}") from error
    os.replace(part, target)


class _WebPageError(ValueError):
    """The server's answer is a web page. The data of earlier calls may still be right."""


@contextmanager
def _locked(part: Path, until: Path) -> Iterator[BinaryIO | None]:
    """The part file, open and locked by this process; None if ``until`` exists, perhaps after waiting for the lock.

    On a file system without locks it is a new file of this process, removed at the end.
    """
    while not until.exists():
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                if part.stat().st_size == 0:
                    part.unlink()
                own = part.with_name(f"{part.name}.{uuid.uuid4().hex}")
                try:
                    with own.open("ab") as file:
                        yield file
                finally:
                    own.unlink(missing_ok=True)
                return
            # another process may have renamed or removed the file while this one waited for the lock
            if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                if until.exists():
                    part.unlink()
                    break
                yield file
                return
    yield None


def _receive(url: str, file: BinaryIO, name: str, progress: bool) -> None:
    """Append the missing rest of ``url`` to ``file``."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    have = file.seek(0, os.SEEK_END)
    try:
        response = _open(opener, url, have)
        if (page := _page(response)) is not None:
            response = _open(opener, _confirmed(url, page), have)
            if (page := _page(response)) is not None:
                raise _WebPageError(_refusal(page))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: the part is complete, or longer than the file
            raise
        if error.headers.get("Content-Range", "") == f"bytes */{have}":
            return
        raise ValueError(f"expected the beginning of the file in the part, got {have} other bytes") from error
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file again
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        show = _Progress(name, have, total) if progress else None
        while block := response.read(BLOCK):
            file.write(block)
            have += len(block)
            if show:
                show(have)
        if show:
            show(have, last=True)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def _open(opener: urllib.request.OpenerDirector, url: str, have: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "mobilemamba", **({"Range": f"bytes={have}-"} if have else {})}
    return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _page(response: http.client.HTTPResponse) -> str | None:
    """The text of a web page that the server sent instead of a file, otherwise None."""
    if "html" not in response.headers.get("Content-Type", ""):
        return None
    with response:
        return response.read(1 << 20).decode(errors="replace")


def _confirmed(url: str, page: str) -> str:
    """The address that confirms a download. ``page`` has Google Drive's form for files too large for its virus scan."""
    form = re.search(r'<form[^>]*\baction="([^"]+)"', page)
    target = urllib.parse.urljoin(url, html.unescape(form[1])) if form else ""
    if urllib.parse.urlsplit(target).hostname not in (urllib.parse.urlsplit(url).hostname, CONFIRM_HOST):
        raise _WebPageError(_refusal(page))
    fields = {}
    for tag in re.findall(r"<input[^>]*>", page):
        values = dict(re.findall(r'\b(name|value)="([^"]*)"', tag))
        if "name" in values:
            fields[values["name"]] = html.unescape(values.get("value", ""))
    return f"{target.partition('?')[0]}?{urllib.parse.urlencode(fields)}"


def _refusal(page: str) -> str:
    title = re.search(r"<title>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    said = f" that says '{' '.join(html.unescape(title[1]).split())[:100]}'" if title else ""
    return f"expected the file, got a web page{said}"


def _check_whole(path: Path) -> None:
    """Refuse a file that is not torch's. A file in the zip format must also be complete and match its checksums."""
    with path.open("rb") as file:
        start = file.read(64)
    if is_page(start):
        raise ValueError("expected the file, got a web page")
    if start[:2] == b"\x80\x02" and len(start) == 64:  # torch's format before 1.6 has no checksums
        return
    if start[:4] != b"PK\3\4":
        raise ValueError("expected a torch file, got something else")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError("expected a complete torch file, got one that is cut off") from error
    if damaged:
        raise ValueError(f"expected a complete torch file, got one with damaged data in {damaged}")


class _Progress:
    """A line on stderr with share, rate and time left. A terminal shows it moving, a file gets only the last one."""

    def __init__(self, name: str, have: int, total: int | None) -> None:
        self.name, self.first, self.total = name, have, total
        self.start = self.shown = time.monotonic()

    def __call__(self, have: int, last: bool = False) -> None:
        now = time.monotonic()
        moving = sys.stderr.isatty()
        if not last and (not moving or now - self.shown < 0.2):
            return
        self.shown = now
        rate = (have - self.first) / max(now - self.start, 1e-6)
        text = f"{self.name}: {have / 1e6:.1f}"
        if self.total:
            left = (self.total - have) / max(rate, 1.0)
            text += f" of {self.total / 1e6:.1f} MB ({have / self.total:.0%}), {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        else:
            text += f" MB, {rate / 1e6:.1f} MB/s"
        end = "\n" if last else ""
        print(f"\r{text}" if moving else text, end=end, file=sys.stderr, flush=True)
