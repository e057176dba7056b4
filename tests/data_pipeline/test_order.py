"""Orders that read few pieces at a time: still a permutation per epoch, and every process reads pieces of its own."""

import numpy as np
import pytest

from visionmoe.data import DataConfig
from visionmoe.data.batches import TrainBatches
from visionmoe.data.order import PHASES, Pieces, epoch_order, lanes
from visionmoe.data.randomness import permutation
from visionmoe.data.sources import Slice, Source


def pieces_of(sizes: list[int], at_once: int = 256) -> Pieces:
    return Pieces(np.cumsum([0, *sizes]), at_once)


class Pieced(Source):
    """Image i has label i; `opened` collects the pieces of those that were read, batch by batch."""

    def __init__(self, sizes: list[int], at_once: int = 256):
        super().__init__(np.arange(sum(sizes)), ("image",), pieces_of(sizes, at_once))
        self.opened: list[set[int]] = [set()]

    def read(self, index: int) -> np.ndarray:
        assert self.pieces
        self.opened[-1].add(int(np.searchsorted(self.pieces.starts, index, side="right")) - 1)
        return np.zeros((4, 4), np.uint8)

    def name(self, index: int) -> str:
        return f"image {index}"

    def batch_done(self) -> None:
        self.opened.append(set())


def config(batch_size: int) -> DataConfig:
    return DataConfig(image_size=4, batch_size=batch_size, crop="resize", flip=False, cache_mb=0)


@pytest.mark.parametrize("sizes", [[1], [7, 0, 3], [5] * 9, [1, 40, 3, 3, 2] * 13])
@pytest.mark.parametrize("batch_size", [1, 6, 16, 1000])
def test_every_epoch_is_a_permutation(sizes: list[int], batch_size: int) -> None:
    pieces, size = pieces_of(sizes), sum(sizes)
    orders = [epoch_order(3, epoch, size, batch_size, pieces) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size > 20:
        assert len({order.tobytes() for order in orders}) == 3
        np.testing.assert_array_equal(orders[2], epoch_order(3, 2, size, batch_size, pieces))
        assert epoch_order(4, 2, size, batch_size, pieces).tolist() != orders[2].tolist()


def test_without_pieces_any_image_may_follow_any_other() -> None:
    np.testing.assert_array_equal(epoch_order(1, 2, 50, 8), permutation(1, 2, 50))


@pytest.mark.parametrize(
    ("count", "at_once", "batch_size", "expected"),
    [
        (1, 256, 8, (1, 1)),
        (10, 256, 64, (1, 4)),  # two pieces per lane: 5, down to a power of two
        (40, 256, 64, (PHASES, 4)),  # 20 lanes: 5 in each of the 4 phases, down to 4
        (5000, 256, 512, (PHASES, 64)),
        (5000, 256, 24, (PHASES, 16)),  # not more than images in a batch
        (5000, 1, 512, (1, 1)),
    ],
)
def test_number_of_lanes(count: int, at_once: int, batch_size: int, expected: tuple[int, int]) -> None:
    assert lanes(pieces_of([3] * count, at_once), batch_size) == expected


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_processes_read_pieces_of_their_own(world_size: int, workers: int) -> None:
    """5000 pieces of 4: 4 phases of 16 lanes. 32 images x 625 steps are an epoch; every image is read once in it."""
    sizes, steps = [4] * 5000, 625
    phases, per_batch = lanes(pieces_of(sizes), 32)
    assert (phases, per_batch) == (4, 32)
    read = np.zeros(len(sizes), int)
    images: list[int] = []
    for rank in range(world_size):
        for worker in range(workers):
            source = Pieced(sizes)
            batches = TrainBatches(source, config(32), 0, rank, world_size)
            for step in range(worker, steps, workers):
                batch = batches[step]
                assert not isinstance(batch, ValueError)
                images += batch.labels.tolist()
            for piece in set().union(*source.opened):
                read[piece] += 1
            # What this process needs within one round of the phases: a piece per lane, and those just begun.
            rounds = phases // workers
            mine = rounds * per_batch // world_size
            windows = [set().union(*source.opened[i : i + rounds]) for i in range(len(source.opened))]
            assert max(map(len, windows)) <= 2 * mine
    assert sorted(images) == list(range(20000))
    assert read.min() == 1
    assert (read - 1).sum() <= phases * per_batch  # where one lane ends and the next begins, both read the piece


def test_a_batch_has_images_from_all_over() -> None:
    source = Pieced([50] * 200)
    batches = TrainBatches(source, config(64), 0, 0, 1)
    for step in range(20):
        batches[step]
        assert len(source.opened[step]) >= 16  # lanes(): 200 pieces are 100 lanes, 25 per phase, down to 16


def test_a_slice_keeps_the_pieces_of_its_images() -> None:
    source = Pieced([3, 4, 0, 5])
    part = Slice(source, np.array([1, 2, 8, 9, 11]))  # of the pieces 0-2, 3-6 and 7-11
    assert part.pieces and part.pieces.starts.tolist() == [0, 2, 5]
    batches = TrainBatches(part, config(5), 0, 0, 1)
    batch = batches[0]
    assert not isinstance(batch, ValueError) and sorted(batch.labels.tolist()) == [1, 2, 8, 9, 11]
    assert source.opened == [{0, 3}, set()]
