"""Pictures of a benchmark, from the rows of its results.json."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visionmoe.analysis.figures.style import BLUE, EXPERT_COLOURS, GREEN, GREY, ORANGE, STYLE, save

Rows = Sequence[Mapping[str, Any]]
COLOURS = {"float32": BLUE, "bfloat16": ORANGE}
AXES = {
    "tokens": "tokens",
    "num_experts": "experts, E",
    "num_selected_experts": "experts per token, K",
    "capacity_factor": "capacity factor, C",
}


def targets(path: str | os.PathLike, rows: Rows) -> None:
    """Every row with a target as a bar: the measured figure over the target's, which is the line at 1.

    Figures that should be high are turned round, so that shorter is better everywhere.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1 + 0.36 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            sign, limit = row["target"].split()
            share = row["value"] / float(limit)
            share = max(0.0, share if sign == "<=" else 1 / share)
            axis.barh(place, share, color=GREEN if row["met"] else ORANGE, height=0.7)
            axis.annotate(f" {row['value']:.3g} ({row['target']})", (share, place), va="center", fontsize=7)
        labels = ["\n".join(f"{row['what']}, {row['dtype']}".split("; ")) for row in reversed(rows)]
        axis.set_yticks(range(len(rows)), labels=labels, fontsize=6)
        axis.axvline(1.0, color=GREY, linestyle="--", linewidth=1.2)
        axis.set(title="Measured over target (left of the line: met)", xlim=(0, None))
        axis.margins(x=0.15)
        save(figure, path)


def speeds(path: str | os.PathLike, rows: Rows) -> None:
    """Images per second of whole models: one panel per size, inference above, training steps below."""
    rows = [row for row in rows if row["unit"] == "images/s"]
    if not rows:
        return
    sizes = list(dict.fromkeys(row["details"]["size"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 3.6 * len(sizes), 6.4), layout="constrained")
        axes = np.atleast_2d(figure.subplots(2, len(sizes), squeeze=False))
        for column, size in enumerate(sizes):
            for line, (title, training) in enumerate((("inference", False), ("training step", True))):
                own = [
                    row for row in rows
                    if row["details"]["size"] == size and row["details"]["work"].startswith("training") == training
                ]  # fmt: skip
                _bars(axes[line, column], own)
                axes[line, column].set(title=f"{size}, {title}", ylabel="images/s")
        axes[0, 0].legend(loc="upper right", fontsize=8)
        save(figure, path)


def _bars(axis: Axes, rows: Rows) -> None:
    variants = list(dict.fromkeys(row["details"]["variant"] for row in rows))
    for number, (dtype, colour) in enumerate(COLOURS.items()):
        # the dense model was timed beside each sparse one: the last of its rows
        found = {row["details"]["variant"]: row["value"] for row in rows if row["dtype"] == dtype}
        places = [place + (number - 0.5) * 0.4 for place, v in enumerate(variants) if v in found]
        axis.bar(places, [found[v] for v in variants if v in found], 0.38, color=colour, label=dtype)
    axis.set_xticks(range(len(variants)), labels=[v.replace(", ", ",\n") for v in variants], rotation=40, fontsize=7)


def growth(path: str | os.PathLike, rows: Rows) -> None:
    """Time of the layer over tokens, E, K and C; dashed the dense MLP of equal kept requests."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 3.8), layout="constrained")
        for panel, (axis_name, label) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
            for dtype, colour in COLOURS.items():
                own = [r for r in rows if r["details"]["axis"] == axis_name and r["dtype"] == dtype]
                own.sort(key=lambda row: row["details"]["at"])
                at = [row["details"]["at"] for row in own]
                panel.plot(at, [row["ms"] for row in own], "o-", color=colour, markersize=4, label=f"layer, {dtype}")
                panel.plot(at, [row["reference_ms"] for row in own], "--", color=colour, linewidth=1.2,
                           label=f"dense MLP, {dtype}")  # fmt: skip
            panel.set(title=f"Time over {label}", xlabel=label, ylabel="ms", ylim=(0, None))
        panel.legend(fontsize=8)
        save(figure, path)


def shares(path: str | os.PathLike, rows: Rows) -> None:
    """The stages around the experts' products, each by itself, as shares of the layer."""
    own = [row for row in rows if "stage" in row["details"]]
    bars = list(dict.fromkeys((row["details"]["size"], row["dtype"]) for row in own))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 1.6 * len(bars), 4), layout="constrained")
        axis = figure.subplots()
        bottom = np.zeros(len(bars))
        for colour, stage in zip(EXPERT_COLOURS, dict.fromkeys(row["details"]["stage"] for row in own), strict=False):
            found = {(r["details"]["size"], r["dtype"]): r["value"] for r in own if r["details"]["stage"] == stage}
            heights = np.array([found[bar] for bar in bars])
            axis.bar(range(len(bars)), heights, 0.6, bottom=bottom, color=colour, label=stage)
            bottom += heights
        axis.set_xticks(range(len(bars)), labels=[f"{size}\n{dtype}" for size, dtype in bars], fontsize=8)
        axis.set(title="Around the products: each stage by itself", ylabel="share of the layer")
        axis.legend(fontsize=8)
        save(figure, path)


def memory(path: str | os.PathLike, rows: Rows) -> None:
    """Peak memory of each model at each work."""
    works = list(dict.fromkeys((row["details"]["work"], row["dtype"]) for row in rows))
    variants = list(dict.fromkeys(row["details"]["variant"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 + 2.4 * len(works), 4), layout="constrained")
        axis = figure.subplots()
        for number, (variant, colour) in enumerate(zip(variants, EXPERT_COLOURS, strict=False)):
            found = {(r["details"]["work"], r["dtype"]): r["value"] for r in rows if r["details"]["variant"] == variant}
            places = np.arange(len(works)) + (number - (len(variants) - 1) / 2) * 0.8 / len(variants)
            axis.bar(places, [found[work] for work in works], 0.76 / len(variants), color=colour, label=variant)
        axis.set_xticks(range(len(works)), labels=[f"{work}\n{dtype}" for work, dtype in works], fontsize=8)
        axis.set(title="Peak memory", ylabel="MiB")
        axis.legend(fontsize=8)
        save(figure, path)
