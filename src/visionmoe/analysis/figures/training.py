"""The course of a training run."""

import itertools
import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import BLUE, EXPERT_COLOURS, GREEN, ORANGE, STYLE, save, smooth


def learning_curves(
    path: str | os.PathLike,
    train: Mapping[str, Sequence[float]],
    evaluations: Mapping[str, Sequence[float]],
    expert_load: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Loss, accuracy, and how evenly the experts of every sparse layer are used, over the steps of a run.

    train: columns "step", "loss", "accuracy" and, where known, "auxiliary_loss" of the training log.
    evaluations: columns "step", "top1".
    expert_load: layer name -> for every "step" of `train` the share of requests of each expert (E,).
    """
    with matplotlib.rc_context(STYLE):
        panels = 2 + len(expert_load)
        figure = Figure(figsize=(4.2 * panels, 3.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, panels))
        _loss_panel(axes[0], train)
        axes[1].plot(train["step"], train["accuracy"], color=BLUE, alpha=0.25, linewidth=1)
        axes[1].plot(train["step"], smooth(train["accuracy"]), color=BLUE, label="training batches")
        axes[1].plot(evaluations["step"], evaluations["top1"], "o-", color=ORANGE, markersize=5, label="test images")
        axes[1].set(title="Accuracy", xlabel="step", ylim=(None, 1.0))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[1].legend(loc="lower right")
        for axis, (layer, loads) in zip(axes[2:], expert_load.items(), strict=True):
            _load_panel(axis, layer, train["step"], np.asarray(loads))
        save(figure, path)


def _loss_panel(axis: Axes, train: Mapping[str, Sequence[float]]) -> None:
    axis.plot(train["step"], train["loss"], color=BLUE, alpha=0.25, linewidth=1)
    axis.plot(train["step"], smooth(train["loss"]), color=BLUE, label="training loss")
    if "auxiliary_loss" in train:
        axis.plot(train["step"], smooth(train["auxiliary_loss"]), color=GREEN, label="of it, router's balance")
    axis.set(title="Loss", xlabel="step", ylim=(0, None))
    axis.legend(loc="upper right")


def _load_panel(axis: Axes, layer: str, steps: Sequence[float], loads: np.ndarray) -> None:
    """Stacked shares of the experts, (steps, E)."""
    smoothed = np.stack([smooth(column) for column in loads.T])
    colours = list(itertools.islice(itertools.cycle(EXPERT_COLOURS), len(smoothed)))
    axis.stackplot(list(steps), smoothed, colors=colours, alpha=0.9, linewidth=0)
    axis.set(title=f"Share of each expert, {layer}", xlabel="step", ylim=(0, 1))
    axis.margins(x=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(False)
