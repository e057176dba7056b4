"""Mutual information of known tables, orders of known matrices, and the stateless permutation."""

import numpy as np
import pytest

from visionmoe.analysis.information import entropy, information, mutual_information
from visionmoe.analysis.seriation import seriate, shortest_chain
from visionmoe.data.randomness import shuffled_indices


def test_entropy_in_bits():
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(2.0)
    assert entropy(np.array([7, 0])) == 0.0
    assert entropy(np.zeros(3)) == 0.0
    # 1/2 * 1 + 2 * 1/4 * 2 = 1.5
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5)


def test_information_of_known_tables():
    assert mutual_information(np.eye(4) * 10) == pytest.approx(2.0)  # the one names the other: log2(4)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-12)  # independent
    # A noisy channel of two symbols that errs in a quarter of all cases: 1 - H(1/4) = 1 - 0.8112781 bits.
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(1 - 0.8112781)


def test_chance_is_taken_off():
    table = np.array([[3, 1], [1, 3]])
    found = information(table, [np.array([[2, 2], [2, 2]]), np.array([[3, 1], [1, 3]])])
    half = mutual_information(table) / 2
    assert found.shuffled_mean == pytest.approx(half)  # the mean of 0 and the whole
    assert found.shuffled_std == pytest.approx(half * 2**0.5)  # of two values at +-half
    assert found.excess == pytest.approx(half)
    assert found.share == pytest.approx(half / 1.0)  # the expert's entropy is one bit
    assert (information(table, []).shuffled_mean, information(table, []).excess) == (0.0, found.bits)


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffled_block_diagonal_is_put_together_again(seed: int):
    rng = np.random.default_rng(seed)
    rows, columns = np.repeat([0, 1, 2, 3], [5, 2, 4, 3]), np.repeat([0, 1, 2, 3], [2, 3, 1, 2])
    blocks = (rows[:, None] == columns) + 0.05 * rng.random((len(rows), len(columns)))
    shuffle = rng.permutation(len(rows)), rng.permutation(len(columns))
    order = seriate(blocks[np.ix_(*shuffle)])
    row_blocks, column_blocks = rows[shuffle[0]][order[0]], columns[shuffle[1]][order[1]]
    for found in (row_blocks, column_blocks):
        assert np.count_nonzero(np.diff(found)) == 3  # four blocks: three changes, so each stands together
    assert list(dict.fromkeys(row_blocks)) == list(dict.fromkeys(column_blocks))  # and along the diagonal


def test_the_order_of_a_gradient_is_found():
    """Experts that each prefer the next class: a band along the diagonal, from one end to the other."""
    places = np.arange(12)
    band = np.exp(-0.5 * ((places[:, None] - places) / 1.5) ** 2)
    shuffle = np.random.default_rng(0).permutation(12)
    rows, columns = seriate(band[:, shuffle])
    found = shuffle[columns]
    assert (np.diff(found) == 1).all() or (np.diff(found) == -1).all()
    assert rows.tolist() == found.tolist()


def test_empty_rows_and_columns_come_last():
    rows, columns = seriate(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0.5]]))
    assert rows[-1] == 0
    assert columns[-1] == 0
    assert [o.tolist() for o in seriate(np.zeros((2, 3)))] == [[0, 1], [0, 1, 2]]
    assert [o.tolist() for o in seriate(np.ones((2, 1)))] == [[0, 1], [0]]


def test_shortest_chain_of_points_on_a_line():
    points = np.array([3.0, 0.0, 2.0, 1.0, 7.0])
    chain = shortest_chain(np.abs(points[:, None] - points))
    assert points[chain].tolist() in ([0, 1, 2, 3, 7], [7, 3, 2, 1, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffled_indices_are_a_permutation(size: int):
    every = np.arange(size)
    found = shuffled_indices(7, 0, every, size)
    assert sorted(found) == every.tolist()
    # An index's place follows from the index alone, not from its batch.
    assert shuffled_indices(7, 0, every[size // 2 :], size).tolist() == found[size // 2 :].tolist()


def test_permutations_are_different_and_mix():
    every = np.arange(1000)
    first, second = (shuffled_indices(7, number, every, 1000) for number in (0, 1))
    # Few fixed points are expected (one on average), and no trend: the correlation's deviation is 1 / sqrt(1000).
    assert (first == every).sum() < 10
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, every)[0, 1]) < 0.15
