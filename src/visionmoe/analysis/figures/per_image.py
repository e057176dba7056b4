"""Which images get little compute and which get much."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.compute_per_image import Example
from visionmoe.analysis.figures.patches import mosaic, shaded
from visionmoe.analysis.figures.style import BLUE, GREY, ORANGE, STYLE, save
from visionmoe.config import RoutingSetting


def compute_per_image(
    path: str | os.PathLike,
    fewest: Sequence[Example],
    most: Sequence[Example],
    quartiles: Sequence[Mapping[str, float]],
    shares: Sequence[float],
    class_names: Sequence[str],
    setting: RoutingSetting,
) -> None:
    """Left the images with the least compute, right those with the most; below, all images and their accuracy.

    In each row an image as it is, then with the patches darkened that no expert of a sparse layer processes.
    quartiles, shares: as `analysis.compute_per_image` gives them.
    """
    blocks = _shown(sorted(fewest[0].kept))
    with matplotlib.rc_context(STYLE):
        columns = 1 + len(blocks)
        height = max(4.0, 1.05 * len(fewest)) + 3.2
        figure = Figure(figsize=(2 * (1.05 * columns + 1.9), height), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(height - 3.2, 2.7))
        for place, (examples, title) in enumerate(((fewest, "Least compute"), (most, "Most compute"))):
            _gallery(figure.add_subplot(grid[0, place]), examples, blocks, class_names, title)
        _distribution(figure.add_subplot(grid[1, 0]), shares)
        _accuracy(figure.add_subplot(grid[1, 1]), quartiles)
        figure.suptitle(
            f"What each image gets: K={setting.num_selected_experts}, capacity factor {setting.capacity_factor:g}, "
            "batch-priority routing",
            fontsize=12,
            fontweight="bold",
        )
        save(figure, path)


def _shown(blocks: list[int], most: int = 4) -> list[int]:
    """At most `most` blocks, spread over all of them, the last one among them."""
    if len(blocks) <= most:
        return blocks
    return sorted({blocks[round(i * (len(blocks) - 1) / (most - 1))] for i in range(most)})


def _gallery(
    axis: Axes, examples: Sequence[Example], blocks: Sequence[int], class_names: Sequence[str], title: str
) -> None:
    gap = 8
    cells = [[shaded(e.picture, None), *(shaded(e.picture, e.kept[block]) for block in blocks)] for e in examples]
    height, width = cells[0][0].shape[:2]
    axis.imshow(mosaic(cells, gap), interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(title, pad=22)
    for row, example in enumerate(examples):
        text = f"{class_names[example.label]}\n{example.share:.0%} kept\n{'right' if example.correct else 'wrong'}"
        axis.text(-gap, row * (height + gap) + height / 2, text, ha="right", va="center", fontsize=9, parse_math=False)
    for column, heading in enumerate(["image", *(f"block {block}" for block in blocks)]):
        axis.text(column * (width + gap) + width / 2, -gap, heading, ha="center", va="bottom", fontsize=9)


def _distribution(axis: Axes, shares: Sequence[float]) -> None:
    axis.hist(shares, bins=bin_edges(shares), color=BLUE, alpha=0.85)
    mean = sum(shares) / len(shares)
    axis.axvline(mean, color=GREY, linestyle="--", linewidth=1.2, label=f"mean {mean:.0%}")
    axis.set(title="All images", xlabel="share of its routing requests that an image keeps", ylabel="images")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(loc="upper right")


def bin_edges(shares: Sequence[float], most: int = 40) -> list[float]:
    """Edges of at most `most` bins that all hold equally many of the values that can occur.

    The shares of images with equally many requests are multiples of a step: other bins would have gaps.
    """
    values = sorted({round(share, 9) for share in shares})
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    width = step * max(1, math.ceil((values[-1] - values[0]) / step / most))
    count = math.floor((values[-1] - values[0]) / width + 1e-6) + 1
    return [values[0] - step / 2 + width * i for i in range(count + 1)]


def _accuracy(axis: Axes, quartiles: Sequence[Mapping[str, float]]) -> None:
    places = range(len(quartiles))
    axis.plot(places, [q["top1"] for q in quartiles], "o-", color=ORANGE, label="at this capacity")
    axis.plot(places, [q["own_setting_top1"] for q in quartiles], "s--", color=GREY, label="at the model's own setting")
    axis.set_xticks(places, labels=[f"{q['lowest_share']:.0%} to {q['highest_share']:.0%}" for q in quartiles])
    axis.set(title="Accuracy by quarters of the images", xlabel="share kept", ylabel="top-1")
    axis.margins(x=0.15)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axis.legend(loc="best")
