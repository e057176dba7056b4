"""Mutual information of two discrete variables from a table of counts, and what chance alone would give."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Information:
    """What one variable (the class, the position) tells of another (the expert). All in bits.

    bits: the plug-in estimate from the counts. shuffled_mean, shuffled_std: the same estimate with the link between the
    variables cut by shuffling, over several shuffles; its mean is the bias of the plug-in estimate, which is never
    negative and grows with the number of cells over the number of independent observations.
    expert_entropy, label_entropy: of the two variables by themselves; the smaller one bounds the information.
    """

    bits: float
    shuffled_mean: float
    shuffled_std: float
    expert_entropy: float
    label_entropy: float

    @property
    def excess(self) -> float:
        """bits less the bias, not below 0."""
        return max(0.0, self.bits - self.shuffled_mean)

    @property
    def share(self) -> float:
        """The share of the expert's entropy that the label explains, bias removed."""
        return self.excess / self.expert_entropy if self.expert_entropy > 0 else 0.0


def entropy(counts: np.ndarray) -> float:
    """Entropy in bits of the distribution that the counts (n,) estimate; 0 without counts."""
    total = counts.sum()
    if not total:
        return 0.0
    shares = counts[counts > 0] / total
    return float(-(shares * np.log2(shares)).sum())


def mutual_information(table: np.ndarray) -> float:
    """I(row; column) = H(row) + H(column) - H(row, column) in bits, of counts (rows, columns); not below 0."""
    return max(0.0, entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table.ravel()))


def information(table: np.ndarray, shuffled: Sequence[np.ndarray]) -> Information:
    """table: counts (labels, E). shuffled: the tables of shuffled labels; without any, mean and std are 0."""
    chance = np.array([mutual_information(other) for other in shuffled])
    return Information(
        bits=mutual_information(table),
        shuffled_mean=float(chance.mean()) if len(chance) else 0.0,
        shuffled_std=float(chance.std(ddof=1)) if len(chance) > 1 else 0.0,
        expert_entropy=entropy(table.sum(0)),
        label_entropy=entropy(table.sum(1)),
    )
