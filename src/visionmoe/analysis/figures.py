"""Figures as PNG files. The only module of this package that needs matplotlib (the extra `figures`).

Every function takes plain numbers, writes one file (beside, then renamed) and leaves no state behind: no pyplot.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.evaluate.adaptive import SweepPoint
from visionmoe.files import atomic_write

_STYLE: dict[Any, Any] = {
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
_BLUE, _ORANGE, _GREEN, _GREY = "#2166ac", "#e66101", "#1b7837", "#9a9a9a"
_EXPERT_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#9c755f")


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
    with matplotlib.rc_context(_STYLE):
        panels = 2 + len(expert_load)
        figure = Figure(figsize=(4.2 * panels, 3.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, panels))
        _loss_panel(axes[0], train)
        axes[1].plot(train["step"], train["accuracy"], color=_BLUE, alpha=0.25, linewidth=1)
        axes[1].plot(train["step"], smooth(train["accuracy"]), color=_BLUE, label="training batches")
        axes[1].plot(evaluations["step"], evaluations["top1"], "o-", color=_ORANGE, markersize=5, label="test images")
        axes[1].set(title="Accuracy", xlabel="step", ylim=(None, 1.0))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[1].legend(loc="lower right")
        for axis, (layer, loads) in zip(axes[2:], expert_load.items(), strict=True):
            _load_panel(axis, layer, train["step"], np.asarray(loads))
        _save(figure, path)


def accuracy_against_compute(path: str | os.PathLike, points: Sequence[SweepPoint], title: str = "") -> None:
    """Top-1 accuracy over capacity and over operations per image, for every K, vanilla and batch-priority routing.

    The form of figure 6 of arXiv 2106.05974.
    """
    with matplotlib.rc_context(_STYLE):
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
                "color": _ORANGE if priority else _BLUE,
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
        _save(figure, path)


def kept_patches(
    path: str | os.PathLike,
    images: np.ndarray,
    kept: Sequence[np.ndarray],
    shares: Mapping[float, float],
    names: Sequence[str],
    title: str = "",
) -> None:
    """A grid: one row per image, first as it is, then with the patches that each capacity drops darkened.

    images: uint8 (N, H, W, 1 or 3). kept: for every capacity factor (N, rows, columns) bool.
    shares: capacity factor -> share of all patches of the batch that are kept, for the headings.
    """
    cells = [[shaded(image, None), *(shaded(image, mask[row]) for mask in kept)] for row, image in enumerate(images)]
    height, width = cells[0][0].shape[:2]
    gap = 8
    picture = mosaic(cells, gap)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        scale = 1.15 / width  # inches per pixel
        figure = Figure(figsize=(scale * picture.shape[1] + 1.0, scale * picture.shape[0] + 0.8))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
        for row, name in enumerate(names):
            axis.text(-gap, row * (height + gap) + height / 2, f"{name} ", ha="right", va="center")
        headings = ["image", *(f"C = {factor:.2g}\n{share:.0%} kept" for factor, share in shares.items())]
        for column, heading in enumerate(headings):
            axis.text(column * (width + gap) + width / 2, -gap, heading, ha="center", va="bottom", fontsize=9)
        axis.text(0, -gap - 0.42 / scale, title, fontsize=12, fontweight="bold", va="bottom")
        _save(figure, path)


def experts_by_class(
    path: str | os.PathLike, shares: Mapping[int, np.ndarray], class_names: Sequence[str], title: str = ""
) -> None:
    """Heat maps, one per sparse layer: which share of each class's tokens asks for each expert.

    shares: block number -> (classes, E) with rows that sum to 1.
    """
    with matplotlib.rc_context({**_STYLE, "axes.grid": False, "axes.titleweight": "normal"}):
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
        _save(figure, path)


def shaded(image: np.ndarray, kept: np.ndarray | None, zoom: int = 112) -> np.ndarray:
    """An image with the patches that are not kept darkened, and thin lines between patches.

    image: uint8 (H, W, 1 or 3). kept: (rows, columns) bool, None: all, without lines. Returns uint8 (h, w, 3),
    enlarged by a whole number to at least `zoom` pixels where it is smaller.
    """
    scale = max(1, zoom // image.shape[0])
    big = np.repeat(np.repeat(np.broadcast_to(image, (*image.shape[:2], 3)), scale, 0), scale, 1).astype(np.float32)
    if kept is None:
        return big.astype(np.uint8)
    height, width = big.shape[0] // kept.shape[0], big.shape[1] // kept.shape[1]
    mask = np.repeat(np.repeat(kept, height, 0), width, 1)[..., None]
    dropped = 0.18 * big + np.array([24, 30, 46], dtype=np.float32)
    big = np.where(mask, big, dropped)
    big[height::height] = 0.75 * big[height::height] + 20
    big[:, width::width] = 0.75 * big[:, width::width] + 20
    return big.astype(np.uint8)


def mosaic(cells: Sequence[Sequence[np.ndarray]], gap: int) -> np.ndarray:
    """Pictures of one size, uint8 (h, w, 3), in rows and columns on white, `gap` pixels apart."""
    height, width = cells[0][0].shape[:2]
    out = np.full(((height + gap) * len(cells) - gap, (width + gap) * len(cells[0]) - gap, 3), 255, dtype=np.uint8)
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            top, left = row * (height + gap), column * (width + gap)
            out[top : top + height, left : left + width] = cell
    return out


def smooth(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """Running mean over a window of `share` of the points, at the ends over fewer."""
    given = np.asarray(values, dtype=np.float64)
    width = max(1, round(share * len(given)))
    ones = np.ones(width)
    return np.convolve(given, ones, mode="same") / np.convolve(np.ones_like(given), ones, mode="same")


def _loss_panel(axis: Axes, train: Mapping[str, Sequence[float]]) -> None:
    axis.plot(train["step"], train["loss"], color=_BLUE, alpha=0.25, linewidth=1)
    axis.plot(train["step"], smooth(train["loss"]), color=_BLUE, label="training loss")
    if "auxiliary_loss" in train:
        axis.plot(train["step"], smooth(train["auxiliary_loss"]), color=_GREEN, label="of it, router's balance")
    axis.set(title="Loss", xlabel="step", ylim=(0, None))
    axis.legend(loc="upper right")


def _load_panel(axis: Axes, layer: str, steps: Sequence[float], loads: np.ndarray) -> None:
    """Stacked shares of the experts, (steps, E)."""
    smoothed = np.stack([smooth(column) for column in loads.T])
    colours = list(itertools.islice(itertools.cycle(_EXPERT_COLOURS), len(smoothed)))
    axis.stackplot(list(steps), smoothed, colors=colours, alpha=0.9, linewidth=0)
    axis.set(title=f"Share of each expert, {layer}", xlabel="step", ylim=(0, 1))
    axis.margins(x=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(False)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
