"""Figures: files that are pictures, and the pixels of the darkened patches."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionmoe.analysis import figures
from visionmoe.analysis.compute_per_image import Example
from visionmoe.analysis.gallery import Crop
from visionmoe.config import RoutingSetting
from visionmoe.evaluate.adaptive import DensePoint, SweepPoint
from visionmoe.evaluate.tune import Candidate


def point(k: int, capacity: float, priority: bool) -> SweepPoint:
    return SweepPoint(k, capacity, priority, 0.5 + capacity / 4, 1.0, int(1e6 * k * capacity), 1 - capacity, 100.0)


def is_picture(path: Path, smallest: int = 200) -> bool:
    with Image.open(path) as picture:
        picture.load()
        pixels = np.asarray(picture.convert("RGB"))
    return min(pixels.shape[:2]) >= smallest and pixels.std() > 5


def test_dropped_patches_are_dark_and_kept_ones_are_not():
    image = np.full((4, 4, 1), 200, dtype=np.uint8)
    kept = np.array([[True, False], [False, True]])
    picture = figures.shaded(image, kept, zoom=16)
    assert picture.shape == (16, 16, 3)  # 4 pixels enlarged four times, patches of 8 x 8
    assert (picture[1:7, 1:7] == 200).all()
    # 0.18 * 200 + (24, 30, 46) = (60, 66, 82)
    assert (picture[1:7, 9:15] == [60, 66, 82]).all()
    assert (picture[9:15, 1:7] == [60, 66, 82]).all()
    assert (figures.shaded(image, None, zoom=16) == 200).all()


def test_large_and_colour_images_keep_their_size():
    image = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    assert (figures.shaded(image, None, zoom=4) == image).all()


def test_running_mean():
    # A window of 3 of 5 points; at the ends the mean is over the two that there are.
    assert figures.smooth([1, 2, 6, 2, 1], share=0.6).tolist() == pytest.approx([1.5, 3, 10 / 3, 3, 1.5])
    assert figures.smooth([4.0], share=0.05).tolist() == [4.0]


def test_every_figure_is_a_picture(tmp_path: Path):
    steps = list(range(0, 100, 10))
    loads = np.full((10, 4), 0.25)
    figures.learning_curves(
        tmp_path / "curves.png",
        {
            "step": steps,
            "loss": np.linspace(2, 1, 10),
            "accuracy": np.linspace(0, 1, 10),
            "auxiliary_loss": loads[:, 0],
        },
        {"step": [50, 90], "top1": [0.4, 0.6]},
        {"block 1": loads},
    )
    points = [point(k, c, b) for k in (1, 2) for c in (1.0, 0.5, 0.1) for b in (True, False)]
    figures.accuracy_against_compute(tmp_path / "compute.png", points)
    figures.accuracy_against_time(tmp_path / "time.png", points, DensePoint(0.6, 1.0, 1_500_000, 80.0))
    routing = {1: RoutingSetting(2, 0.5, True), 3: RoutingSetting(1, 0.2, True)}
    candidates = [Candidate(routing, 10**6 + n, 1.0, 0.5, s) for n, s in enumerate(("uniform", "plan", "search"))]
    figures.tuned_routing(
        tmp_path / "tuned.png", {"present": routing, "tuned": routing}, candidates, {"tuned": candidates[1]}, 10**6
    )
    images = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 1), dtype=np.uint8)
    masks = [np.ones((2, 4, 4), dtype=bool), np.eye(4, dtype=bool)[None].repeat(2, 0)]
    figures.kept_patches(tmp_path / "patches.png", images, masks, {1.0: 1.0, 0.1: 0.25}, ["Bag", "Coat"], "Kept")
    figures.experts_by_class(tmp_path / "experts.png", {1: np.eye(4)[:3], 3: np.full((3, 4), 0.25)}, "abc", "Experts")
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == [
        "compute.png", "curves.png", "experts.png", "patches.png", "time.png", "tuned.png"
    ]  # fmt: skip
    assert all(is_picture(path) for path in written)


def test_names_with_dollars_are_no_mathematics(tmp_path: Path):
    name = "$\\frac$"  # as mathematics an error
    image = np.zeros((4, 4, 1), np.uint8)
    figures.experts_by_class(tmp_path / "experts.png", {1: np.eye(2)}, [name, name])
    figures.gallery(tmp_path / "gallery.png", [[Crop(image, (0, 0, 2, 2), 0.5, name)]], ["expert 0"])
    masks = [np.ones((1, 2, 2), dtype=bool)]
    figures.kept_patches(tmp_path / "patches.png", image[None], masks, {1.0: 1.0}, [name])
    example = Example(0.5, 2, 0, True, 0, image, {1: masks[0][0]})
    quarter = {"top1": 0.5, "own_setting_top1": 0.5, "lowest_share": 0.1, "highest_share": 0.9}
    setting = RoutingSetting(2, 0.3, True)
    figures.compute_per_image(tmp_path / "images.png", [example], [example], [quarter], [0.1, 0.9], [name], setting)
    assert all(is_picture(path, 20) for path in tmp_path.iterdir())


def test_a_single_point_or_order_is_enough(tmp_path: Path):
    dense = DensePoint(0.6, 1.0, 1_500_000, 80.0)
    figures.accuracy_against_compute(tmp_path / "one.png", [point(1, 1.0, False)], dense=dense)
    figures.accuracy_against_time(tmp_path / "time.png", [point(1, 1.0, False)])
    assert is_picture(tmp_path / "one.png") and is_picture(tmp_path / "time.png")


def test_no_global_state_of_matplotlib_is_touched():
    assert "matplotlib.pyplot" not in sys.modules
