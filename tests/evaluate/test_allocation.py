"""Sharing a budget among layers: against all combinations, and the settings that levels stand for."""

import itertools

import pytest

from visionmoe.config import RoutingSetting
from visionmoe.evaluate.allocation import (
    LOWEST,
    LayerCurve,
    allocate,
    choices_of_k,
    damped,
    level_of,
    levels_of,
    setting_at,
    swaps,
)

OWN = RoutingSetting(2, 1.05, False)


def falling(*losses: float, k: int = 2) -> LayerCurve:
    """Losses at levels 0.1, 0.5, 1, 1.5, 2 with this K."""
    return LayerCurve({k: tuple(zip((0.1, 0.5, 1.0, 1.5, 2.0), losses, strict=True))})


def test_levels_and_settings_are_inverse():
    assert level_of(OWN) == 2  # 2 * min(1, 1.05)
    assert level_of(RoutingSetting(2, 0.3, True)) == pytest.approx(0.6)
    assert setting_at(2, 0.6, OWN) == RoutingSetting(2, 0.3, True)
    assert setting_at(1, 0.6, OWN) == RoutingSetting(1, 0.6, True)
    # A place for every request: more places cost nothing, so as many as before.
    assert setting_at(2, 2.0, OWN) == RoutingSetting(2, 1.05, True)
    assert setting_at(1, 1.0, RoutingSetting(2, 0.5, False)) == RoutingSetting(1, 1.0, True)


def test_what_is_measured():
    assert choices_of_k(1) == (1,)
    assert choices_of_k(3) == (1, 2, 3)
    assert choices_of_k(8) == (1, 2, 4, 8)
    assert levels_of(OWN, 2) == pytest.approx([0.1, 0.25, 0.5, 1.0, 1.5, 2.0])
    assert levels_of(OWN, 1) == pytest.approx([0.1, 0.25, 0.5, 1.0])  # K = 1 cannot spend more than 1
    assert levels_of(OWN, 2)[0] == LOWEST * level_of(OWN)
    assert levels_of(RoutingSetting(30, 1.0, False), 1) == [
        0.5,
        1.0,
    ]  # its lowest level is 1.5


def test_best_k_at_a_level():
    curve = LayerCurve({1: ((0.1, 3.0), (1.0, 1.0)), 2: ((0.1, 2.0), (2.0, 0.1))})
    # K = 1 at 0.55: halfway, 2.0. K = 2: 2 - 1.9 * 0.45 / 1.9 = 1.55.
    assert curve.best(0.55) == (2, pytest.approx(1.55))
    # At 1.0: 1.0 against 2 - 1.9 * 0.9 / 1.9 = 1.1. Beyond 1, K = 1 cannot spend the level.
    assert curve.best(1.0) == (1, 1.0)
    assert curve.best(1.5)[0] == 2
    assert (curve.lowest, curve.highest) == (0.1, 2.0)


def test_allocation_is_as_good_as_the_best_of_all_combinations():
    curves = {
        1: falling(5.0, 4.0, 3.9, 3.8, 3.7),
        3: falling(9.0, 6.0, 3.0, 1.0, 0.0),
        5: falling(2.0, 1.9, 1.0, 0.4, 0.3),
    }
    for total in (0.5, 1.7, 3.1, 4.4):
        levels = allocate(curves, total)
        assert sum(levels.values()) <= total + 1e-9
        found = sum(curves[layer].best(level)[1] for layer, level in levels.items())
        grid = [0.1 + 0.05 * n for n in range(39)]
        best = min(
            sum(curve.best(level)[1] for curve, level in zip(curves.values(), combination, strict=True))
            for combination in itertools.product(grid, repeat=3)
            if sum(combination) <= total + 1e-9
        )
        # The two grids differ: on the steepest piece, 7.5 per level, half a step of 0.05 is 0.19.
        assert found <= best + 0.19


def test_the_whole_budget_of_equal_layers_is_spent():
    levels = allocate({layer: falling(5.0, 4.0, 3.0, 2.0, 1.0) for layer in range(4)}, 3.777)
    assert sum(levels.values()) == pytest.approx(3.777)


def test_a_full_and_an_empty_budget():
    curves = {1: falling(2.0, 1.0, 0.9, 0.5, 0.2), 2: falling(2.0, 1.5, 1.4, 1.3, 1.2)}
    assert allocate(curves, 4.0) == pytest.approx({1: 2.0, 2: 2.0})
    assert allocate(curves, 0.2) == pytest.approx({1: 0.1, 2: 0.1})
    with pytest.raises(ValueError, match=r"lowest levels sum to 0.2, more than 0.1"):
        allocate(curves, 0.1)


def test_swaps_keep_the_sum_and_begin_with_the_best():
    curves = {1: falling(5.0, 4.0, 3.0, 2.0, 1.0), 2: falling(2.0, 2.0, 2.0, 2.0, 2.0)}
    found = list(swaps(curves, {1: 1.0, 2: 1.0}, 0.5))
    # Only layer 1 gains by more. 0.5 more of it: 2.0 in the place of 3.0.
    assert found == [{1: 1.5, 2: 0.5}, {1: 0.5, 2: 1.5}]
    # Nothing is left to take from layer 2, and layer 1 gives only what it has above its lowest level.
    assert list(swaps(curves, {1: 0.5, 2: 0.1}, 0.5)) == [pytest.approx({1: 0.1, 2: 0.5})]


def test_damping_goes_part_of_the_way():
    assert damped({1: 2.0, 3: 0.0}, [1.0, 1.0], 0.5) == {1: 1.5, 3: 0.5}
