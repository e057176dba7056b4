"""Orders of rows and columns that let the structure of a matrix be seen."""

import numpy as np


def seriate(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order of the rows and one of the columns of (rows, columns), such that what belongs together stands together.

    Every column is taken relative to its mean. Columns: the chain in which neighbours are most alike (1 - correlation,
    `shortest_chain`). Rows: by the place of the column that they prefer most, then by the centre of what they prefer.
    Rows and columns without anything come last.
    """
    full_rows, full_columns = np.flatnonzero(shares.any(1)), np.flatnonzero(shares.any(0))
    if not len(full_rows):
        return np.arange(shares.shape[0]), np.arange(shares.shape[1])
    centred = shares[np.ix_(full_rows, full_columns)].astype(np.float64)
    centred -= centred.mean(0)
    order = shortest_chain(_dissimilarity(centred))
    centred = centred[:, order]
    preferred, above = centred.argmax(1), np.maximum(centred, 0)
    centre = above @ np.arange(len(order)) / np.maximum(above.sum(1), 1e-12)
    rows = np.lexsort((centre, preferred))
    return _with_rest(full_rows[rows], shares.shape[0]), _with_rest(full_columns[order], shares.shape[1])


def shortest_chain(distances: np.ndarray) -> np.ndarray:
    """A short open path through all points of symmetric distances (n, n), from the end with the lower number.

    The best nearest-neighbour chain over all starts, improved by reversing parts (2-opt) until no reversal helps.
    """
    chains = [_nearest_chain(distances, start) for start in range(len(distances))]
    lengths = [distances[chain[:-1], chain[1:]].sum() for chain in chains]
    best = _two_opt(chains[int(np.argmin(lengths))], distances)
    return best if best[0] <= best[-1] else best[::-1]


def _nearest_chain(distances: np.ndarray, start: int) -> np.ndarray:
    chain, left = [start], distances.copy()
    for _ in range(len(distances) - 1):
        left[:, chain[-1]] = np.inf
        chain.append(int(left[chain[-1]].argmin()))
    return np.array(chain)


def _two_opt(chain: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Reverses chain[i:j] while that shortens the path; an end of the path is a neighbour at distance 0."""
    count = len(chain)
    padded = np.zeros((count + 1, count + 1))
    padded[:count, :count] = distances
    while True:
        path = np.concatenate([[count], chain, [count]])
        before, after = path[:-1], path[1:]  # edge i: before[i] - after[i]
        old = padded[before, after]
        gain = (old[:, None] + old[None]) - (padded[np.ix_(before, before)] + padded[np.ix_(after, after)])
        gain = np.triu(gain, k=2)
        first, last = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, last] <= 1e-9:
            return chain
        chain = np.concatenate([chain[:first], chain[first:last][::-1], chain[last:]])


def _dissimilarity(centred: np.ndarray) -> np.ndarray:
    """1 - correlation between the columns of (rows, columns) whose means are 0."""
    norms = np.sqrt((centred**2).sum(0))
    unit = centred / np.where(norms > 0, norms, 1)
    return 1 - unit.T @ unit


def _with_rest(order: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([order, np.setdiff1d(np.arange(size), order)]).astype(np.int64)
