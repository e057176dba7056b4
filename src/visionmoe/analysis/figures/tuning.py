"""The routing that tuning chose, layer by layer, and what it was chosen from."""

import os
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import BLUE, GREEN, GREY, ORANGE, STYLE, save
from visionmoe.evaluate.adaptive import LayerSettings
from visionmoe.evaluate.allocation import level_of
from visionmoe.evaluate.tune import Candidate


def tuned_routing(
    path: str | os.PathLike,
    routings: Mapping[str, LayerSettings],
    candidates: Sequence[Candidate],
    chosen: Mapping[str, Candidate],
    budget: int,
) -> None:
    """Left the experts per token that each layer pays for, then accuracy and loss against operations of all tried.

    routings: name ("present", "uniform", "tuned") -> settings by block. candidates: on the calibration images.
    chosen: name -> the candidates to point out. budget: operations per image.
    """
    with matplotlib.rc_context(STYLE):
        layers = len(next(iter(routings.values())))
        wide = max(4.0, 0.9 * layers)
        figure = Figure(figsize=(10.5 + wide, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(wide, 4.5, 4.5))
        _levels(left, routings)
        _candidates(middle, candidates, chosen, budget, lambda c: c.top1)
        _candidates(right, candidates, chosen, budget, lambda c: c.calibrated_loss)
        middle.set(title="Settings tried: accuracy", ylabel="top-1, calibration images")
        middle.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        right.set(title="Settings tried: loss", ylabel="loss at the best temperature, calibration images")
        right.legend(loc="upper right", fontsize=8)
        save(figure, path)


def _levels(axis: Axes, routings: Mapping[str, LayerSettings]) -> None:
    colours = {"present": GREY, "uniform": BLUE, "tuned": ORANGE}
    width = 0.8 / len(routings)
    for place, (name, routing) in enumerate(routings.items()):
        layers = sorted(routing)
        heights = [level_of(routing[layer]) for layer in layers]
        x = np.arange(len(layers)) + (place - (len(routings) - 1) / 2) * width
        axis.bar(x, heights, width * 0.92, color=colours.get(name, GREEN), label=name)
        for at, height, layer in zip(x, heights, layers, strict=True):
            setting = routing[layer]
            text = f"K={setting.num_selected_experts}\nC={setting.capacity_factor:.3g}"
            axis.annotate(text, (at, height), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(layers)), labels=[f"block {layer}" for layer in layers])
    axis.set(title="What each layer pays for", ylabel="experts per token, K x min(1, C)")
    axis.margins(y=0.2)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(routings))


def _candidates(
    axis: Axes,
    candidates: Sequence[Candidate],
    chosen: Mapping[str, Candidate],
    budget: int,
    value: Callable[[Candidate], float],
) -> None:
    markers = {"uniform": ("s", BLUE), "plan": ("^", GREEN), "search": ("o", GREEN), "sensitivity": (".", GREY)}
    for stage, (marker, colour) in markers.items():
        own = [c for c in candidates if c.stage == stage]
        if own:
            x, y = [c.flops / 1e6 for c in own], [value(c) for c in own]
            axis.plot(x, y, marker, color=colour, alpha=0.6, markersize=5, label=f"tried: {stage}")
    for name, (marker, colour) in {"uniform": ("s", BLUE), "tuned": ("*", ORANGE)}.items():
        if name in chosen:
            point = chosen[name]
            axis.plot(point.flops / 1e6, value(point), marker, color=colour, markersize=12, markeredgecolor="white",
                      label=name)  # fmt: skip
    axis.axvline(budget / 1e6, color=GREY, linestyle="--", linewidth=1.2, label="budget")
    axis.set_xlabel("million operations per image")
