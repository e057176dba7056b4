"""The patches that every expert likes most, as a wall of crops."""

import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from visionmoe.analysis.figures.style import STYLE, save
from visionmoe.analysis.gallery import Crop

OUTLINE = np.array([255, 140, 0], dtype=np.uint8)


def gallery(
    path: str | os.PathLike, crops: Sequence[Sequence[Crop]], labels: Sequence[str], title: str = "", cell: int = 92
) -> None:
    """One row per expert, its crops from the strongest on, the patch outlined, the class's name below.

    labels: one per expert, at the left of its row. cell: pixels that the taller side of a crop has at least.
    """
    count, columns = len(crops), max(1, max(len(line) for line in crops))
    example = next((line[0] for line in crops if line), None)
    height, width = (cell, cell) if example is None else outlined(example, cell).shape[:2]
    gap, text = 8, 20
    picture = np.full((count * (height + text) - 2, columns * (width + gap) - gap, 3), 255, np.uint8)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        scale = 0.82 / width  # inches per pixel
        figure = Figure(figsize=(scale * picture.shape[1] + 1.2, scale * picture.shape[0] + 0.5))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        for row, line in enumerate(crops):
            top = row * (height + text)
            axis.text(-gap, top + height / 2, labels[row], ha="right", va="center", fontsize=8, linespacing=1.4)
            for column, crop in enumerate(line):
                left = column * (width + gap)
                picture[top : top + height, left : left + width] = outlined(crop, cell)
                axis.text(left + width / 2, top + height + 3, shortened(crop.class_name), ha="center", va="top",
                          fontsize=6, color="#444444", parse_math=False)  # fmt: skip
        axis.imshow(picture, interpolation="nearest")
        axis.text(0, -0.12 / scale, title, fontsize=11, fontweight="bold", va="bottom")
        save(figure, path)


def outlined(crop: Crop, cell: int) -> np.ndarray:
    """The crop enlarged by a whole number towards `cell` pixels, its patch in an orange frame, uint8 (h, w, 3)."""
    scale = max(1, round(cell / max(crop.pixels.shape[:2])))
    rgb = np.broadcast_to(crop.pixels, (*crop.pixels.shape[:2], 3))
    big = np.repeat(np.repeat(rgb, scale, 0), scale, 1)
    top, left, height, width = (scale * side for side in crop.box)
    inside = np.zeros(big.shape[:2], dtype=bool)
    inside[top : top + height, left : left + width] = True
    inside[top + 2 : top + height - 2, left + 2 : left + width - 2] = False
    big[inside] = OUTLINE
    return big


def shortened(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
