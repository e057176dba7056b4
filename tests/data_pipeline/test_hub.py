"""hf-stream: data read over HTTP from a small hub of our own, and from a folder laid out as a data set."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FILES, ROWS, GROUP = 4, 48, 4  # 48 row groups together: 4 phases of 4 lanes
SIDE = 90  # pixels: a row group of noise is about 100 kB

SCRIPT = """
import dataclasses, itertools, json, os, sys, torch, urllib.error, urllib.request
from pathlib import Path
from visionmoe.data import DataConfig, EvalLoader, TrainLoader, open_source
from visionmoe.data import hub, parquet
from visionmoe.data.batches import TrainBatches

root = Path(sys.argv[1])
parquet.WHOLE_BYTES = 0
hub.DEFAULT_CACHE = root.parent / "cache"
SPEC = "hf-stream:user/photos"

def mark(name):  # a request that the server's log shows
    try:
        urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/mark/{name}")
    except urllib.error.HTTPError:
        pass

def message(call):
    try:
        call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"

config = DataConfig(image_size=8, in_channels=3, batch_size=24, crop="inception", cache_mb=0)
mark("open")
source = open_source(SPEC, "train")
found = {"kind": type(source).__name__, "labels": source.labels.tolist(), "classes": source.class_names[:2],
         "name": source.name(50), "ranks": []}
mark("train")
for rank in range(2):
    for worker in range(2):
        batches = TrainBatches(open_source(SPEC, "train"), config, 0, rank, 2)
        found["ranks"].append([batches[step].labels.tolist() for step in range(worker, 8, 2)])
mark("again")
source = open_source(SPEC, "train")
mark("workers")
def steps(spec, workers):
    loader = TrainLoader(dataclasses.replace(config, workers=workers), 0, 3, source=open_source(spec, "train"))
    return list(itertools.islice(loader, 7))
local = steps(f"hf-stream:{root}", 0)
found["same"] = [
    all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(steps(*way), local, strict=True))
    for way in ((SPEC, 0), (SPEC, 2))
]
found["evaluated"] = [int(i) for _, labels, _ in EvalLoader(
    DataConfig(source=SPEC, eval_split="train[:20]", image_size=8, in_channels=3)) for i in labels]
found["no labels"] = message(lambda: open_source(SPEC, "test"))
mark("lost")
(root / "data/train-00003-of-00004.parquet").unlink()
found["lost"] = message(lambda: source.decode(len(source) - 1))
found["lost in a batch"] = message(lambda: [None for _ in itertools.islice(TrainLoader(config, 0, source=source), 8)])
found["unknown"] = message(lambda: open_source("hf-stream:user/other", "train"))

here = root.parent
source = open_source(f"hf-stream:{here}/set", "train[1:]")
found["folder"] = [source.class_names, source.labels.tolist(), source.decode(0).shape, source.name(0)]
found["mistakes"] = [
    message(lambda: open_source(f"hf-stream:{here}/{spec}")) for spec in ("photos", "set?image=x", "set?imge=x")
]
print(json.dumps(found))
"""


def write_repository(root: Path) -> None:
    rng = np.random.default_rng(0)
    for file in range(FILES):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        write_parquet(root / "data" / f"train-{file:05d}-of-{FILES:05d}.parquet", rng, list(numbers))
    write_parquet(root / "data" / "test-00000-of-00001.parquet", rng, [-1, -1])  # as ImageNet's
    names = "".join(f"          '{n}': class {n}\n" for n in range(FILES * ROWS))
    (root / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}---\nPhotos\n"
    )


def write_parquet(path: Path, rng: np.random.Generator, labels: list) -> None:
    """Images of noise, which no compression makes smaller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b"P6 %d %d 255\n" % (SIDE, SIDE)
    images = [{"bytes": head + rng.bytes(SIDE * SIDE * 3), "path": "a.ppm"} for _ in labels]
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=GROUP)


def test_streaming_from_a_hub_and_from_folders(
    tmp_path: Path, hub: Callable[[Path], AbstractContextManager[tuple[str, list[tuple[str, str, str]]]]]
) -> None:
    root = tmp_path / "repository"
    write_repository(root)
    write_parquet(tmp_path / "set/data/train-00000-of-00001.parquet", np.random.default_rng(0), ["b", "a", "b"])
    for kind in ("a", "b"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / kind / "1.png")
    with hub(root) as (endpoint, log):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT, str(root)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    images = FILES * ROWS
    assert found["kind"] == "HubSource" and found["labels"] == list(range(images))
    assert found["classes"] == ["class 0", "class 1"]
    # row 50 is row 2 of the second file; the revision is pinned to the commit that was found
    assert found["name"] == f"hf://datasets/user/photos@{'0123456789' * 4}/data/train-00001-of-00004.parquet row 2"
    # 8 steps of 24 images are an epoch; two processes with two workers each
    labels = [label for part in found["ranks"] for batch in part for label in batch]
    assert sorted(labels) == list(range(images))
    assert found["same"] == [True, True]
    assert found["evaluated"] == np.sort(np.random.default_rng(0).permutation(images)[:20]).tolist()
    assert found["no labels"] == "ValueError: hf-stream:user/photos: split 'test' has negative labels (no label?), " + (
        "they must be 0, 1, ..."
    )
    for key in ("lost", "lost in a batch"):
        assert "train-00003-of-00004.parquet cannot be read: " in found[key] and "\n" not in found[key]
    assert found["unknown"].startswith(
        "ValueError: hf-stream:user/other: Dataset 'user/other' doesn't exist on the Hub"
    )
    check_requests(log)
    name = f"{tmp_path}/set/data/train-00000-of-00001.parquet row 1"
    assert found["folder"] == [["a", "b"], [0, 1], [SIDE, SIDE, 3], name]
    photos, column, option = found["mistakes"]
    assert photos.startswith(
        f"ValueError: hf-stream:{tmp_path}/photos must consist of parquet files, its files are such as"
    )
    assert column == f"ValueError: hf-stream:{tmp_path}/set: image=x must be one of image"
    assert "unknown option 'imge'" in option and "did you mean 'image'" in option


def check_requests(log: list[tuple[str, str, str]]) -> None:
    """What is read, and how often, of 48 row groups of which each holds about 97 kB of images."""
    phases: dict[str, list[int]] = {}
    phase = ""
    for method, path, wanted in log:
        if path.startswith("/mark/"):
            phase = path.removeprefix("/mark/")
            phases[phase] = []
        elif phase and method == "GET" and wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            phases[phase].append(int(last) - int(first) + 1)
    group = GROUP * SIDE * SIDE * 3
    large = {phase: sum(0.9 * group < size < 1.1 * group for size in sizes) for phase, sizes in phases.items()}
    # Opening: footers (of at most 64 KiB) and labels, no images; again: the footer that says the columns.
    assert large["open"] == large["again"] == 0
    assert len(phases["again"]) <= 2 and sum(phases["open"]) < FILES * 2**17
    # An epoch: every row group once, and once more at the ends of the 16 lanes.
    assert FILES * ROWS // GROUP <= large["train"] <= FILES * ROWS // GROUP + 16
