"""Batches by number: what a step or an evaluation reads is a pure function of the config, the seed and the number."""

import mmap
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from visionmoe.data.config import DataConfig
from visionmoe.data.decode import BrokenImageError
from visionmoe.data.order import epoch_order
from visionmoe.data.randaugment import randaugment
from visionmoe.data.randomness import sample_keys, uniform
from visionmoe.data.sources import Source
from visionmoe.data.transforms import evaluation_pixels, inception_crop, pad_crop_flip, resize_bilinear, to_model

_FLIP, _TOP, _LEFT = range(3)  # numbers of the draws of `randomness.uniform`


@dataclass(frozen=True)
class Batch:
    """images (B, C, H, W) float32 in [-1, 1]; labels, indices (B,) int64; broken: (index, reason) found on the way."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    broken: tuple[tuple[int, str], ...] = ()


class TooManyBrokenError(ValueError):
    """More of the images are broken than the config allows."""


class PixelCache:
    """Decoded images of one size, in memory that processes made by fork share. pixels: uint8 (N, H, W, C)."""

    def __init__(self, count: int, shape: tuple[int, int, int]):
        self._arguments = count, shape
        memory = mmap.mmap(-1, count * (1 + int(np.prod(shape))))
        self.filled = np.frombuffer(memory, np.bool_, count)
        self.pixels = np.frombuffer(memory, np.uint8, offset=count).reshape(count, *shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelCache, self._arguments  # a process that gets it pickled starts with its own, empty one


class Batches(Dataset[Batch | ValueError]):
    """What training and evaluation have in common. `self[number]` is a Batch, or the error that stops the run.

    The error is returned, not raised, because a worker process would wrap a raised one in its traceback.
    """

    def __init__(self, source: Source, config: DataConfig, cacheable: bool):
        self.source, self.config = source, config
        self.broken: dict[int, str] = {}
        shape = (*config.image_hw, config.in_channels)
        fits = cacheable and len(source) * int(np.prod(shape)) <= config.cache_mb << 20
        self._cache = PixelCache(len(source), shape) if fits else None

    def __getitem__(self, number: int) -> Batch | ValueError:
        try:
            return self.make(number)
        except ValueError as error:
            return error
        finally:
            self.source.batch_done()

    @abstractmethod
    def make(self, number: int) -> Batch:
        """Builds a batch; raises ValueError when too much is broken."""

    def report(self, index: int, reason: str) -> None:
        """Notes a broken image; raises TooManyBrokenError when there are too many."""
        self.broken[index] = reason
        count, total, allowed = len(self.broken), len(self.source), self.config.max_broken
        if count > allowed * total:
            first, why = next(iter(self.broken.items()))
            raise TooManyBrokenError(
                f"{count} of {total} images are broken, more than {allowed:.1%} (max_broken);"
                f" the first was {self.source.name(first)}: {why}"
            )

    def decode(self, index: int) -> np.ndarray:
        return self.source.decode(index, self.config.in_channels, self.config.max_pixels)

    def cached(self, indices: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """bool (B,): whether the cache now holds these images; those that it lacks are decoded and prepared."""
        assert self._cache is not None
        held = self._cache.filled[indices]
        for place in np.flatnonzero(~held):
            index = int(indices[place])
            try:
                self._cache.pixels[index] = prepare(self.decode(index))
            except BrokenImageError as error:
                self.report(index, str(error))
                continue
            self._cache.filled[index] = held[place] = True
        return held


class TrainBatches(Batches):
    """Batch number `step` of the endless stream of epochs, each a permutation; process `rank` gets its slice of it."""

    def __init__(self, source: Source, config: DataConfig, seed: int, rank: int, world_size: int):
        super().__init__(source, config, cacheable=config.crop != "inception")
        self.seed, self.rank, self.size = seed, rank, config.batch_size // world_size
        self._orders: dict[int, np.ndarray] = {}

    def make(self, number: int) -> Batch:
        known = set(self.broken)
        epochs, indices = self.positions(number)
        keys = sample_keys(self.seed, epochs, indices)
        flips = (uniform(keys, _FLIP) < 0.5) & self.config.flip
        if self._cache:
            used, pixels = self._resized(indices)
            pixels = self._shifted(pixels, keys, flips)
        elif self.config.crop == "inception":
            used, pixels = self._cropped(indices, keys, flips)  # mirroring costs nothing while resizing
        else:
            used, pixels = self._cropped(indices, keys, np.zeros_like(flips))
            pixels = self._shifted(pixels, keys, flips)
        if self.config.randaugment_ops:
            pixels = self._augmented(pixels, keys)
        broken = tuple((index, reason) for index, reason in self.broken.items() if index not in known)
        labels = torch.from_numpy(self.source.labels[used])
        return Batch(to_model(pixels), labels, torch.from_numpy(used), broken)

    def positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices), int64 (B,), of this process's images of a step."""
        start = step * self.config.batch_size + self.rank * self.size
        places = np.arange(start, start + self.size)
        epochs, places = places // len(self.source), places % len(self.source)
        needed = np.unique(epochs)
        self._orders = {int(e): self._orders[e] if e in self._orders else self._order(int(e)) for e in needed}
        indices = np.empty_like(places)
        for epoch in needed:
            here = epochs == epoch
            indices[here] = self._orders[int(epoch)][places[here]]
        return epochs, indices

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.seed, epoch, len(self.source), self.config.batch_size, self.source.pieces)

    def _resized(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images of the cache. A broken one gives way to its next neighbour in the source that is not."""
        assert self._cache is not None
        used = indices.copy()
        wrong = ~self.cached(used, self._resize)
        for _ in range(len(self.source)):
            if not wrong.any():
                return used, self._cache.pixels[used]
            used[wrong] = (used[wrong] + 1) % len(self.source)
            wrong[wrong] = ~self.cached(used[wrong], self._resize)
        raise TooManyBrokenError(f"all {len(self.source)} images are broken")

    def _cropped(self, indices: np.ndarray, keys: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `_resized`, image by image, some mirrored: for random crops, or more images than are kept."""
        used = indices.copy()
        pixels = np.empty((len(indices), *self.config.image_hw, self.config.in_channels), np.uint8)
        for place, (key, flip) in enumerate(zip(keys.tolist(), flips.tolist(), strict=True)):
            for _ in range(len(self.source)):
                try:
                    pixels[place] = self._resize(self.decode(int(used[place])), key, flip)
                    break
                except BrokenImageError as error:
                    self.report(int(used[place]), str(error))
                    used[place] = (used[place] + 1) % len(self.source)
            else:
                raise TooManyBrokenError(f"all {len(self.source)} images are broken")
        return used, pixels

    def _resize(self, image: np.ndarray, key: int = 0, mirrored: bool = False) -> np.ndarray:
        if self.config.crop == "inception":
            rng = np.random.default_rng(key)
            top, left, height, width = inception_crop(rng, image.shape[0], image.shape[1], self.config.crop_area_min)
            image = image[top : top + height, left : left + width]
        return resize_bilinear(image, *self.config.image_hw, mirrored=mirrored)

    def _shifted(self, pixels: np.ndarray, keys: np.ndarray, flips: np.ndarray) -> np.ndarray:
        padding = self.config.crop_padding if self.config.crop == "pad" else 0
        places = 2 * padding + 1
        tops = (uniform(keys, _TOP) * places).astype(np.int64)
        lefts = (uniform(keys, _LEFT) * places).astype(np.int64)
        return pad_crop_flip(pixels, padding, tops, lefts, flips)

    def _augmented(self, pixels: np.ndarray, keys: np.ndarray) -> np.ndarray:
        config = self.config
        # A second stream per image, so that the crop does not change with the operations.
        rngs = (np.random.default_rng([int(key), 1]) for key in keys)
        images = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 1)  # (B, H, W, C) -> (B, C, H, W)
        images = torch.stack(
            [
                randaugment(image, config.randaugment_ops, config.randaugment_magnitude, rng)
                for image, rng in zip(images, rngs, strict=True)
            ]
        )
        return images.movedim(1, -1).numpy()


class EvalBatches(Batches):
    """Every image once, in order; broken ones are left out. Process `rank` gets every world_size-th image."""

    def __init__(self, source: Source, config: DataConfig, rank: int, world_size: int):
        super().__init__(source, config, cacheable=config.eval_resize is None)
        self.indices = np.arange(rank, len(source), world_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.config.eval_batch_size)

    def make(self, number: int) -> Batch:
        known = set(self.broken)
        size = self.config.eval_batch_size
        indices = self.indices[number * size : (number + 1) * size]
        if self._cache:
            indices = indices[self.cached(indices, self._prepare)]
            pixels = self._cache.pixels[indices]
        else:
            indices, pixels = self._prepared(indices)
        broken = tuple((index, reason) for index, reason in self.broken.items() if index not in known)
        labels = torch.from_numpy(self.source.labels[indices])
        return Batch(to_model(pixels), labels, torch.from_numpy(indices), broken)

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        return evaluation_pixels(image, self.config.image_hw, self.config.eval_resize)

    def _prepared(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept, images = [], []
        for index in indices:
            try:
                images.append(self._prepare(self.decode(int(index))))
                kept.append(index)
            except BrokenImageError as error:
                self.report(int(index), str(error))
        if not images:
            return indices[:0], np.empty((0, *self.config.image_hw, self.config.in_channels), np.uint8)
        return np.array(kept), np.stack(images)
