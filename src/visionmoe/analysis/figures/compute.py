"""Accuracy against compute and against time."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import BLUE, GREEN, GREY, ORANGE, STYLE, save
from visionmoe.evaluate.adaptive import DensePoint, SweepPoint, pareto_frontier


def accuracy_against_compute(
    path: str | os.PathLike, points: Sequence[SweepPoint], title: str = "", dense: DensePoint | None = None
) -> None:
    """Top-1 accuracy over capacity and over operations per image, for every K, vanilla and batch-priority routing.

    The form of figure 6 of arXiv 2106.05974. Circled points are on the Pareto frontier. dense: a horizontal line, and a
    diamond at its operations.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _lines(left, points, lambda p: p.capacity_factor)
        _lines(right, points, lambda p: p.flops / 1e6)
        frontier = [p for p, best in zip(points, pareto_frontier(points), strict=True) if best]
        right.plot(
            [p.flops / 1e6 for p in frontier],
            [p.top1 for p in frontier],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=GREY,
            markeredgewidth=1,
            label="Pareto frontier",
        )
        if dense is not None:
            left.axhline(dense.top1, color=GREEN, linewidth=1.2, linestyle=":")
            _dense(right, dense, dense.flops / 1e6)
        left.set(title=title or "Accuracy when experts have fewer places", xlabel="capacity factor", ylabel="top-1")
        left.invert_xaxis()
        right.set(title="Accuracy against compute", xlabel="million operations per image")
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        right.legend(loc="lower right")
        save(figure, path)


def accuracy_against_time(
    path: str | os.PathLike, points: Sequence[SweepPoint], dense: DensePoint | None = None
) -> None:
    """Top-1 accuracy over milliseconds per image, and those over operations: whether saved operations save time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _lines(left, points, _milliseconds)
        _lines(right, points, lambda p: p.flops / 1e6, _milliseconds)
        if dense is not None:
            _dense(left, dense, _milliseconds(dense))
            right.plot(dense.flops / 1e6, _milliseconds(dense), "D", color=GREEN, markersize=8, label="dense model")
        left.set(title="Accuracy against time", xlabel="milliseconds per image (model alone)", ylabel="top-1")
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        left.legend(loc="lower right")
        right.set(title="Time against compute", xlabel="million operations per image", ylabel="milliseconds per image")
        right.set_ylim(0, None)
        save(figure, path)


def _milliseconds(point: SweepPoint | DensePoint) -> float:
    return 1000 / point.images_per_second


def _lines(
    axis: Axes,
    points: Sequence[SweepPoint],
    x: Callable[[SweepPoint], float],
    y: Callable[[SweepPoint], float] = lambda p: p.top1,
) -> None:
    for line, style in _series(points):
        axis.plot([x(p) for p in line], [y(p) for p in line], **style)


def _series(points: Sequence[SweepPoint]) -> Iterator[tuple[list[SweepPoint], dict[str, Any]]]:
    """The points of every K and order by capacity, with how their line looks."""
    experts = sorted({p.num_selected_experts for p in points}, reverse=True)
    for (place, k), priority in itertools.product(enumerate(experts), (True, False)):
        line = [p for p in points if p.num_selected_experts == k and p.batch_priority == priority]
        if line:
            yield (
                sorted(line, key=lambda p: p.capacity_factor),
                {
                    "color": ORANGE if priority else BLUE,
                    "linestyle": ("-", "--", ":", "-.")[place % 4],
                    "marker": ("o", "s", "^", "v")[place % 4],
                    "markersize": 5,
                    "markerfacecolor": None if place == 0 else "white",
                    "label": f"{'batch-priority' if priority else 'vanilla'}, K={k}",
                },
            )


def _dense(axis: Axes, dense: DensePoint, x: float) -> None:
    axis.axhline(dense.top1, color=GREEN, linewidth=1.2, linestyle=":")
    axis.plot(x, dense.top1, "D", color=GREEN, markersize=8, label="dense model")
