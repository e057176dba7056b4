"""Downloads, from a real server on this machine that misbehaves as asked."""

import base64
import contextlib
import hashlib
import http.server
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from visionmoe.checkpoint import read_vmoe, write_vmoe
from visionmoe.checkpoint.download import cache_directory, download
from visionmoe.checkpoint.registry import BASE_URL, PUBLISHED, published

NAME = "vmoe_s32_last2_ilsvrc2012_randaug_light1"


@dataclass
class Behaviour:
    """What the server does with files whose name matches; `requests` notes (name, Range, status)."""

    root: Path
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes sent in the 1st, 2nd, ... answer
    status: dict[str, list[int]] = field(default_factory=dict)  # statuses of the first answers
    ignore_range: bool = False
    etag: bool = True
    weak: bool = False
    length_added: int = 0
    no_length: bool = False
    md5: bool = False
    wrong_md5: int = 0
    requests: list[tuple[str, str, int]] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, *args):
        pass

    def do_GET(self):
        name, b = self.path.rpartition("/")[2], self.behaviour
        asked = self.headers.get("Range", "")
        statuses = b.status.get(name, [])
        if statuses or not (b.root / name).is_file():
            code = statuses.pop(0) if statuses else 404
            b.requests.append((name, asked, code))
            self.send_error(code)
            return
        data = (b.root / name).read_bytes()
        etag = ("W/" if b.weak else "") + f'"{hashlib.sha1(data).hexdigest()}"'
        start, status = 0, 200
        if asked and not b.ignore_range and self.headers.get("If-Range", etag) == etag:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
            if start >= len(data):
                b.requests.append((name, asked, 416))
                self.send_error(416)
                return
        b.requests.append((name, asked, status))
        self.send_response(status)
        if b.etag:
            self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if not b.no_length:
            self.send_header("Content-Length", str(len(data) - start + b.length_added))
        if b.md5:
            digest = hashlib.md5(data + b"x" if b.wrong_md5 > 0 else data).digest()
            b.wrong_md5 -= 1
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={base64.b64encode(digest).decode()}")
        self.end_headers()
        cuts = b.cut_after.get(name, [])
        if cuts:
            self.wfile.write(data[start : start + cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(data[start:])


@pytest.fixture
def server(tmp_path):
    """A server of a small checkpoint in two shards; yields (its behaviour, its URL)."""
    root = tmp_path / "server"
    rng = np.random.default_rng(0)
    flat = {f"a/{i}": rng.normal(size=(50, 40)).astype(np.float32) for i in range(8)}
    write_vmoe(root / NAME, flat, num_shards=2)
    behaviour = Behaviour(root)
    handler = type("Bound", (Handler,), {"behaviour": behaviour})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield behaviour, f"http://127.0.0.1:{httpd.server_port}/bucket"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def get(url, cache, **options):
    return download(NAME, cache, base_url=url, progress=False, retry_seconds=0.01, **options)


def assert_complete(prefix, behaviour):
    expected = read_vmoe(behaviour.root / NAME)
    actual = read_vmoe(prefix)
    assert all((actual[name] == array).all() for name, array in expected.items()) and set(actual) == set(expected)
    assert not list(prefix.parent.glob("*.part*"))


def test_downloads_once(server, tmp_path):
    behaviour, url = server
    prefix = get(url, tmp_path / "cache")
    assert prefix == tmp_path / "cache" / NAME
    assert_complete(prefix, behaviour)
    assert [name for name, _, _ in behaviour.requests] == [
        f"{NAME}.index", f"{NAME}.data-00000-of-00002", f"{NAME}.data-00001-of-00002"
    ]  # fmt: skip
    behaviour.requests.clear()
    assert get(url, tmp_path / "cache") == prefix and not behaviour.requests


def test_cuts_in_mid_transfer_are_continued_where_they_were(server, tmp_path):
    behaviour, url = server
    shard = f"{NAME}.data-00000-of-00002"
    behaviour.cut_after = {shard: [1000, 2000, 3000], f"{NAME}.index": [10]}
    assert_complete(get(url, tmp_path / "cache"), behaviour)
    ranges = [asked for name, asked, _ in behaviour.requests if name == shard]
    assert ranges == ["", "bytes=1000-", "bytes=3000-", "bytes=6000-"]


def test_a_later_call_continues_an_interrupted_one(server, tmp_path):
    behaviour, url = server
    shard = f"{NAME}.data-00001-of-00002"
    behaviour.cut_after = {shard: [5000, 0, 0, 0, 0, 0]}
    with pytest.raises(ConnectionError, match=r"data-00001-of-00002 could not be downloaded.*5000 bytes are kept"):
        get(url, tmp_path / "cache")
    kept = tmp_path / "cache" / f"{shard}.part"
    assert kept.stat().st_size == 5000 and not (tmp_path / "cache" / shard).exists()
    behaviour.requests.clear()
    behaviour.cut_after = {}
    assert_complete(get(url, tmp_path / "cache"), behaviour)
    assert behaviour.requests == [(shard, "bytes=5000-", 206)]


def test_a_file_that_changed_meanwhile_is_begun_anew(server, tmp_path):
    behaviour, url = server
    shard = f"{NAME}.data-00001-of-00002"
    behaviour.cut_after = {shard: [5000, 0, 0, 0, 0, 0]}
    with pytest.raises(ConnectionError):
        get(url, tmp_path / "cache")
    behaviour.cut_after = {}
    old = read_vmoe(behaviour.root / NAME)
    write_vmoe(behaviour.root / NAME, {name: array + 1 for name, array in old.items()}, num_shards=2)
    (tmp_path / "cache" / f"{NAME}.data-00000-of-00002").unlink()
    assert_complete(get(url, tmp_path / "cache"), behaviour)


def test_a_server_that_ignores_ranges(server, tmp_path):
    behaviour, url = server
    behaviour.ignore_range = True
    behaviour.cut_after = {f"{NAME}.data-00000-of-00002": [1000, 900]}
    assert_complete(get(url, tmp_path / "cache"), behaviour)


@pytest.mark.parametrize("options", [{"etag": False}, {"weak": True}])
def test_without_a_strong_mark_transfers_are_begun_anew(server, tmp_path, options):
    behaviour, url = server
    vars(behaviour).update(options)
    behaviour.cut_after = {f"{NAME}.data-00000-of-00002": [1000]}
    assert_complete(get(url, tmp_path / "cache"), behaviour)
    assert all(asked == "" for _, asked, _ in behaviour.requests)


def test_a_part_that_is_already_whole_or_too_long(server, tmp_path):
    behaviour, url = server
    cache = tmp_path / "cache"
    cache.mkdir()
    for shard, added in (("data-00000-of-00002", b""), ("data-00001-of-00002", b"more")):
        data = (behaviour.root / f"{NAME}.{shard}").read_bytes()
        (cache / f"{NAME}.{shard}.part").write_bytes(data + added)
        (cache / f"{NAME}.{shard}.part.mark").write_text(f'"{hashlib.sha1(data).hexdigest()}"')
    assert_complete(get(url, cache), behaviour)


def test_busy_servers_are_asked_again(server, tmp_path):
    behaviour, url = server
    behaviour.status = {f"{NAME}.index": [503, 500, 429]}
    assert_complete(get(url, tmp_path / "cache"), behaviour)


def test_a_length_that_is_never_reached(server, tmp_path):
    behaviour, url = server
    behaviour.length_added = 7
    with pytest.raises(ConnectionError, match=rf"{NAME}\.index could not be downloaded: \d+ of \d+ bytes came"):
        get(url, tmp_path / "cache")
    assert not (tmp_path / "cache" / f"{NAME}.index").exists()


def test_a_length_that_is_too_short_leaves_nothing_broken(server, tmp_path):
    behaviour, url = server
    behaviour.length_added = -3
    with pytest.raises(ValueError, match="sent a broken checkpoint"):
        get(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(f"{NAME}.[id]*"))


def test_no_length_is_an_error(server, tmp_path):
    behaviour, url = server
    behaviour.no_length = True
    with pytest.raises(ValueError, match="does not say how long the file is"):
        get(url, tmp_path / "cache")


def test_checksums_of_the_server_are_verified(server, tmp_path):
    behaviour, url = server
    behaviour.md5, behaviour.wrong_md5 = True, 2
    assert_complete(get(url, tmp_path / "a"), behaviour)
    behaviour.wrong_md5 = 99
    with pytest.raises(ConnectionError, match="MD5"):
        get(url, tmp_path / "b")


@pytest.mark.parametrize("code, error, message", [(404, FileNotFoundError, "not found"), (403, PermissionError,
                                                  "forbidden"), (400, OSError, "refused")])  # fmt: skip
def test_refusals_are_one_error_at_once(server, tmp_path, code, error, message):
    behaviour, url = server
    behaviour.status = {f"{NAME}.index": [code]}
    with pytest.raises(error, match=rf"{NAME}\.index: {message} \(HTTP {code}\)"):
        get(url, tmp_path / "cache")
    assert len(behaviour.requests) == 1


def test_a_missing_shard_is_named_and_what_was_there_is_kept(server, tmp_path):
    behaviour, url = server
    (behaviour.root / f"{NAME}.data-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00001-of-00002: not found"):
        get(url, tmp_path / "cache")
    assert (tmp_path / "cache" / f"{NAME}.data-00000-of-00002").exists()


def test_a_recipe_without_published_weights_says_so(server, tmp_path):
    _, url = server
    name = "vmoe_b16_imagenet21k_randaug_strong_ft_cifar10"
    with pytest.raises(FileNotFoundError, match=r"has a recipe for .* but lists no weights"):
        download(name, tmp_path / "cache", base_url=url, progress=False)


def test_unreachable_server(tmp_path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        get(f"http://127.0.0.1:{port}", tmp_path / "cache")


def test_two_at_once_download_once(server, tmp_path):
    behaviour, url = server
    threads = [threading.Thread(target=get, args=(url, tmp_path / "cache")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_complete(tmp_path / "cache" / NAME, behaviour)
    assert len(behaviour.requests) == 3


def test_places_come_from_arguments_then_the_environment(server, tmp_path, monkeypatch, capfd):
    behaviour, url = server
    monkeypatch.setenv("VISIONMOE_CACHE", str(tmp_path / "from-env"))
    monkeypatch.setenv("VISIONMOE_CHECKPOINT_URL", url)
    prefix = download(NAME)  # with its progress bar, on stderr
    assert prefix == tmp_path / "from-env" / NAME
    assert_complete(prefix, behaviour)
    assert capfd.readouterr().out == ""
    assert cache_directory(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("VISIONMOE_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "visionmoe"
    with pytest.raises(ValueError, match="must begin with https://"):
        download(NAME, tmp_path / "x", base_url="file:///etc")


def test_registry():
    assert BASE_URL.startswith("https://")
    assert len(PUBLISHED) == 8 and sum(entry.listed for entry in PUBLISHED.values()) == 7
    for entry in PUBLISHED.values():
        moe = entry.config.moe
        assert moe.num_experts == 8
        assert (moe.num_selected_experts, moe.ensemble_size) == ((1, 2) if "eee" in entry.name else (2, 1))
    sizes = {name: entry.config.image_size for name, entry in PUBLISHED.items()}
    assert {size for name, size in sizes.items() if name.endswith("_ft_ilsvrc2012")} == {384}
    assert published("vmoe_b16_imagenet21k_randaug_strong").config.num_classes == 21_843
    with pytest.raises(ValueError, match="did you mean 'eee_s32_last2_ilsvrc2012'"):
        published("eee_s32_last2_ilsvrc")
