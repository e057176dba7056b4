"""WebDataset shards: read by number, split exactly over processes and workers, and what damaged ones say."""

import dataclasses
import gzip
import io
import itertools
import os
import pickle
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionmoe.data import DataConfig, EvalLoader, TrainLoader, open_source
from visionmoe.data import tarindex as tarindex_module
from visionmoe.data.tarindex import INDEX_NAME, expand_braces, index_shard, read_indices
from visionmoe.data.webdataset import WebDatasetSource, find_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tarindex_module, "DEFAULT_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def png(value: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (6, 6, 3), np.uint8)
    pixels[0, 0] = value
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """As WebDataset's TarWriter: one plain header per member, a record of zeros at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(number: int, label: int | None = None) -> list[tuple[str, bytes]]:
    """Image `number`, whose first pixel and whose label are its number."""
    return [(f"{number:06d}.png", png(number % 256)), (f"{number:06d}.cls", str(label or number).encode())]


def write_shards(folder: Path, sizes: list[int]) -> None:
    start = 0
    for shard, size in enumerate(sizes):
        write_tar(folder / f"train-{shard:04d}.tar", [m for i in range(start, start + size) for m in sample(i)])
        start += size


# What a shard may hold


def test_samples_classes_and_names(tmp_path: Path) -> None:
    deep = "a/" * 60 + "0003"  # longer than a plain header holds
    members = [
        ("__meta__.json", b"[1]"),
        ("cats/0001.json", b'{"label": 1, "caption": "a cat"}'),
        ("cats/0001.JPEG", png(10)),
        ("./0002.png", png(20)),
        ("./0002.seg.png", png(99)),  # its suffix is seg.png: no image of ours
        ("./0002.txt", b"a dog"),
        ("./0002.cls", b"2\n"),
        ("0003.only.txt", b"no image here"),
        (f"{deep}.webp", png(30)),
        (f"{deep}.cls", b"0"),
        ("0004.cls", b"1"),  # a class says more than "label"
        ("0004.json", b'{"label": 7}'),
        ("0004.png", png(40)),
        ("._0004.png", b"left by a Mac"),
    ]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(kind)
        write_tar(folder / "0.tar", members, kind)
        source = open_source(f"wds:{folder}/0.tar")
        assert isinstance(source, WebDatasetSource)
        assert source.labels.tolist() == [1, 2, 0, 1] and source.class_names == ("0", "1", "2")
        assert [int(source.decode(i)[0, 0, 0]) for i in range(4)] == [10, 20, 30, 40]
        assert source.name(0) == f"{folder}/0.tar cats/0001.JPEG"
        (folder / "classes.txt").write_text("cat\ndog\nemu\n")
        assert open_source(f"wds:{folder}").class_names == ("cat", "dog", "emu")
        (folder / "classes.txt").write_text("cat\ndog\n")
        with pytest.raises(ValueError, match=r"label 2 has no name, classes\.txt has 2"):
            open_source(f"wds:{folder}")


def test_shards_of_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "photos-train-000.tar", [*sample(1), *sample(2)])
    write_tar(tmp_path / "photos-train-001.tar", sample(3))
    write_tar(tmp_path / "photos-validation-000.tar", sample(7))
    pattern = f"wds:{tmp_path}/photos-{{train,validation}}-*.tar"
    train, val = open_source(pattern, "train"), open_source(pattern, "val")
    assert train.labels.tolist() == [1, 2, 3] and val.labels.tolist() == [7]
    assert len(train.class_names) == len(val.class_names) == 8  # of all splits
    assert train.name(2).startswith(f"{tmp_path}/photos-train-001.tar ")
    assert (
        open_source(f"wds:{tmp_path}", "train[1:]").labels.tolist()
        == open_source(f"wds:{tmp_path}").labels[np.sort(np.random.default_rng(0).permutation(3)[1:])].tolist()
    )  # sorted by class, so the slice is that of a fixed shuffle
    for name in ("train", "val"):
        write_tar(tmp_path / "folders" / name / "0.tar", sample(len(name)))
    joined = f"wds:{tmp_path}/folders/train/0.tar::{tmp_path}/folders/val/0.tar"
    assert open_source(joined, "val").labels.tolist() == [3]
    with pytest.raises(ValueError, match="unknown split 'test'; there are: train, val"):
        open_source(joined, "test")


def test_patterns(tmp_path: Path) -> None:
    assert expand_braces("a-{08..10}-{x,yy}.tar") == [
        "a-08-x.tar", "a-08-yy.tar", "a-09-x.tar", "a-09-yy.tar", "a-10-x.tar", "a-10-yy.tar"
    ]  # fmt: skip
    for wrong in ("{3..1}", "{a..c}", "{a}", "{}"):
        with pytest.raises(ValueError, match=r"braces must look like \{000\.\.127\} or \{train,val\}, got \{"):
            expand_braces(f"a{wrong}.tar")
    for number in (0, 1, 4):
        write_tar(tmp_path / f"{number}.tar", sample(number))
    assert find_shards(f"{tmp_path}/{{0..1}}.tar::{tmp_path}/*.tar") == [tmp_path / f"{n}.tar" for n in (0, 1, 4)]
    with pytest.raises(FileNotFoundError, match=r"there is no shard \(tar file\) .*/2\.tar \(2 are missing\)"):
        open_source(f"wds:{tmp_path}/{{0..4}}.tar")
    with pytest.raises(ValueError, match=r"must be files of a local or shared disk, got https://a/0\.tar"):
        open_source("wds:https://a/{0..1}.tar")
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*/x\*\.tar$"):
        open_source(f"wds:{tmp_path}/x*.tar")


def test_pickles_are_never_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "touched").encode() + b"'\ntR."
    write_tar(tmp_path / "0.tar", [*sample(1), ("000001.pyd", evil), ("000001.mask.pickle", evil)])
    for _ in range(2):  # from the shard, and from its kept index
        caplog.clear()
        assert len(open_source(f"wds:{tmp_path}/0.tar")) == 1
        assert "2 members are pickles (.pyd), which are never read" in caplog.text
    assert not (tmp_path / "touched").exists()
    with pytest.raises(ValueError, match="sample 000002 has no label"):
        index_shard(write_tar(tmp_path / "1.tar", [("000002.png", png(1)), ("000002.pyd", evil)]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", b"x")], 'sample 1 has no label: a member .cls .a class number., or .json with a number "label"'),
        ([("1.png", b"x"), ("1.json", b"{}")], "sample 1 has no label"),
        ([("1.png", b"x"), ("1.json", b"[3]")], "sample 1 has no label"),
        ([("1.png", b"x"), ("1.cls", b"cat")], r"1\.cls must hold a class number \(0, 1, ...\), got b'cat'"),
        ([("1.png", b"x"), ("1.cls", b"-1")], r"1\.cls must hold a class number \(0, 1, ...\), got -1"),
        ([("1.png", b"x"), ("1.json", b'{"label": true}')], r"1\.json must hold a class number .*, got True"),
        ([("1.png", b"x"), ("1.json", b'{"label"')], r"1\.json must hold JSON"),
        ([("1.png", b"x"), ("1.json", b"[" * 100_000)], r"1\.json must hold JSON"),
        ([("1.png", b"x"), ("1.cls", b"1"), ("1.png", b"y")], r"has two members 1\.png"),
        ([("1.txt", b"x")], "has no images in split 'train'"),
    ],
)
def test_members_that_cannot_be(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=message) as error:
        open_source(f"wds:{path}")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# Damage


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [m for i in range(4) for m in sample(i)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = tar.getmembers()[-1].offset_data + 512
        places = [m.offset for m in tar.getmembers()]
    # within a header, between members, within an image, within the last member, and without the zeros at the end
    for length in (100, places[2] + 7, places[4], places[6] + 600, ends - 511, ends - 300, ends):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is cut off or") as error:
            open_source(f"wds:{path}")
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    damaged = bytearray(whole)
    damaged[places[4] : places[4] + 512] = b"\x07" * 512
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{path} is cut off or damaged at byte {places[4]}"):
        open_source(f"wds:{path}")
    damaged = bytearray(whole)
    header = tarfile.TarInfo("back.txt").tobuf(tarfile.USTAR_FORMAT)
    size = b"\xff" * 10 + b"\xf8\x00"  # -2048: the next header would be one that was read already
    negative = header[:124] + size + header[136:148] + b" " * 8 + header[156:]
    damaged[places[4] : places[4] + 512] = negative[:148] + b"%06o\0 " % sum(negative) + negative[156:]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut off or no tar file: back\.txt has a size below zero"):
        open_source(f"wds:{path}")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path} is cut off or no tar file"):
        open_source(f"wds:{path}")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=rf"{path} is compressed"):
        open_source(f"wds:{path}")
    path.write_bytes(whole)
    assert len(open_source(f"wds:{path}")) == 4


def test_broken_images_are_as_everywhere(tmp_path: Path) -> None:
    bad = [("000100.png", b"no image"), ("000100.cls", b"100"), ("000101.jpg", b""), ("000101.cls", b"101")]
    path = write_tar(tmp_path / "0.tar", [*sample(1), *bad, *sample(2)])
    source = open_source(f"wds:{path}")
    data = DataConfig(image_size=4, in_channels=3, batch_size=4, crop="resize", flip=False, max_broken=0.5)
    loader = EvalLoader(data, source=source)
    assert [labels.tolist() for _, labels, _ in loader] == [[1, 2]]
    assert sorted(loader.broken) == [f"{path} 000100.png", f"{path} 000101.jpg"]
    train = TrainLoader(data, 0, source=source)
    _, labels = next(iter(train))
    assert set(labels.tolist()) == {1, 2}


def test_a_shard_that_shrank_since(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample(1), *sample(2)])
    source = open_source(f"wds:{path}")
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="the shard is shorter than when it was indexed"):
        source.decode(1)


# The index


def test_an_index_is_found_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "s", [3, 2, 4])
    seen: list[str] = []

    def index(path: Path) -> tarindex_module.ShardIndex:
        seen.append(path.name)
        return index_shard(path)

    monkeypatch.setattr(tarindex_module, "index_shard", index)
    shards = sorted((tmp_path / "s").glob("*.tar"))
    first = read_indices(shards)
    assert sorted(seen) == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    again = read_indices(shards)
    assert len(seen) == 3
    for one, other in zip(first, again, strict=True):
        np.testing.assert_equal(dataclasses.astuple(one), dataclasses.astuple(other))
    write_tar(shards[1], sample(77))  # changed: only this one is read again
    assert [index.labels.tolist() for index in read_indices(shards)] == [[0, 1, 2], [77], [5, 6, 7, 8]]
    assert seen[3:] == ["train-0001.tar"]
    for damage in (b"no index", (tmp_path / "s" / INDEX_NAME).read_bytes()[:300]):
        (tmp_path / "s" / INDEX_NAME).write_bytes(damage)
        seen.clear()
        assert read_indices(shards)[1].labels.tolist() == [77]
        assert len(seen) == 3
    assert not cache.exists()


def test_an_index_beside_shards_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    write_shards(tmp_path / "s", [3, 2])
    (tmp_path / "s" / INDEX_NAME).mkdir()  # so that no file can take its place, whoever the user is
    shards = sorted((tmp_path / "s").glob("*.tar"))
    read_indices(shards)
    (kept,) = (cache / "index").glob("*.npz")
    before = kept.stat().st_mtime_ns
    assert [len(index.labels) for index in read_indices(shards)] == [3, 2]
    assert kept.stat().st_mtime_ns == before


def test_what_was_indexed_before_a_stop_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2] * 6)
    shards = sorted(tmp_path.glob("*.tar"))
    whole = shards[4].read_bytes()
    shards[4].write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"train-0004\.tar is cut off"):
        read_indices(shards)
    shards[4].write_bytes(whole)
    seen: list[str] = []
    monkeypatch.setattr(tarindex_module, "index_shard", lambda path: (seen.append(path.name), index_shard(path))[1])
    assert sum(len(index.labels) for index in read_indices(shards)) == 12
    assert sorted(seen) == ["train-0004.tar", "train-0005.tar"]


def test_of_the_processes_of_a_job_one_finds_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "s", [2] * 8)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def index(path: Path) -> tarindex_module.ShardIndex:
        time.sleep(0.02)
        os.write(log, f"{path.name}\n".encode())
        return index_shard(path)

    monkeypatch.setattr(tarindex_module, "index_shard", index)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            whole = sum(len(index.labels) for index in read_indices(sorted((tmp_path / "s").glob("*.tar")))) == 16
            os._exit(0 if whole else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    os.close(log)
    assert len((tmp_path / "log").read_text().splitlines()) == 8


# Order, processes, workers, resuming


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """70 shards of 1 to 5 images, 210 together: 4 phases of 8 lanes."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [1, 2, 3, 4, 5] * 14)
    yield f"wds:{folder}/train-{{0000..0069}}.tar"


CONFIG = DataConfig(image_size=6, in_channels=3, batch_size=12, crop="pad", crop_padding=1, cache_mb=0)


def batches(
    spec: str, steps: int, *, start: int = 0, world_size: int = 1, workers: int = 0
) -> list[list[torch.Tensor]]:
    """[images, labels] of the whole batch of every step, put together from what every process gets."""
    config = dataclasses.replace(CONFIG, workers=workers)
    loaders = (
        TrainLoader(config, 5, start, rank=rank, world_size=world_size, source=open_source(spec))
        for rank in range(world_size)
    )
    parts = [list(itertools.islice(loader, steps)) for loader in loaders]
    return [[torch.cat(tensors) for tensors in zip(*step, strict=True)] for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_once_and_the_same_batches(many: str, world_size: int, workers: int) -> None:
    """Two epochs of 210 images are 35 batches of 12."""
    found = batches(many, 35, world_size=world_size, workers=workers)
    labels = torch.cat([labels for _, labels in found]).tolist()
    assert sorted(labels[:210]) == sorted(labels[210:]) == list(range(210))
    assert labels[:210] != labels[210:]
    for (images, labels_), (want, want_labels) in zip(found, batches(many, 35), strict=True):
        assert torch.equal(images, want) and torch.equal(labels_, want_labels)


@pytest.mark.parametrize(("start", "world_size", "workers"), [(1, 1, 2), (17, 3, 0), (18, 2, 2), (30, 1, 0)])
def test_resuming_at_any_step(many: str, start: int, world_size: int, workers: int) -> None:
    found = batches(many, 6, start=start, world_size=world_size, workers=workers)
    for (images, labels), (want, want_labels) in zip(found, batches(many, 36)[start : start + 6], strict=True):
        assert torch.equal(images, want) and torch.equal(labels, want_labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_shards(many: str, workers: int) -> None:
    config = dataclasses.replace(CONFIG, workers=workers, eval_batch_size=16)
    loader = EvalLoader(config, source=open_source(many))
    assert torch.cat([labels for _, labels, _ in loader]).tolist() == list(range(210))
    parts = [torch.cat([labels for _, labels, _ in loader.batches(rank, 3)]).tolist() for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(210))
    assert parts[1][:17] == [*range(16, 32), 64]


def test_few_files_are_open(many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionmoe.data.webdataset._OPEN", 5)
    before = set(os.listdir("/proc/self/fd"))
    source = open_source(many)
    assert isinstance(source, WebDatasetSource) and source.pieces and len(source.pieces.starts) == 71
    for index in np.random.default_rng(0).permutation(210)[:50].tolist():
        assert int(source.decode(index)[0, 0, 0]) == index
    assert len(source._open) == 5
    assert len(set(os.listdir("/proc/self/fd")) - before) == 5
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._open and copy.read(3) == source.read(3)
    del source, copy
    assert not set(os.listdir("/proc/self/fd")) - before
