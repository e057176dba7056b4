"""Random numbers that follow from (seed, epoch, index) alone, whichever process asks, and in whatever order."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_keys(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """One 64-bit key, uint64 (B,), per image of a batch. seed >= 0; epochs, indices: int (B,)."""
    keys = _scramble(np.full(len(indices), seed, np.uint64))
    keys = _scramble(keys ^ epochs.astype(np.uint64))
    return _scramble(keys ^ indices.astype(np.uint64))


def uniform(keys: np.ndarray, draw: int) -> np.ndarray:
    """Draw number `draw` of every key: float64 (B,) in [0, 1)."""
    bits = _scramble(keys + np.uint64(draw * int(_GOLDEN) % 2**64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: int64 (size,)."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def shuffled_indices(seed: int, number: int, indices: np.ndarray, size: int) -> np.ndarray:
    """Where permutation `number` of 0 .. size-1 sends `indices`: int64 (B,). No memory grows with `size`.

    Four rounds of a Feistel network over the next power of four, walked until the value lies below `size`.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for step in range(4):
            keys = sample_keys(seed, np.full(len(right), 4 * number + step), right)
            left, right = right, left ^ (keys & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele et al., 2014), on uint64 (B,)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
