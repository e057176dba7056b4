"""How all figures look, and how they are written."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from visionmoe.files import atomic_write

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
}
BLUE, ORANGE, GREEN, GREY = "#2166ac", "#e66101", "#1b7837", "#9a9a9a"
EXPERT_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#9c755f")


def smooth(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """Running mean over a window of `share` of the points, at the ends over fewer."""
    given = np.asarray(values, dtype=np.float64)
    width = max(1, round(share * len(given)))
    ones = np.ones(width)
    return np.convolve(given, ones, mode="same") / np.convolve(np.ones_like(given), ones, mode="same")


def save(figure: Figure, path: str | os.PathLike) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
