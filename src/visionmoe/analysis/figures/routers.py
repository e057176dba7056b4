"""What the routers of all sparse layers do: weights, loads, entropies, information, and what they are worth."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from visionmoe.analysis.figures.style import BLUE, EXPERT_COLOURS, GREEN, GREY, ORANGE, STYLE, save

CHOICES = ("first choice", "second choice", "third choice")


def combine_weights(path: str | os.PathLike, counts: Mapping[int, np.ndarray], title: str = "") -> None:
    """Histograms of the combine weights of each choice, one panel per sparse layer.

    counts: block number -> (K, bins) over 0 .. 1.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(counts), title)
        for axis, (layer, table) in zip(axes, counts.items(), strict=False):
            edges = np.linspace(0, 1, table.shape[1] + 1)
            for rank, line in enumerate(table):
                colour = EXPERT_COLOURS[rank % len(EXPERT_COLOURS)]
                share = line / max(1, line.sum())
                name = CHOICES[rank] if rank < len(CHOICES) else f"choice {rank + 1}"
                axis.stairs(share, edges, fill=True, alpha=0.55, color=colour, label=name if len(table) > 1 else None)
                axis.stairs(share, edges, color=colour, linewidth=1.2)
            axis.set(title=f"block {layer}", xlabel="router's probability", xlim=(0, 1))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[0].set_ylabel("share of tokens")
        if len(next(iter(counts.values()))) > 1:
            axes[0].legend(loc="upper right")
        save(figure, path)


def entropies(path: str | os.PathLike, counts: Mapping[int, np.ndarray], highest: float, title: str = "") -> None:
    """Histograms of the entropy of the tokens' probabilities. counts: block -> (bins,) over 0 .. highest bits."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(counts), title)
        for axis, (layer, line) in zip(axes, counts.items(), strict=False):
            edges = np.linspace(0, highest, len(line) + 1)
            share = line / max(1, line.sum())
            axis.stairs(share, edges, fill=True, alpha=0.55, color=GREEN)
            axis.stairs(share, edges, color=GREEN, linewidth=1.2)
            mean = (share * (edges[:-1] + edges[1:]) / 2).sum()
            axis.axvline(mean, color="#333333", linewidth=1, linestyle=":")
            axis.set(title=f"block {layer}: {mean:.2f} bits in the mean", xlabel="entropy in bits", xlim=(0, highest))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[0].set_ylabel("share of tokens")
        save(figure, path)


def expert_load(
    path: str | os.PathLike, asked: Mapping[int, np.ndarray], kept: Mapping[int, np.ndarray], title: str = ""
) -> None:
    """Bars per expert: the share of all requests, in two parts, kept and dropped. asked, kept: block -> (E,) counts."""
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure, axes = _panels(len(asked), title)
        for axis, layer in zip(axes, asked, strict=False):
            total = max(1, asked[layer].sum())
            experts = np.arange(len(asked[layer]))
            axis.bar(experts, kept[layer] / total, color=BLUE, label="processed")
            dropped = (asked[layer] - kept[layer]) / total
            axis.bar(experts, dropped, bottom=kept[layer] / total, color=ORANGE, label="dropped")
            axis.axhline(1 / len(experts), color="#333333", linewidth=1, linestyle=":", label="equal shares")
            axis.set(title=f"block {layer}: {dropped.sum():.1%} dropped", xlabel="expert")
            if len(experts) <= 16:
                axis.set_xticks(experts)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_ylim(0, 1.35 * (asked[layer] / total).max())
        axes[0].set_ylabel("share of requests")
        axes[0].legend(loc="upper right", ncols=3, fontsize=8, columnspacing=1.0, handlelength=1.4)
        save(figure, path)


def mutual_information(
    path: str | os.PathLike, found: Mapping[str, Mapping[int, Mapping[str, float]]], title: str = ""
) -> None:
    """Bars per sparse layer: bits about the class and about the position, beside those of shuffled labels.

    found: "class" and "position" -> block number -> bits, shuffled_mean, shuffled_std.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "y"}):
        layers = list(next(iter(found.values())))
        figure = Figure(figsize=(max(6.0, 2.0 + 1.1 * len(layers)), 3.6), layout="constrained")
        axis = figure.subplots()
        colours = {"class": ORANGE, "position": BLUE}
        for number, (name, by_layer) in enumerate(found.items()):
            place = np.arange(len(layers)) + (number - 0.5) * 0.4
            bars = axis.bar(place - 0.06, [by_layer[n]["bits"] for n in layers], 0.24, color=colours[name],
                            label=f"expert and {name}")  # fmt: skip
            axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
            axis.bar(place + 0.12, [by_layer[n]["shuffled_mean"] for n in layers], 0.12, color=GREY,
                     yerr=[by_layer[n]["shuffled_std"] for n in layers], ecolor="#333333",
                     label="the same, shuffled" if number else None)  # fmt: skip
        axis.set_xticks(range(len(layers)), labels=[f"block {n}" for n in layers])
        axis.set_ylabel("bits")
        axis.margins(y=0.15)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _title(figure, title)
        save(figure, path)


def random_routers(path: str | os.PathLike, result: Mapping[str, Any], title: str = "") -> None:
    """Accuracy with one router at random, and with all from the bottom up. result: of `random_router.summarise`."""
    with matplotlib.rc_context(STYLE):
        layers = list(result["alone"])
        figure = Figure(figsize=(max(6.5, 3.5 + 0.8 * len(layers)), 3.8), layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(layers))
        trained = result["trained"]["top1"]
        axis.axhline(trained, color="#333333", linewidth=1.2, linestyle=":", label=f"all as trained: {trained:.1%}")
        lines = (("alone", BLUE, "o", "this block alone"), ("cumulative", ORANGE, "s", "this block and all below"))
        for number, (key, colour, marker, label) in enumerate(lines):
            mean = [result[key][n]["mean"] for n in layers]
            std = [result[key][n]["std"] for n in layers]
            axis.errorbar(places + (number - 0.5) * 0.08, mean, std, color=colour, marker=marker, markersize=6,
                          capsize=3, label=label)  # fmt: skip
            other = [result["cumulative" if key == "alone" else "alone"][n]["mean"] for n in layers]
            for place in range(number, len(layers)):  # the first point is common to both
                side = 1 if mean[place] >= other[place] else -1
                axis.annotate(f"{mean[place]:.1%}", (place, mean[place]), (9, 8 * side), textcoords="offset points",
                              fontsize=8, color=colour, va="center")  # fmt: skip
        axis.set_xticks(places, labels=[f"block {n}" for n in layers])
        axis.set_xlim(-0.4, len(layers) - 0.4)
        axis.set(xlabel="experts drawn at random in", ylabel="top-1")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.margins(y=0.15)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _title(figure, title)
        save(figure, path)


def position_maps(
    path: str | os.PathLike,
    maps: Mapping[str, Sequence[tuple[int, np.ndarray]]],
    title: str = "",
    shares: Sequence[str] = (),
) -> None:
    """Maps of one value per patch, a row per quantity. maps: its name -> [(block number, (rows, columns)), ...].

    shares: names of quantities between 0 and 1, whose colours span that and are named in percent.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titleweight": "normal"}):
        columns = max(len(line) for line in maps.values())
        figure = Figure(figsize=(max(5.0, 1.9 * columns + 1.6), 1.9 * len(maps) + 0.5), layout="constrained")
        axes = figure.subplots(len(maps), columns, squeeze=False)
        for line, (name, entries) in zip(axes, maps.items(), strict=True):
            lowest, highest = min(m.min() for _, m in entries), max(m.max() for _, m in entries)
            if name in shares:
                lowest, highest = 0.0, 1.0
            for axis, (layer, values) in zip(line, entries, strict=True):
                picture = axis.imshow(values, cmap="viridis", vmin=lowest, vmax=highest)
                axis.set(xticks=[], yticks=[])
                axis.set_title(f"block {layer}", fontsize=9, pad=4)
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name, fontsize=9)
            bar = figure.colorbar(picture, ax=list(line), shrink=0.9, pad=0.02)
            bar.outline.set_visible(False)
            if name in shares:
                bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        _title(figure, title)
        save(figure, path)


def _panels(count: int, title: str, most: int = 4) -> tuple[Figure, list[Axes]]:
    """Equal panels, at most `most` in a row; those beyond `count` are hidden."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.0, 3.6 * columns), 2.7 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.set_axis_off()
    _title(figure, title)
    return figure, axes


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
