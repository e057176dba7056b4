"""The order of an epoch: a permutation of all images that follows from (seed, epoch, batch size) alone.

Images of shards and row groups are cheap only together, so an epoch of them reads a few at a time: the epoch's places
are dealt to lanes, and every lane reads one piece after the other. A lane owns the same part of every batch (of every
PHASES-th batch), so processes and their workers, which take parts of batches and every n-th batch, read other pieces.
"""

from dataclasses import dataclass

import numpy as np

from visionmoe.data.randomness import permutation

PHASES = 4
"""Batches until a lane is read again: up to so many workers of a process share no piece."""


@dataclass(frozen=True)
class Pieces:
    """Which images lie together. starts: int64 (P + 1,), the first image of every piece, and the number of images.

    at_once: how many pieces all processes together may read at a time.
    """

    starts: np.ndarray
    at_once: int

    def taking(self, indices: np.ndarray) -> "Pieces":
        """The pieces of some of the images, which are numbered anew. indices: ascending, int64 (N,)."""
        return Pieces(np.unique(np.searchsorted(indices, self.starts)), self.at_once)


def lanes(pieces: Pieces, batch_size: int) -> tuple[int, int]:
    """(batches until a lane comes again, lanes per batch). At least two pieces per lane: neighbours share one."""
    total = max(1, min(pieces.at_once, (len(pieces.starts) - 1) // 2))
    phases = PHASES if total >= 4 * PHASES else 1
    per_batch = min(batch_size, total // phases)
    return phases, 1 << per_batch.bit_length() - 1  # a power of two: processes then take whole lanes


def epoch_order(seed: int, epoch: int, size: int, batch_size: int, pieces: Pieces | None = None) -> np.ndarray:
    """The images of an epoch in their order: int64 (size,). Without pieces, every permutation is as likely.

    With pieces, these are shuffled, and the images within each; the sequence is cut into one part per lane.
    """
    if pieces is None:
        return permutation(seed, epoch, size)
    rng = np.random.default_rng([seed, epoch])
    starts, sizes = pieces.starts[:-1], np.diff(pieces.starts)
    sequence = np.concatenate([starts[p] + rng.permutation(sizes[p]) for p in rng.permutation(len(sizes))])
    phases, per_batch = lanes(pieces, batch_size)
    places = np.arange(epoch * size, (epoch + 1) * size)  # among all images of all epochs
    lane = places // batch_size % phases * per_batch + places % batch_size * per_batch // batch_size
    order = np.empty_like(sequence)
    order[np.argsort(lane.astype(np.uint16), kind="stable")] = sequence
    return order
