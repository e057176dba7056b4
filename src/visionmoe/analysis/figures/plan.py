"""The memory that each layout of a plan needs, as stacked bars."""

import os
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from visionmoe.analysis.figures.style import BLUE, GREEN, GREY, ORANGE, STYLE, save

COLOURS = {"parameters": BLUE, "gradients": ORANGE, "optimizer": GREEN, "activations": "#edc948", "buffers": GREY,
           "process": "#d3d0cb"}  # fmt: skip


def memory_of_layouts(
    path: str | os.PathLike, bars: Sequence[tuple[str, Mapping[str, float]]], limit: float, *, unit: str, title: str
) -> None:
    """bars: layout -> size for one device at its peak in `unit`, by kind (keys of COLOURS). limit: of a device."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.8 + 0.4 * len(bars)), layout="constrained")
        axis = figure.subplots()
        places = range(len(bars))[::-1]
        left = [0.0] * len(bars)
        for kind, colour in COLOURS.items():
            sizes = [kinds.get(kind, 0.0) for _, kinds in bars]
            if not any(sizes):
                continue
            axis.barh(places, sizes, left=left, color=colour, height=0.7, label=kind)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        for place, size in zip(places, left, strict=True):
            axis.annotate(f" {size:.3g}", (size, place), va="center", fontsize=8)
        axis.axvline(limit, color="#333333", linestyle="--", linewidth=1.2, label=f"memory, {limit:g} {unit}")
        axis.set_yticks(list(places), labels=[name for name, _ in bars], fontsize=8)
        axis.set(title=f"{title}: peak of one device", xlabel=unit)
        axis.margins(x=0.1)
        figure.legend(loc="outside lower center", ncols=7, fontsize=8)
        save(figure, path)
