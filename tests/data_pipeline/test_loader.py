"""Loaders: the same bytes for any number of workers, from any step, and what they do about broken images."""

import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionmoe.config import from_dict, to_dict
from visionmoe.data import DataConfig, EvalLoader, TrainLoader, open_source
from visionmoe.data.batches import Batch, TrainBatches
from visionmoe.data.randomness import sample_keys, uniform
from visionmoe.data.sources import ArraySource, Source
from visionmoe.data.transforms import inception_crop, resize_bilinear, to_model

# This machine has two cores: torch warns of more workers than that.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class NumberedImages(Source):
    """Image i is all i (its label too); images in `broken` cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        super().__init__(np.arange(count), tuple(str(i) for i in range(count)))
        self.bad = broken

    def read(self, index: int) -> bytes | np.ndarray:
        return b"broken" if index in self.bad else np.full((8, 8), index, np.uint8)

    def name(self, index: int) -> str:
        return f"image {index}"


def noise(count: int, size: int = 12) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return ArraySource(images, np.arange(count) % 10, tuple("abcdefghij"))


def first(loader: TrainLoader, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(itertools.islice(loader, count))


SMALL = DataConfig(image_size=8, batch_size=6, crop="resize", flip=False)
AUGMENTATIONS = {
    "pad": DataConfig(image_size=12, in_channels=3, batch_size=8, crop="pad", crop_padding=2),
    "pad-randaugment": DataConfig(image_size=12, in_channels=3, batch_size=8, randaugment_ops=2),
    "inception": DataConfig(image_size=10, in_channels=3, batch_size=8, crop="inception"),
    "inception-randaugment": DataConfig(
        image_size=10, in_channels=1, batch_size=8, crop="inception", randaugment_ops=2
    ),
    "resize-uncached": DataConfig(image_size=10, in_channels=3, batch_size=8, crop="resize", cache_mb=0),
}


@pytest.mark.parametrize("config", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_same_bytes_for_any_workers_and_from_any_step(config: DataConfig) -> None:
    source = noise(20)
    steps = 7  # 56 images: nearly three epochs
    expected = first(TrainLoader(config, seed=3, source=source), steps)
    for images, labels in expected:
        assert images.shape == (8, config.in_channels, *config.image_hw) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and images.min() >= -1 and images.max() <= 1
    for workers, start in ((1, 0), (2, 0), (4, 3), (0, 5)):
        torch.manual_seed(workers)  # must not matter
        other = dataclasses.replace(config, workers=workers)
        found = first(TrainLoader(other, seed=3, start_step=start, source=source), steps - start)
        for (images, labels), (want, want_labels) in zip(found, expected[start:], strict=True):
            assert torch.equal(images, want) and torch.equal(labels, want_labels)


def test_random_crops_against_one_image_at_a_time() -> None:
    """Crop drawn from the image's key, resized, then mirrored where the key's first draw is below a half."""
    source, config = noise(20), AUGMENTATIONS["inception"]
    batches = TrainBatches(source, config, 3, 0, 1)
    images = batches.make(4).images
    epochs, indices = batches.positions(4)
    keys = sample_keys(3, epochs, indices)
    flips = uniform(keys, 0) < 0.5
    assert 0 < flips.sum() < len(flips)
    for made, index, key, flip in zip(images, indices, keys, flips, strict=True):
        whole = source.decode(int(index))
        top, left, height, width = inception_crop(np.random.default_rng(int(key)), *whole.shape[:2])
        pixels = resize_bilinear(whole[top : top + height, left : left + width], 10, 10)
        assert torch.equal(made, to_model(pixels[:, ::-1] if flip else pixels))


def test_the_cache_changes_nothing() -> None:
    source = noise(20)
    config = AUGMENTATIONS["pad"]
    for images, want in zip(
        first(TrainLoader(config, 0, source=source), 8),
        first(TrainLoader(dataclasses.replace(config, cache_mb=0), 0, source=source), 8),
        strict=True,
    ):
        assert torch.equal(images[0], want[0])


def test_loading_leaves_the_global_random_state_alone() -> None:
    for workers in (0, 1):
        config = dataclasses.replace(AUGMENTATIONS["pad-randaugment"], workers=workers)
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        first(TrainLoader(config, 0, source=noise(20)), 3)
        assert torch.equal(torch.get_rng_state(), torch_state)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_epochs_are_permutations() -> None:
    loader = TrainLoader(SMALL, seed=0, source=NumberedImages(20))
    seen = torch.cat([labels for _, labels in first(loader, 10)]).tolist()  # 60 images: batches straddle the epochs
    epochs = [seen[:20], seen[20:40], seen[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    other = torch.cat(
        [labels for _, labels in first(TrainLoader(SMALL, seed=1, source=NumberedImages(20)), 10)]
    ).tolist()
    assert other != seen


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    config = dataclasses.replace(SMALL, batch_size=10)
    ((_, labels),) = first(TrainLoader(config, 0, source=NumberedImages(4)), 1)
    assert sorted(labels[:4].tolist()) == sorted(labels[4:8].tolist()) == [0, 1, 2, 3]


def test_an_image_is_augmented_differently_in_every_epoch() -> None:
    config = dataclasses.replace(AUGMENTATIONS["pad"], batch_size=1)
    variants = {images.numpy().tobytes() for images, _ in first(TrainLoader(config, 0, source=noise(1)), 40)}
    assert len(variants) > 20  # of 2 * 5 * 5


def test_images_and_labels_stay_together() -> None:
    for images, labels in first(TrainLoader(SMALL, 0, source=NumberedImages(50)), 10):
        assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), labels)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_get_slices_of_the_batch(world_size: int) -> None:
    source, config = noise(20), dataclasses.replace(AUGMENTATIONS["inception"], batch_size=6)
    whole = first(TrainLoader(config, 0, source=source), 5)
    parts = [first(TrainLoader(config, 0, rank=r, world_size=world_size, source=source), 5) for r in range(world_size)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)


def test_wrong_arguments() -> None:
    source = NumberedImages(20)
    with pytest.raises(ValueError, match="batch_size must be a multiple of world_size 4, got 6"):
        TrainLoader(SMALL, 0, world_size=4, source=source)
    with pytest.raises(ValueError, match="rank must be between 0 and world_size - 1, got 2 of 2"):
        TrainLoader(SMALL, 0, rank=2, world_size=2, source=source)
    with pytest.raises(ValueError, match="seed and start_step must be >= 0, got -1 and 0"):
        TrainLoader(SMALL, -1, source=source)


def test_random_numbers_are_uniform_and_independent() -> None:
    epochs, indices = np.divmod(np.arange(100_000), 1000)
    keys = sample_keys(7, epochs, indices)
    assert len(np.unique(keys)) == len(keys)
    draws = np.stack([uniform(keys, draw) for draw in range(3)])
    # The mean of 100,000 uniform numbers has a standard deviation of 0.29 / sqrt(100,000) = 0.0009.
    np.testing.assert_allclose(draws.mean(1), 0.5, atol=0.005)
    np.testing.assert_allclose(np.corrcoef(draws), np.eye(3), atol=0.02)
    assert abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 0.02


def test_batches_can_be_sent_to_another_process() -> None:
    made = TrainLoader(AUGMENTATIONS["pad"], 0, source=noise(20))._batches  # as start methods other than fork do
    expected, found = made[3], pickle.loads(pickle.dumps(made))[3]
    assert isinstance(expected, Batch) and isinstance(found, Batch) and torch.equal(expected.images, found.images)


# Evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_order(workers: int) -> None:
    config = dataclasses.replace(SMALL, eval_batch_size=8, workers=workers)
    loader = EvalLoader(config, source=NumberedImages(21))
    assert len(loader) == 3
    for _ in range(2):  # can be run again
        batches = list(loader)
        assert [len(images) for images, _, _ in batches] == [8, 8, 5]
        for place in (1, 2):
            assert torch.cat([batch[place] for batch in batches]).tolist() == list(range(21))


def test_evaluation_slices_are_disjoint() -> None:
    parts = [EvalLoader(SMALL, rank=r, world_size=3, source=NumberedImages(20)) for r in range(3)]
    seen = [int(i) for part in parts for _, _, indices in part for i in indices]
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_whole_batches_of_an_evaluation(workers: int) -> None:
    config = dataclasses.replace(SMALL, eval_batch_size=4, workers=workers, max_broken=0.5)
    loader = EvalLoader(config, source=NumberedImages(22, broken=(8, 9, 10, 11)))
    # batches 0: 0-3, 1: 4-7, 2: 8-11 (broken), 3: 12-15, 4: 16-19, 5: 20-21
    whole = [indices.tolist() for _, _, indices in loader]
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [12, 13, 14, 15], [16, 17, 18, 19], [20, 21]]
    parts = [[indices.tolist() for _, _, indices in loader.batches(rank, 3)] for rank in range(3)]
    assert parts == [[whole[0], whole[2]], [whole[1], whole[3]], [whole[4]]]
    assert [labels.tolist() for _, labels, _ in loader.batches(4, 2)] == [[16, 17, 18, 19]]
    assert [labels.tolist() for _, labels, _ in loader.batches(9, 2)] == []


@pytest.mark.parametrize(("start", "step"), [(-1, 1), (0, 0), (0, -1)])
def test_batches_that_cannot_be(start: int, step: int) -> None:
    with pytest.raises(ValueError, match=f"start must be >= 0 and step >= 1, got {start} and {step}"):
        next(EvalLoader(SMALL, source=NumberedImages(4)).batches(start, step))


def test_evaluation_ignores_the_training_augmentation() -> None:
    source = noise(5)
    config = dataclasses.replace(AUGMENTATIONS["inception-randaugment"], image_size=12, in_channels=3)
    ((images, _, _),) = list(EvalLoader(config, source=source))
    np.testing.assert_array_equal(((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy(), source.images)


def test_evaluation_with_resize_small() -> None:
    config = DataConfig(image_size=8, in_channels=3, eval_resize=10)
    ((images, _, _),) = list(EvalLoader(config, source=noise(5)))
    assert images.shape == (5, 3, 8, 8)


# Broken images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["resize", "inception"])
def test_broken_images_are_replaced_in_training(workers: int, crop: str, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(SMALL, workers=workers, crop=crop, max_broken=0.2)
    loader = TrainLoader(config, 0, source=NumberedImages(20, broken=(7, 8, 19)))
    plain = first(TrainLoader(dataclasses.replace(config, workers=0), 0, source=NumberedImages(20)), 10)
    for (images, labels), (_, wanted) in zip(first(loader, 10), plain, strict=True):
        replaced = [{7: 9, 8: 9, 19: 0}.get(i, i) for i in wanted.tolist()]  # the next that is not broken
        assert labels.tolist() == replaced
        assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), labels)
    assert loader.broken == dict.fromkeys(("image 7", "image 8", "image 19"), "not an image in a known format")
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(lines) == sorted(f"skipped a broken image, {n}: {r}" for n, r in loader.broken.items())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 10])
def test_broken_images_are_left_out_in_evaluation(workers: int, cache_mb: int) -> None:
    config = dataclasses.replace(SMALL, eval_batch_size=4, workers=workers, cache_mb=cache_mb, max_broken=0.5)
    loader = EvalLoader(config, source=NumberedImages(14, broken=(2, 4, 5, 6, 7)))
    assert torch.cat([indices for _, _, indices in loader]).tolist() == [0, 1, 3, 8, 9, 10, 11, 12, 13]
    assert list(loader.broken) == ["image 2", "image 4", "image 5", "image 6", "image 7"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["resize", "inception"])
def test_too_many_broken_images_stop_with_one_line(workers: int, crop: str) -> None:
    config = dataclasses.replace(SMALL, workers=workers, crop=crop)
    source = NumberedImages(200, broken=(50, 60, 70))  # 1.5 %
    for loader in (TrainLoader(config, 0, source=source), EvalLoader(config, source=source)):
        message = r"^3 of 200 images are broken, more than 1\.0% \(max_broken\); the first was image \d0: not an image"
        with pytest.raises(ValueError, match=message) as error:
            for _ in zip(loader, range(100), strict=False):
                pass
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("crop", ["resize", "inception"])
def test_all_images_broken_although_allowed(crop: str) -> None:
    config = dataclasses.replace(SMALL, crop=crop, max_broken=1.0)
    with pytest.raises(ValueError, match="all 5 images are broken"):
        first(TrainLoader(config, 0, source=NumberedImages(5, broken=(0, 1, 2, 3, 4))), 1)


def test_broken_files_in_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(60):
            image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
            image.save(tmp_path / label / f"{number:02d}.jpg")
    cut = tmp_path / "a" / "30.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    config = DataConfig(f"folder:{tmp_path}", eval_split="train", image_size=16, in_channels=3, batch_size=10)
    train, test = TrainLoader(config, 0), EvalLoader(config)
    assert all(images.shape == (10, 3, 16, 16) for images, _ in first(train, 12))  # one epoch
    assert sum(len(images) for images, _, _ in test) == 119
    assert list(train.broken) == list(test.broken) == [str(cut)]
    (tmp_path / "b" / "07.jpg").unlink()  # vanishes during the run: 2 of 120
    with pytest.raises(ValueError, match="2 of 120 images are broken"):
        list(EvalLoader(config, source=test.source))


# Processes


LOOP = """
import itertools, signal, time
from visionmoe.data import DataConfig, TrainLoader
asked = []
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda number, frame: asked.append(number))
batches = iter(TrainLoader(DataConfig(workers=2), 0))
next(batches)
print("ready", flush=True)
while not asked:
    next(batches)
    time.sleep(0.01)
if asked[0] == signal.SIGINT:  # the workers are still there: the run can end what it has begun
    assert len(list(itertools.islice(batches, 20))) == 20
print("saved", flush=True)
"""


def start_loop() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def children(pid: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, f"workers {pids} did not leave"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_leave_time_to_save(kind: signal.Signals) -> None:
    process = start_loop()
    workers = children(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, kind)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "saved\n")
    wait_until_gone(workers)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_run() -> None:
    process = start_loop()
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=100)
    wait_until_gone(workers)


def test_a_dead_worker_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    source, config = NumberedImages(20), dataclasses.replace(SMALL, workers=2)
    before = set(children(os.getpid()))
    batches = iter(TrainLoader(config, 0, source=source))
    found = [next(batches), next(batches)]  # one of each worker: both have started and handle signals
    for worker in set(children(os.getpid())) - before:
        os.kill(worker, signal.SIGTERM)
    found += list(itertools.islice(batches, 10))
    expected = first(TrainLoader(SMALL, 0, source=source), 12)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))
    assert "the main process goes on alone" in caplog.text


def test_workers_leave_with_the_iterator() -> None:
    before = set(children(os.getpid()))
    batches = iter(TrainLoader(dataclasses.replace(SMALL, workers=2), 0, source=NumberedImages(20)))
    next(batches)
    workers = set(children(os.getpid())) - before
    assert len(workers) == 2
    batches.close()  # type: ignore[attr-defined]
    wait_until_gone(list(workers))


# The config


def test_config_survives_json() -> None:
    config = DataConfig(image_size=(8, 12), crop="inception", mixup_alpha=0.2)
    assert from_dict(DataConfig, to_dict(config)) == config and config.image_hw == (8, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random"}, "crop must be one of inception, pad, resize, got 'random'"),
        ({"in_channels": 4}, r"in_channels must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ({"image_size": 0}, "image_size must be between 1 and 65535, got 0"),
        ({"batch_size": 0}, "batch_size must be between 1 and"),
        ({"workers": -1}, "workers must be between 0 and"),
        ({"crop_area_min": 1.5}, "crop_area_min must be between 1e-06 and 1, got 1.5"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha must be between 0 and"),
        ({"eval_resize": 20}, "eval_resize must be at least image_size 28, got 20"),
        ({"max_pixels": 10**10}, "max_pixels must be between 1 and 178956970"),
    ],
)
def test_config_mistakes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_rectangular_images() -> None:
    config = DataConfig(image_size=(8, 16), in_channels=3, batch_size=4)
    assert first(TrainLoader(config, 0, source=noise(5)), 1)[0][0].shape == (4, 3, 8, 16)


def test_fast_enough_for_small_models() -> None:
    loader = TrainLoader(DataConfig(), 0, source=open_source("fashion-mnist"))
    batches = iter(loader)
    first_epoch = int(loader.steps_per_epoch) + 1
    for _ in range(first_epoch):
        next(batches)
    start = time.process_time()
    for _ in range(40):
        next(batches)
    rate = 40 * 256 / (time.process_time() - start)
    assert rate > 8000, f"{rate:.0f} images/s"
