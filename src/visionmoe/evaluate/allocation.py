"""Sharing a budget of experts among layers: pure arithmetic over measured losses.

A layer's level is how many experts per token it pays for, K * min(1, capacity_factor). All sparse layers of a model
have experts of one shape, so equal sums of levels are equal operations.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visionmoe.config import RoutingSetting

LOWEST = 0.05  # of a layer's present level: the least that is tried
FRACTIONS = (LOWEST, 0.125, 0.25, 0.5, 0.75, 1.0)  # of the present level, at which losses are measured
STEP = 0.025  # about the finest share of a present level that is moved between layers


@dataclass(frozen=True)
class LayerCurve:
    """Measured losses of the model by the level of one layer. by_k: K -> ascending (level, loss), at least two."""

    by_k: Mapping[int, tuple[tuple[float, float], ...]]

    def best(self, level: float) -> tuple[int, float]:
        """The K with the lowest loss at `level`, of equals the smallest, and that loss; linear between measured levels.

        A K that cannot spend so much, because its places are enough for all requests, is not asked.
        """
        losses = {
            k: float(np.interp(level, [x for x, _ in points], [y for _, y in points]))
            for k, points in self.by_k.items()
            if level <= points[-1][0] + 1e-9
        }
        k = min(losses, key=lambda k: (losses[k], k))
        return k, losses[k]

    @property
    def highest(self) -> float:
        return max(points[-1][0] for points in self.by_k.values())

    @property
    def lowest(self) -> float:
        return min(points[0][0] for points in self.by_k.values())


def level_of(setting: RoutingSetting) -> float:
    """Experts per token that a setting pays for."""
    return setting.num_selected_experts * min(1.0, setting.capacity_factor)


def setting_at(k: int, level: float, own: RoutingSetting) -> RoutingSetting:
    """K = k with as many places as `level` needs, batch-priority.

    Where the level has a place for every request, places beyond them cost nothing: as many as the own setting has.
    """
    capacity = max(1.0, own.capacity_factor) if level >= k - 1e-9 else max(1e-6, round(level / k, 6))
    return RoutingSetting(k, capacity, True)


def choices_of_k(k: int) -> tuple[int, ...]:
    """1, 2, 4, ... and k: the numbers of experts per token that are tried in the place of k."""
    return tuple(sorted({k, *itertools.takewhile(lambda i: i < k, (2**n for n in range(20)))}))


def levels_of(own: RoutingSetting, k: int) -> list[float]:
    """The levels at which K = k is measured, ascending, at least two: those that k can spend, up to the present one."""
    top = level_of(own)
    levels = {fraction * top for fraction in FRACTIONS if fraction * top <= k}
    if k < top:
        levels.add(float(k))
    return sorted(levels if len(levels) > 1 else {k / 2, float(k)})


def allocate(curves: Mapping[int, LayerCurve], total: float) -> dict[int, float]:
    """The level of every layer with the lowest sum of losses among those whose levels sum to at most `total`.

    Exact over a grid of levels on which `total` can be spent to the end (a multiple-choice knapsack by dynamic
    programming, layer after layer). ValueError when not even the lowest levels fit.
    """
    layers = list(curves)
    base = {layer: curves[layer].lowest for layer in layers}
    spare = total - sum(base.values())
    if spare < -1e-9:
        raise ValueError(f"the lowest levels sum to {sum(base.values()):g}, more than {total:g}")
    mean = sum(curve.highest for curve in curves.values()) / len(curves)
    units = max(1, round(spare / (STEP * mean)))
    step = max(0.0, spare) / units
    best = np.zeros(units + 1)  # lowest loss so far by units spent
    taken: list[np.ndarray] = []
    for layer in layers:
        curve = curves[layer]
        most = 0 if step == 0 else min(units, int(np.ceil((curve.highest - base[layer]) / step - 1e-9)))
        losses = [curve.best(min(base[layer] + n * step, curve.highest))[1] for n in range(most + 1)]
        table = np.full((most + 1, units + 1), np.inf)
        for n, loss in enumerate(losses):
            table[n, n:] = best[: units + 1 - n] + loss
        taken.append(table.argmin(axis=0))
        best = table.min(axis=0)
    levels, left = {}, int(best.argmin())
    for layer, choice in zip(reversed(layers), reversed(taken), strict=True):
        n = int(choice[left])
        levels[layer] = min(base[layer] + n * step, curves[layer].highest)
        left -= n
    return {layer: levels[layer] for layer in layers}


def swaps(curves: Mapping[int, LayerCurve], levels: Mapping[int, float], amount: float) -> Iterator[dict[int, float]]:
    """Levels with up to `amount` moved from one layer to another, the most promising by the curves first."""
    moves: list[tuple[float, dict[int, float]]] = []
    for giver, taker in itertools.permutations(levels, 2):
        moved = min(amount, levels[giver] - curves[giver].lowest, curves[taker].highest - levels[taker])
        if moved < amount / 4:
            continue
        changed = {**levels, giver: levels[giver] - moved, taker: levels[taker] + moved}
        moves.append((sum(curves[layer].best(level)[1] for layer, level in changed.items()), changed))
    yield from (changed for _, changed in sorted(moves, key=lambda move: move[0]))


def damped(levels: Mapping[int, float], towards: Sequence[float], share: float) -> dict[int, float]:
    """Levels that go only `share` of the way from `towards` to `levels`; sums of equal totals are kept."""
    return {
        layer: share * level + (1 - share) * start
        for (layer, level), start in zip(levels.items(), towards, strict=True)
    }
