"""Which experts see what."""

import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import STYLE, save


def experts_by_class(
    path: str | os.PathLike, shares: Mapping[int, np.ndarray], class_names: Sequence[str], title: str = ""
) -> None:
    """Heat maps, one per sparse layer: which share of each class's tokens asks for each expert.

    shares: block number -> (classes, E) with rows that sum to 1.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titleweight": "normal"}):
        classes, experts = next(iter(shares.values())).shape
        size = (1.8 + len(shares) * (0.42 * experts + 0.5), 1.5 + 0.33 * classes)
        figure = Figure(figsize=size, layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(shares), sharey=True))
        highest = max(share.max() for share in shares.values())
        for axis, (layer, share) in zip(axes, shares.items(), strict=True):
            picture = axis.imshow(share, cmap="magma", vmin=0, vmax=highest, aspect="auto")
            axis.set(title=f"block {layer}", xlabel="expert", xticks=range(experts))
            axis.set_yticks(range(classes), labels=list(class_names))
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
        bar = figure.colorbar(picture, ax=list(axes), shrink=0.9, pad=0.02)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bar.outline.set_visible(False)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        save(figure, path)
