"""Images per second and core of the training loader, from WebDataset shards and parquet row groups against a folder.

    taskset -c 0 python benchmarks/cluster_loader.py --out benchmarks/results/cluster_loader.json

The same photographs of 500 x 375 (enlarged CIFAR-10 photographs with fine detail added, JPEG, quality 90) lie in a
temporary folder as files, as tar shards and in parquet files; all are in the page cache, so this is what the processor
does, no disk and no network. Batches are random crops at 224 px with flips. Ways take turns; medians over rounds.
Worker processes share the cores that this process may use. The rule for small parquet data (keep all) is off.
`read_us`: reading an image without decoding it, in training order. `index_us_per_image`: finding the images of shards,
once. `order_seconds`: shuffling an epoch.
"""

import argparse
import datetime
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from image_pipeline import photograph

import visionmoe.data.parquet
from visionmoe.data import DataConfig, Source, TrainLoader, open_source
from visionmoe.data.order import PHASES, Pieces, epoch_order
from visionmoe.data.tarindex import index_shard
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json

SHARD = 32  # images of a shard, and of a row group
FILES = 5  # parquet files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="parquet:../shared/data/cifar10")
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    visionmoe.data.parquet.WHOLE_BYTES = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = write_images(root, arguments.data, arguments.images)
        start = time.perf_counter()
        sources = {
            "folder": open_source(f"folder:{root}/folder"),
            "wds": open_source(f"wds:{root}/wds/train-*.tar"),
            "hf-stream, from a local folder": open_source(f"hf-stream:{root}/parquet"),
        }
        print(f"opened in {time.perf_counter() - start:.1f} s", flush=True)
        config = DataConfig(
            image_size=224, in_channels=3, batch_size=arguments.batch_size, crop="inception", cache_mb=0
        )
        rows = measure(sources, config, arguments.workers, arguments.batches, arguments.rounds)
        reads = {name: round(read_time(source) * 1e6, 1) for name, source in sources.items()}
        index = index_time(sorted((root / "wds").glob("*.tar")))
    cores = len(os.sched_getaffinity(0))
    machine = {"cpu": device_name(torch.device("cpu")), "cores": cores, "torch": torch.__version__}
    command = " ".join(["python", *sys.argv])
    written = {"date": str(datetime.date.today()), "machine": machine, "command": command, "images": arguments.images}
    written |= {"bytes_per_photograph": size, "images_per_shard_and_row_group": SHARD}
    write_json(
        arguments.out,
        {**written, "results": rows, "read_us": reads, "index_us_per_image": index, "order_seconds": order_times()},
    )


def write_images(root: Path, data: str, count: int) -> int:
    """The same photographs in three forms; their mean size in bytes."""
    small = open_source(data, "train")
    files = [photograph(small.decode(i), i) for i in range(count)]
    labels = small.labels[:count].tolist()
    for number, (file, label) in enumerate(zip(files, labels, strict=True)):
        path = root / "folder" / f"class{label}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    for folder in ("wds", "parquet"):
        (root / folder).mkdir()
    for shard in range(-(-count // SHARD)):
        with tarfile.open(root / "wds" / f"train-{shard:04d}.tar", "w") as tar:
            for number in range(shard * SHARD, min(count, (shard + 1) * SHARD)):
                for suffix, content in (("jpg", files[number]), ("cls", str(labels[number]).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for file, part in enumerate(np.array_split(np.arange(count), FILES)):
        images = [{"bytes": files[number], "path": f"{number}.jpg"} for number in part]
        table = pa.table({"image": images, "label": [labels[number] for number in part]})
        pq.write_table(table, root / "parquet" / f"train-{file:05d}-of-{FILES:05d}.parquet", row_group_size=SHARD)
    return round(statistics.mean(map(len, files)))


def measure(
    sources: dict[str, Source], config: DataConfig, workers: list[int], batches: int, rounds: int
) -> list[dict]:
    rows = []
    cores = len(os.sched_getaffinity(0))
    for count in workers:
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(rounds):
            for name, source in sources.items():
                rates[name].append(rate(source, config, count, batches, start=turn * 100))
        medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
        used = min(max(count, 1), cores)
        row = {
            "workers": count,
            "images_per_second": medians,
            "images_per_second_and_core": {name: round(value / used, 1) for name, value in medians.items()},
            "against_folder": {name: round(value / medians["folder"], 3) for name, value in medians.items()},
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def rate(source: Source, config: DataConfig, workers: int, batches: int, start: int) -> float:
    """Images per second, once every lane has its first row group and what workers prepare ahead has been taken."""
    loader = TrainLoader(DataConfig(**{**vars(config), "workers": workers}), 0, start, source=source)
    found = iter(loader)
    for _ in range(2 * workers + PHASES):
        next(found)
    begin = time.perf_counter()
    for _ in range(batches):
        next(found)
    seconds = time.perf_counter() - begin
    del found
    return batches * config.batch_size / seconds


def read_time(source: Source) -> float:
    """Seconds per image, in training order and with what a batch's end forgets; the median of four quarters."""
    order = epoch_order(0, 0, len(source), 64, source.pieces)
    times = []
    for quarter in np.array_split(order, 4):
        begin = time.perf_counter()
        for place, index in enumerate(quarter.tolist()):
            source.read(index)
            if place % 64 == 63:
                source.batch_done()
        times.append((time.perf_counter() - begin) / len(quarter))
    return statistics.median(times)


def index_time(shards: list[Path]) -> float:
    def once() -> int:
        return sum(len(index_shard(shard).labels) for shard in shards)

    count = once()
    return round(timed(once) / count * 1e6, 1)


def order_times() -> dict[str, float]:
    """An epoch of as many images as ImageNet-1k and ImageNet-21k have, in shards of 1000."""
    found = {}
    for count in (1_281_167, 14_197_122):
        pieces = Pieces(np.append(np.arange(0, count, 1000), count), 256)
        found[f"{count} images"] = round(timed(lambda n=count, p=pieces: epoch_order(0, 1, n, 1024, p)), 3)
        found[f"{count} images, any order"] = round(timed(lambda n=count: epoch_order(0, 1, n, 1024)), 3)
    return found


def timed(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
