"""Split strings: the same words as tfds, and clear errors."""

import numpy as np
import pytest

from visionmoe.data.splits import parse_split, slice_indices, slice_positions


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [
        ("train", 0, 1000),
        ("train[:99%]", 0, 990),
        ("train[99%:]", 990, 1000),
        ("train[100:200]", 100, 200),
        ("train[-10%:]", 900, 1000),
        ("train[:-100]", 0, 900),
        ("train[25%:500]", 250, 500),
        ("training[:1]", 0, 1),
    ],
)
def test_slices(split: str, first: int, last: int) -> None:
    name, start, stop = parse_split(split, ("train", "test"))
    assert name == "train"
    assert slice_positions(start, stop, 1000) == (first, last)


def test_other_names_of_the_same_split() -> None:
    assert parse_split("validation", ("train", "val"))[0] == "val"
    assert parse_split("dev[:5]", ("train", "val"))[0] == "val"


def test_percents_of_odd_sizes_leave_nothing_out() -> None:
    # 99 % of 12,345 is 12,221.55: both sides round to the same image.
    assert slice_positions(None, "99%", 12345) == (0, 12222)
    assert slice_positions("99%", None, 12345) == (12222, 12345)


@pytest.mark.parametrize("split", ["train[100:2000]", "train[5:5]", "train[9:3]", "train[110%:]", "train[-2000:]"])
def test_slices_out_of_range(split: str) -> None:
    _, start, stop = parse_split(split, ("train",))
    with pytest.raises(ValueError, match=r"must hold images between 0 and 1000 \(100%\)"):
        slice_positions(start, stop, 1000)


@pytest.mark.parametrize("split", ["", "train[", "train[5]", "train[a:b]", "train[1:2:3]", "train[1.5%:]"])
def test_not_a_split(split: str) -> None:
    with pytest.raises(ValueError, match="split must look like"):
        parse_split(split, ("train",))


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="unknown split 'val'; there are: test, train"):
        parse_split("val", ("train", "test"))


def test_images_sorted_by_class_are_sliced_from_a_shuffle() -> None:
    labels = np.repeat(np.arange(10), 100)
    most, rest = slice_indices(None, "90%", labels), slice_indices("90%", None, labels)
    assert sorted([*most, *rest]) == list(range(1000))
    assert len(np.unique(labels[rest])) == 10  # and not the last class only
    mixed = np.random.default_rng(0).permutation(labels)
    np.testing.assert_array_equal(slice_indices("90%", None, mixed), np.arange(900, 1000))
