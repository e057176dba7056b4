"""Few-shot accuracy over the number of images per class."""

import itertools
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from visionmoe.analysis.figures.style import EXPERT_COLOURS, STYLE, save
from visionmoe.evaluate.fewshot import FewShotResult


def accuracy_over_shots(path: str | os.PathLike, results: Sequence[FewShotResult], title: str = "") -> None:
    """One line per data set: the mean over the seeds, and a band of one standard deviation where there are several."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axis = figure.subplots()
        for result, colour in zip(results, itertools.cycle(EXPERT_COLOURS), strict=False):
            order = np.argsort(result.shots)
            shots, mean = np.array(result.shots)[order], np.array(result.mean)[order]
            axis.plot(shots, mean, "o-", color=colour, markersize=5, label=result.name)
            if result.std is not None:
                std = np.array(result.std)[order]
                axis.fill_between(shots, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sorted({shot for result in results for shot in result.shots})))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set(
            title=title or "Accuracy with few images per class, frozen features",
            xlabel="training images per class",
            ylabel="test accuracy",
        )
        axis.legend(loc="best")
        save(figure, path)
