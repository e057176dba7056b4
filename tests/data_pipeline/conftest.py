"""A small Hugging Face hub: the few answers that reading a data set takes, from files of a local folder."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """Serves `root` as the data set user/photos. log: (method, path, bytes asked for) of every request."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, log: list[tuple[str, str, str]], *arguments):
        self.root, self.log = root, log
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        self.answer_api(body.get("paths", []))

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/datasets/user/photos/resolve/[^/]+/(.+)", path):
            self.answer_file(match[1])
        else:
            self.answer_api([])

    def answer_api(self, paths: list[str]) -> None:
        path = unquote(urlsplit(self.path).path)
        if re.fullmatch(r"/api/datasets/user/photos(/revision/[^/]+)?", path):
            files = [{"rfilename": name} for name in self.files()]
            self.send({"id": "user/photos", "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        elif match := re.fullmatch(r"/api/datasets/user/photos/tree/[^/]+/?(.*)", path):
            self.send(self.tree(match[1], deep="recursive=true" in urlsplit(self.path).query.lower()))
        elif re.fullmatch(r"/api/datasets/user/photos/paths-info/[^/]+", path):
            self.send([self.entry(name) for name in self.files() if name in paths])
        else:
            self.send({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def answer_file(self, name: str) -> None:
        file = self.root / name
        if not file.is_file():
            self.send({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.send(data[first : last + 1], 206, headers)
        else:
            self.send(data, 200, headers)

    def send(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.log.append((self.command, unquote(urlsplit(self.path).path), self.headers.get("range", "")))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())

    def tree(self, folder: str, *, deep: bool) -> list[dict[str, object]]:
        found = sorted((self.root / folder).rglob("*") if deep else (self.root / folder).glob("*"))
        names = [(path, str(path.relative_to(self.root))) for path in found]
        folders = [{"type": "directory", "path": name, "oid": name, "size": 0} for path, name in names if path.is_dir()]
        return folders + [self.entry(name) for path, name in names if path.is_file()]

    def entry(self, name: str) -> dict[str, object]:
        data = (self.root / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


Log = list[tuple[str, str, str]]


@pytest.fixture
def hub() -> Callable[[Path], AbstractContextManager[tuple[str, Log]]]:
    """Folder -> (endpoint, log) of a hub that serves it as user/photos at commit COMMIT."""
    return serve


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, Log]]:
    log: Log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root, log))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
