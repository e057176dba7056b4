"""Photographs and their patches."""

import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from visionmoe.analysis.figures.style import STYLE, save


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
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        scale = 1.15 / width  # inches per pixel
        figure = Figure(figsize=(scale * picture.shape[1] + 1.0, scale * picture.shape[0] + 0.8))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
        for row, name in enumerate(names):
            axis.text(-gap, row * (height + gap) + height / 2, f"{name} ", ha="right", va="center", parse_math=False)
        headings = ["image", *(f"C = {factor:.2g}\n{share:.0%} kept" for factor, share in shares.items())]
        for column, heading in enumerate(headings):
            axis.text(column * (width + gap) + width / 2, -gap, heading, ha="center", va="bottom", fontsize=9)
        axis.text(0, -gap - 0.42 / scale, title, fontsize=12, fontweight="bold", va="bottom")
        save(figure, path)


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
