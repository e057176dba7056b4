"""Which experts see what."""

import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import STYLE, save

Orders = Mapping[int, tuple[np.ndarray, np.ndarray]]
MOST_LABELS = 60  # classes beyond which their names would not be legible


def experts_by_class(
    path: str | os.PathLike,
    shares: Mapping[int, np.ndarray],
    class_names: Sequence[str],
    title: str = "",
    orders: Orders | None = None,
) -> None:
    """Heat maps, one per sparse layer: which share of each class's tokens asks for each expert.

    shares: block number -> (classes, E). orders: block number -> order of the classes and of the experts, in which
    rows and columns are shown; None: as they are numbered. Classes of zeros are left out.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titleweight": "normal"}):
        classes, experts = next(iter(shares.values())).shape
        cell = 0.42 if experts <= 16 else max(0.17, 6 / experts)
        width, height = cell * experts + 1.5, min(9.0, 0.33 * classes) + 0.9
        columns = max(1, min(len(shares), int(15 / width)))
        rows = -(-len(shares) // columns)
        figure = Figure(figsize=(width * columns + 0.8, height * rows + 0.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        highest = max(share.max() for share in shares.values())
        for axis, (layer, share) in zip(axes, shares.items(), strict=False):
            order = (np.arange(classes), np.arange(experts)) if orders is None else orders[layer]
            order = (order[0][share[order[0]].any(1)], order[1])
            picture = axis.imshow(share[np.ix_(*order)], cmap="magma", vmin=0, vmax=highest, aspect="auto")
            axis.set(title=f"block {layer}", xlabel="expert")
            _labels(axis, [class_names[row] for row in order[0].tolist()], [str(column) for column in order[1]])
            if classes <= 16 and experts <= 16:
                _numbers(axis, share[np.ix_(*order)], highest)
        for axis in axes[len(shares) :]:
            axis.set_axis_off()
        bar = figure.colorbar(picture, ax=list(axes), shrink=0.9, pad=0.02)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        save(figure, path)


def experts_by_position(
    path: str | os.PathLike, shares: Mapping[int, np.ndarray], title: str = "", most_columns: int = 16
) -> None:
    """Maps on the grid of patches, one per expert and sparse layer: where the tokens stand that ask for it.

    shares: block number -> (E, rows, columns), share of the tokens at a place.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titleweight": "normal"}):
        experts, grid_rows, grid_columns = next(iter(shares.values())).shape
        columns = min(experts, most_columns if experts > most_columns else experts)
        lines = -(-experts // columns)
        size = (1.0 + 1.05 * columns, 0.6 + len(shares) * lines * (0.3 + 1.0 * grid_rows / grid_columns))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(shares) * lines, columns, squeeze=False)
        highest = max(share.max() for share in shares.values())
        for number, (layer, share) in enumerate(shares.items()):
            for expert in range(lines * columns):
                axis = axes[number * lines + expert // columns, expert % columns]
                if expert >= experts:
                    axis.set_axis_off()
                    continue
                picture = axis.imshow(share[expert], cmap="magma", vmin=0, vmax=highest)
                axis.set(xticks=[], yticks=[])
                axis.set_title(f"expert {expert}", fontsize=8, pad=3, loc="center")
                axis.spines[:].set_visible(False)
                if expert % columns == 0:
                    axis.set_ylabel(f"block {layer}", fontsize=9)
        bar = figure.colorbar(picture, ax=list(axes.ravel()), shrink=0.9, pad=0.01)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        save(figure, path)


def _labels(axis: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axis.set_xticks(range(len(columns)), labels=list(columns), fontsize=10 if len(columns) <= 16 else 6)
    if len(rows) <= MOST_LABELS:
        axis.set_yticks(range(len(rows)), labels=list(rows), fontsize=10 if len(rows) <= 27 else 7, parse_math=False)
    else:
        axis.set(yticks=[], ylabel=f"{len(rows)} classes")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _numbers(axis: Axes, values: np.ndarray, highest: float) -> None:
    """The percentage in every cell, dark on bright and the other way round."""
    for (row, column), value in np.ndenumerate(values):
        colour = "#222222" if value > 0.6 * highest else "#d8d8d8"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
