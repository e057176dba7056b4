"""Images per second on one core, from encoded bytes to a batch: this package against torchvision's transforms.

    taskset -c 0 python benchmarks/image_pipeline.py --out benchmarks/results/image_pipeline.json

Photographs of 500 x 375 (enlarged CIFAR-10 photographs with fine detail added, JPEG, quality 90) and the 32 x 32 JPEGs
of the data set themselves, all held in memory as bytes. Every way makes the same kind of batch: float32 (B, 3, h, w) in
[-1, 1]. Ways take turns; medians. torchvision's ways: v2 transforms on uint8 tensors that `decode_jpeg` made, with
and without antialiasing, and on Pillow's images; its normalisation runs on the whole batch. `ratio` is ours against the
fastest of them. `parts` splits our time of one image of 500 x 375.
"""

import argparse
import datetime
import functools
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from visionmoe.data import DataConfig, decode_image, open_source, to_uint8
from visionmoe.data.batches import EvalBatches, TrainBatches
from visionmoe.data.sources import Source
from visionmoe.data.transforms import inception_crop, resize_bilinear, to_model
from visionmoe.evaluate.timing import device_name, take_turns
from visionmoe.files import write_json


class Encoded(Source):
    """Encoded images in memory."""

    def __init__(self, files: list[bytes]):
        super().__init__(np.zeros(len(files)), ("class",))
        self.files = files

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return f"image {index}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="parquet:../shared/data/cifar10")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(arguments.data, "test")
    small = [source.read(i) for i in range(arguments.images)]
    large = [photograph(source.decode(i), i) for i in range(arguments.images)]
    size, repeats = arguments.size, arguments.repeats
    results = [
        compare(f"train {size} from 500 x 375", training(large, size, 0), repeats),
        compare(f"train {size} from 500 x 375, RandAugment(2)", training(large, size, 2), repeats),
        compare(f"evaluate {size} from 500 x 375", evaluation(large, size), repeats),
        compare(f"train {size} from 32 x 32", training(small, size, 0), repeats),
        compare("train 32 from 32 x 32, padded crop", padded(small), repeats),
    ]
    machine = {"cpu": device_name(torch.device("cpu")), "threads": 1, "torch": torch.__version__}
    command = " ".join(["python", *sys.argv])
    written = {"date": str(datetime.date.today()), "machine": machine, "command": command, "images": arguments.images}
    written |= {"bytes_per_photograph": round(statistics.mean(map(len, large)))}
    write_json(arguments.out, {**written, "results": results, "parts_ms": parts(large, size)})


def photograph(pixels: np.ndarray, seed: int) -> bytes:
    """A small photograph at 500 x 375; enlarging leaves it smooth, so noise stands for detail."""
    large = np.asarray(Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
    large += np.random.default_rng(seed).standard_normal((375, 500, 1), np.float32) * 8
    stream = io.BytesIO()
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def training(files: list[bytes], size: int, randaugment: int) -> dict[str, Callable[[], object]]:
    config = DataConfig(
        image_size=size, in_channels=3, batch_size=len(files), crop="inception", randaugment_ops=randaugment
    )
    after: list = [v2.RandomHorizontalFlip()] + ([v2.RandAugment(randaugment, 10)] if randaugment else [])

    def crop(antialias: bool) -> v2.Compose:
        return v2.Compose([v2.RandomResizedCrop(size, scale=(0.05, 1), antialias=antialias), *after])

    return {
        "ours": counted(TrainBatches(Encoded(files), config, 0, 0, 1)),
        "torchvision": functools.partial(tensors, files, crop(True)),
        "torchvision, not antialiased": functools.partial(tensors, files, crop(False)),
        "torchvision, Pillow": functools.partial(pillow, files, crop(True)),
    }


def evaluation(files: list[bytes], size: int) -> dict[str, Callable[[], object]]:
    config = DataConfig(image_size=size, in_channels=3, eval_batch_size=len(files), cache_mb=0)
    batches = EvalBatches(Encoded(files), config, 0, 1)
    resizes = {antialias: v2.Resize((size, size), antialias=antialias) for antialias in (True, False)}
    return {
        "ours": functools.partial(batches.make, 0),
        "torchvision": functools.partial(tensors, files, resizes[True]),
        "torchvision, not antialiased": functools.partial(tensors, files, resizes[False]),
        "torchvision, Pillow with draft": functools.partial(pillow, files, resizes[True], draft=size),
    }


def padded(files: list[bytes]) -> dict[str, Callable[[], object]]:
    config = DataConfig(image_size=32, in_channels=3, batch_size=len(files), crop="pad", crop_padding=4)
    change = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    uncached = DataConfig(**{**vars(config), "cache_mb": 0})
    return {
        "ours": counted(TrainBatches(Encoded(files), uncached, 0, 0, 1)),
        "torchvision": functools.partial(tensors, files, change),
        "torchvision, Pillow": functools.partial(pillow, files, change),
        "ours, decoded once and kept": counted(TrainBatches(Encoded(files), config, 0, 0, 1)),
    }


def counted(batches: TrainBatches) -> Callable[[], object]:
    """Batch after batch: every call draws anew."""
    numbers = iter(range(10**9))
    return lambda: batches.make(next(numbers))


def tensors(files: list[bytes], change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    encoded = (torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files)
    return normalised([change(decode_jpeg(file, mode=ImageReadMode.RGB)) for file in encoded])


def pillow(files: list[bytes], change: Callable[[Image.Image], Image.Image], draft: int | None = None) -> torch.Tensor:
    """draft: libjpeg decodes at a half, a quarter or an eighth where that is at least this size."""
    images = []
    for file in files:
        image = Image.open(io.BytesIO(file))
        if draft is not None:
            image.draft("RGB", (draft, draft))
        images.append(v2.functional.pil_to_tensor(change(image.convert("RGB"))))
    return normalised(images)


def normalised(images: list[torch.Tensor]) -> torch.Tensor:
    batch = v2.functional.to_dtype(torch.stack(images), torch.float32, scale=True)
    return v2.functional.normalize(batch, [0.5] * 3, [0.5] * 3, inplace=True)


def compare(title: str, ways: dict[str, Callable[[], object]], repeats: int) -> dict:
    made: object = ways["ours"]()
    count = len(made.images)  # type: ignore[attr-defined]
    timing = take_turns([functools.partial(forget, way) for way in ways.values()], rounds=repeats)
    rates = {name: round(count / seconds, 1) for name, seconds in zip(ways, timing.seconds, strict=True)}
    best = max(rate for name, rate in rates.items() if not name.startswith("ours"))
    row = {"what": title, "images_per_second": rates, "ratio": round(rates["ours"] / best, 3)}
    print(row, flush=True)
    return row


def forget(way: Callable[[], object]) -> None:
    way()


def parts(files: list[bytes], size: int) -> dict[str, float]:
    """Milliseconds per image of every step of training on photographs, medians."""
    decoded = [decode_image(file) for file in files]
    boxes = [inception_crop(np.random.default_rng(i), *image.shape[:2]) for i, image in enumerate(decoded)]
    crops = [image[t : t + h, left : left + w] for image, (t, left, h, w) in zip(decoded, boxes, strict=True)]
    batch = np.stack([resize_bilinear(crop, size, size) for crop in crops])
    assert (to_uint8(to_model(batch)).movedim(-3, -1).numpy() == batch).all()
    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_image(file) for file in files],
        "draw the crop": lambda: [inception_crop(np.random.default_rng(i), 375, 500) for i in range(len(files))],
        "resize and mirror": lambda: [resize_bilinear(crop, size, size, mirrored=True) for crop in crops],
        "to float32 in [-1, 1]": lambda: to_model(batch),
    }
    found = {}
    for name, step in steps.items():
        times = []
        for _ in range(7):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        found[name] = round(statistics.median(times[1:]) / len(files) * 1e3, 4)
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
