"""Loaders: batches in order, made here or by worker processes, and the account of broken images."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visionmoe.data.batches import Batch, Batches, EvalBatches, TrainBatches
from visionmoe.data.config import DataConfig
from visionmoe.data.sources import Source, open_source
from visionmoe.distributed.world import current, gather
from visionmoe.files import one_line

_log = logging.getLogger(__name__)


class _Loader:
    """The part that does not depend on what a batch is. broken: name of a broken image -> what is wrong with it."""

    def __init__(self, batches: Batches):
        self._batches = batches
        self.source, self.config = batches.source, batches.config
        self.broken: dict[str, str] = {}

    @property
    def num_images(self) -> int:
        return len(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    def _run(self, numbers: range) -> Iterator[Batch]:
        """The batches of these numbers. Worker processes live as long as the iterator does."""
        for made in self._made(numbers):
            if isinstance(made, ValueError):
                raise made
            for index, reason in made.broken:
                self._note(index, reason)  # what workers find must also count here, together
            yield made

    def _note(self, index: int, reason: str, say: bool = True) -> None:
        name = self.source.name(index)
        if name not in self.broken:
            self.broken[name] = reason
            if say:
                _log.warning("skipped a broken image, %s: %s", name, reason)
        self._batches.report(index, reason)

    def _made(self, numbers: range) -> Iterator[Batch | ValueError]:
        if self.config.workers:
            made = 0
            try:
                for batch in self._made_by_workers(numbers):
                    yield batch
                    made += 1
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A batch is a function of its number, so nothing is lost. When the cause is not a dead worker but the
                # batch itself, making it here shows the true error.
                _log.warning("worker processes failed, the main process goes on alone: %s", one_line(error))
            numbers = numbers[made:]
        yield from map(self._batches.__getitem__, numbers)

    def _made_by_workers(self, numbers: range) -> Iterator[Batch | ValueError]:
        return iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=numbers,
                num_workers=self.config.workers,
                collate_fn=_unchanged,
                worker_init_fn=_quiet_signals,
                # Its own, because a DataLoader draws a number, and the global one's state must not depend on workers.
                generator=torch.Generator(),
            )
        )


class TrainLoader(_Loader):
    """Yields (images (B, C, H, W) float32 in [-1, 1], labels (B,) int64) for steps start_step, start_step + 1, ...

    It has no end. Order and augmentation of a step follow from (seed, step) alone, for any number of workers. An epoch
    is a permutation of all images; a batch may hold the end of one and the beginning of the next. A broken image is
    replaced by the next image of the source that is not; more than config.max_broken of them raise ValueError.
    rank, world_size: of the processes that share every batch; each yields its slice of batch_size / world_size images.
    Mixup is not done here: see `mixup.mixup`. Every `iter()` begins at start_step.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        start_step: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        source: Source | None = None,
    ):
        _check_ranks(rank, world_size)
        if seed < 0 or start_step < 0:
            raise ValueError(f"seed and start_step must be >= 0, got {seed} and {start_step}")
        if config.batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, got {config.batch_size}")
        source = source or open_source(config.source, config.train_split)
        super().__init__(TrainBatches(source, config, seed, rank, world_size))
        self.start_step = start_step

    @property
    def steps_per_epoch(self) -> float:
        return len(self.source) / self.config.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._run(range(self.start_step, sys.maxsize)):
            yield batch.images, batch.labels


class EvalLoader(_Loader):
    """Yields (images (B, C, H, W) float32 in [-1, 1], labels (B,), indices (B,) int64), every image once and in order.

    The last batch may be smaller, and so are batches with broken images, which are left out; more than
    config.max_broken of them raise ValueError. Process `rank` of world_size reads images rank, rank + world_size, ...
    """

    def __init__(self, config: DataConfig, *, rank: int = 0, world_size: int = 1, source: Source | None = None):
        _check_ranks(rank, world_size)
        batches = EvalBatches(source or open_source(config.source, config.eval_split), config, rank, world_size)
        super().__init__(batches)
        self._count = len(batches)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.batches()

    def batches(self, start: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As iterating, but only batches number start, start + step, ...: so processes can share whole batches.

        Every process notes the broken images of its own batches alone. Raises ValueError for start < 0 or step < 1.
        """
        if start < 0 or step < 1:
            raise ValueError(f"start must be >= 0 and step >= 1, got {start} and {step}")
        for batch in self._run(range(start, self._count, step)):
            if len(batch.images):
                yield batch.images, batch.labels, batch.indices

    def merge_broken(self) -> None:
        """Every process gets the broken images that the others met, too. Collective; raises as iterating."""
        if current().size == 1:
            return
        found = {index: reason for part in gather(self._batches.broken) for index, reason in part.items()}
        self._batches.broken.clear()
        self.broken, known = {}, self.broken
        for index in sorted(found):  # as one process meets them
            self._note(index, found[index], say=self.source.name(index) not in known)


def _check_ranks(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and world_size - 1, got {rank} of {world_size}")


def _unchanged(batch: Any) -> Any:
    return batch


def _quiet_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM often reach a whole process group; the main process decides what they mean.

    Workers outlive Ctrl-C, so that the main process can end its step and save. On SIGTERM they leave with exit code 0,
    which keeps torch from raising an error in the main process at an arbitrary place.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
