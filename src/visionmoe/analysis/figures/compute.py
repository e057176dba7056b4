"""Accuracy against compute."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import BLUE, ORANGE, STYLE, save
from visionmoe.evaluate.adaptive import SweepPoint


def accuracy_against_compute(path: str | os.PathLike, points: Sequence[SweepPoint], title: str = "") -> None:
    """Top-1 accuracy over capacity and over operations per image, for every K, vanilla and batch-priority routing.

    The form of figure 6 of arXiv 2106.05974.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        experts = sorted({p.num_selected_experts for p in points}, reverse=True)
        for k, priority in itertools.product(experts, (True, False)):
            line = sorted(
                (p for p in points if p.num_selected_experts == k and p.batch_priority == priority),
                key=lambda p: p.capacity_factor,
            )
            if not line:
                continue
            style: dict[str, Any] = {
                "color": ORANGE if priority else BLUE,
                "linestyle": "-" if k == experts[0] else "--",
                "marker": "o" if k == experts[0] else "s",
                "markersize": 5,
                "markerfacecolor": None if k == experts[0] else "white",
                "label": f"{'batch-priority' if priority else 'vanilla'}, K={k}",
            }
            left.plot([p.capacity_factor for p in line], [p.top1 for p in line], **style)
            right.plot([p.flops / 1e6 for p in line], [p.top1 for p in line], **style)
        left.set(title=title or "Accuracy when experts have fewer places", xlabel="capacity factor", ylabel="top-1")
        left.invert_xaxis()
        right.set(title="Accuracy against compute", xlabel="million operations per image")
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        right.legend(loc="lower right")
        save(figure, path)
