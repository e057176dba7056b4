"""Downloads of published checkpoints into a cache: resumed where they were cut, complete or not there."""

import base64
import contextlib
import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.registry import BASE_URL, published
from visionmoe.checkpoint.vmoe_format import VmoeReader
from visionmoe.checkpoint.vmoe_index import read_index, shard_path

_READ_BYTES = 1 << 20
_ATTEMPTS = 5  # without any progress
_FORBIDDEN = {401: "not authorised", 403: "forbidden", 404: "not found", 410: "gone"}


@dataclass(frozen=True)
class _Part:
    """A transfer that was begun: bytes so far, and the server's mark (ETag or date) of the file they belong to."""

    size: int
    mark: str


def cache_directory(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, else $VISIONMOE_CACHE, else ~/.cache/visionmoe."""
    return Path(cache_dir or os.environ.get("VISIONMOE_CACHE") or Path.home() / ".cache" / "visionmoe").expanduser()


def download(
    name: str,
    cache_dir: str | os.PathLike | None = None,
    *,
    base_url: str | None = None,
    progress: bool = True,
    retry_seconds: float = 1.0,
) -> Path:
    """Returns the prefix of a published checkpoint in the cache, downloading what is not there yet.

    base_url: default $VISIONMOE_CHECKPOINT_URL or the public bucket. retry_seconds: the first pause after a failure
    without progress; it doubles, five times in all. Files appear under their names only when they are whole; a cut
    transfer is continued, also by a later call. FileNotFoundError when the server does not have the checkpoint,
    ConnectionError when it cannot be reached.
    """
    entry = published(name)
    base = (base_url or os.environ.get("VISIONMOE_CHECKPOINT_URL") or BASE_URL).rstrip("/")
    if urllib.parse.urlsplit(base).scheme not in ("http", "https"):
        raise ValueError(f"the checkpoints' URL must begin with https:// or http://, got {base!r}")
    prefix = cache_directory(cache_dir) / name
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with _lock(prefix.with_name(f"{name}.lock")), _bar(progress) as bar:
        fetcher = _Fetcher(base, bar, retry_seconds)
        try:
            fetcher.fetch(Path(f"{prefix}.index"))
        except FileNotFoundError as error:
            if entry.listed:
                raise
            raise FileNotFoundError(f"{error}; the reference has a recipe for {name}, but lists no weights") from None
        try:  # files of the announced length may still not be a checkpoint
            _, shard_count = read_index(prefix)
            for shard in range(shard_count):
                fetcher.fetch(Path(shard_path(prefix, shard, shard_count)))
            if fetcher.fetched:
                VmoeReader(prefix)
        except CheckpointError as error:
            for path in fetcher.fetched:
                path.unlink(missing_ok=True)
            raise CheckpointError(f"{base} sent a broken checkpoint: {error}") from None
    return prefix


class _Fetcher:
    """Downloads single files from below one URL."""

    def __init__(self, base: str, bar: Progress, retry_seconds: float) -> None:
        self.base, self.bar, self.retry_seconds = base, bar, retry_seconds
        self.fetched: list[Path] = []

    def fetch(self, path: Path) -> None:
        """Downloads `path.name` to `path`, unless it is there."""
        if path.exists():
            return
        url = f"{self.base}/{urllib.parse.quote(path.name)}"
        part = path.with_name(f"{path.name}.part")
        failures, most = 0, _part(part).size
        task = self.bar.add_task(path.name, total=None)
        while True:
            try:
                self._transfer(url, part, task)
                break
            except (
                ConnectionError,
                TimeoutError,
                http.client.HTTPException,
                urllib.error.URLError,
                ssl.SSLError,
            ) as error:
                reason = _permanent(error, url)
                if reason:
                    raise reason from None
                failures = 0 if _part(part).size > most else failures + 1
                most = max(most, _part(part).size)
                if failures >= _ATTEMPTS:
                    raise ConnectionError(
                        f"{url} could not be downloaded: {error or type(error).__name__} "
                        f"({_part(part).size} bytes are kept in {part})"
                    ) from None
                time.sleep(self.retry_seconds * 2**failures / 2 if failures else 0)
        _sync_and_rename(part, path)
        self.fetched.append(path)

    def _transfer(self, url: str, part: Path, task: Any) -> None:
        """One request: continues `part`, or begins it anew. Raises ConnectionError when fewer bytes came than said."""
        begun = _part(part)
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "visionmoe"})
        if begun.size and begun.mark:
            request.add_header("Range", f"bytes={begun.size}-")
            request.add_header("If-Range", begun.mark)
        with _open(request) as response:
            start, total = _extent(response, begun)
            if not start:
                _marker(part).write_text(_mark(response), encoding="utf-8")
            with open(part, "r+b" if start else "wb") as stream:
                stream.truncate(start)
                stream.seek(start)
                self.bar.update(task, completed=start, total=total)
                self._copy(response, stream, task)
                size = stream.tell()
            digest = _md5(response)
        if size != total:
            raise ConnectionError(f"{size} of {total} bytes came")
        if digest and digest != _digest(part):
            part.unlink()
            raise ConnectionError("the bytes are not those that the server announced (MD5)")

    def _copy(self, response: http.client.HTTPResponse, stream: BinaryIO, task: Any) -> None:
        while data := response.read(_READ_BYTES):
            stream.write(data)
            self.bar.advance(task, len(data))


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        # 416: what we have is not the beginning of the server's file, or all of it: ask for the whole.
        if error.code != 416:
            raise
        error.close()
    request.remove_header("Range")
    request.remove_header("If-range")
    return urllib.request.urlopen(request, timeout=30)


def _extent(response: http.client.HTTPResponse, begun: _Part) -> tuple[int, int]:
    """Where the coming bytes begin, and the size of the whole file."""
    length = response.headers.get("Content-Length", "")
    if not length.isdigit():
        raise ValueError(f"{response.url}: the server does not say how long the file is")
    if response.status != 206:
        return 0, int(length)
    content_range = response.headers.get("Content-Range", "")
    if content_range != f"bytes {begun.size}-{begun.size + int(length) - 1}/{begun.size + int(length)}":
        raise ValueError(f"{response.url}: the server sent the range {content_range!r}, asked: {begun.size}-")
    return begun.size, begun.size + int(length)


def _mark(response: http.client.HTTPResponse) -> str:
    """What If-Range accepts: a strong ETag, else the date of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _md5(response: http.client.HTTPResponse) -> bytes | None:
    """The MD5 of the whole file, where the server gives it (Google Cloud Storage does for most files)."""
    entries = ",".join(response.headers.get_all("x-goog-hash") or []).split(",")
    found = [entry.strip()[len("md5=") :] for entry in entries if entry.strip().startswith("md5=")]
    return base64.b64decode(found[0]) if found else None


def _digest(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).digest()


def _marker(part: Path) -> Path:
    return part.with_name(f"{part.name}.mark")


def _part(part: Path) -> _Part:
    try:
        return _Part(part.stat().st_size, _marker(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError):
        return _Part(0, "")


def _permanent(error: Exception, url: str) -> OSError | None:
    """The error to raise when trying again cannot help."""
    code = 0
    if isinstance(error, urllib.error.HTTPError):
        code = error.code
        error.close()
    if not 400 <= code < 500 or code in (408, 429):
        return None
    kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError, 410: FileNotFoundError}
    return kind.get(code, OSError)(f"{url}: {_FORBIDDEN.get(code, 'refused')} (HTTP {code})")


def _sync_and_rename(part: Path, path: Path) -> None:
    with open(part, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, path)
    _marker(part).unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process downloads a checkpoint at a time; the others wait and find it complete."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _bar(visible: bool) -> Progress:
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not visible)
