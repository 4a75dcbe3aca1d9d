"""A Hugging Face Hub on loopback: the answers that huggingface_hub needs to make a repository, fill it and read it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

__all__ = ["serve"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The files of every repository by ``owner/name``, and the calls that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append(f"POST {path}")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.answer_json({"url": f"{self.server.url}/{name}", "name": name, "id": "1"})
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": files, "commitOid": COMMIT})
        elif "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[repository][line["value"]["path"]] = content
            url = f"{self.server.url}/{repository}/commit/{COMMIT}"
            self.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.calls.append(f"{self.command} {path}")
        repository, _, rest = path.strip("/").partition("/resolve/")
        files = self.server.repositories.get(repository)
        name = rest.partition("/")[2]
        if files is None or name not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            self.answer(404, X_Error_Code=code, X_Repo_Commit=COMMIT)
            return
        etag = hashlib.sha256(files[name]).hexdigest()
        self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub without repositories. Users of the Hub find it by ``HF_ENDPOINT``."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
