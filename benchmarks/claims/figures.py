"""The pictures of the results, from the stored JSON files.

python benchmarks/claims/figures.py    # draws all that have results, again
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

from visionmoe.analysis.figures.style import BLUE, GREEN, GREY, ORANGE, STYLE, save
from visionmoe.files import read_json

NAMES = {"sparse": "V-MoE", "dense": "dense ViT"}
COLOURS = {"sparse": ORANGE, "dense": BLUE}
TITLES = {"cifar10": "CIFAR-10-sized photographs", "fashion_mnist": "Fashion-MNIST"}
SPREAD = "mean of {} seeds, shaded: standard deviation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=runs.RESULTS)
    parser.add_argument("--pictures", type=Path, default=runs.PICTURES)
    arguments = parser.parse_args()
    for name in DRAWERS:
        for data_set in runs.RECIPES:
            path = arguments.results / f"{name}_{data_set}.json"
            if path.is_file():
                draw(name, read_json(path), arguments.pictures)


def draw(name: str, report: dict[str, Any], folder: Path) -> None:
    """PICTURES/results_NAME_DATA_SET.png"""
    path = folder / f"results_{name}_{report['data_set']}.png"
    with matplotlib.rc_context(STYLE):
        save(DRAWERS[name](report), path)
    print(f"picture: {path}")


def equal_compute(report: dict[str, Any]) -> Figure:
    """Accuracy over training FLOPs, and over training seconds; thin lines are the seeds."""
    figure, (left, right) = panels(report, 2, sharey=True)
    for axis, name, unit in ((left, "train_flops", 1e12), (right, "train_seconds", 60.0)):
        for kind, own in report["curves"].items():
            x = np.array([[p[name] for p in points] for points in own]) / unit
            y = np.array([[p["top1"] for p in points] for points in own])
            for each_x, each_y in zip(x, y, strict=True):
                axis.plot(each_x, each_y, color=COLOURS[kind], linewidth=0.8, alpha=0.5)
            axis.plot(x.mean(0), y.mean(0), "o-", color=COLOURS[kind], markersize=5, label=NAMES[kind])
        percent(axis)
        axis.set_xlim(0, None)
    left.set(title="Equal training compute", xlabel="training compute, TFLOP", ylabel="test accuracy")
    right.set(title="Equal time on one core", xlabel="training time, minutes")
    left.legend(loc="lower right", title=f"thick: mean of {report['seeds']} seeds")
    return figure


def capacity(report: dict[str, Any]) -> Figure:
    """Accuracy over the capacity factor and over operations, in both orders."""
    figure, (left, right) = panels(report, 2, sharey=True)
    for priority, colour, label in ((True, ORANGE, "batch-priority"), (False, BLUE, "vanilla order")):
        rows = [row for row in report["rows"] if row["batch_priority"] == priority]
        rows.sort(key=lambda row: row["capacity_factor"])
        line(left, [row["capacity_factor"] for row in rows], [row["top1"] for row in rows], colour, label)
        # above the trained capacity nothing more is paid for, so the line would turn back on itself
        rows = [row for row in rows if row["capacity_factor"] <= 1.05]
        line(right, [row["flops"] / 1e6 for row in rows], [row["top1"] for row in rows], colour, label)
    dense(left, report, None)
    dense(right, report, report["dense"]["flops"] / 1e6)
    factors = sorted({row["capacity_factor"] for row in report["rows"]})
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator([c for c in factors if c != 1.05 or 1.0 not in factors]))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.invert_xaxis()
    left.set(title="Experts with fewer and fewer places", xlabel="capacity factor C", ylabel="test accuracy")
    right.set(title="Accuracy against compute", xlabel="million operations per image")
    left.legend(loc="lower left", title=SPREAD.format(report["seeds"]))
    return figure


def experts_per_token(report: dict[str, Any]) -> Figure:
    """Change of accuracy, seed by seed, over K and over operations."""
    figure, (left, right) = panels(report, 2, sharey=True)
    trained = report["trained_num_selected_experts"]
    base = next(row for row in report["same_factor"] if row["num_selected_experts"] == trained)
    for name, colour, label in (
        ("same_factor", ORANGE, f"C = {report['trained_capacity_factor']:g}"),
        ("same_places", BLUE, f"K C = {report['trained_capacity_factor'] * trained:g}"),
    ):
        rows = report[name]
        changes = [difference(row["top1"], base["top1"]) for row in rows]
        line(left, [row["num_selected_experts"] for row in rows], changes, colour, label)
        line(right, [row["flops"] / 1e6 for row in rows], changes, colour, label)
        for row, change in zip(rows, changes, strict=True):
            if name == "same_factor":
                right.annotate(f"K={row['num_selected_experts']}", (row["flops"] / 1e6, change["mean"]),
                               textcoords="offset points", xytext=(-4, -16), color="#555555", fontsize=8)  # fmt: skip
    lowest, highest = left.get_ylim()
    left.set_ylim(min(lowest, -0.02), max(highest, 0.01))  # a small change is to look small
    left.axvline(trained, color=GREY, linewidth=1, linestyle="--")
    left.annotate(" trained", (trained, 0.94), xycoords=("data", "axes fraction"), color="#777777", fontsize=8)
    left.xaxis.set_major_locator(FixedLocator([row["num_selected_experts"] for row in report["same_factor"]]))
    left.set(title="K changed after training", xlabel="experts per token K", ylabel="change of test accuracy")
    right.set(title="Against compute", xlabel="million operations per image")
    left.legend(loc="lower right", title=SPREAD.format(report["seeds"]))
    return figure


def specialisation(report: dict[str, Any]) -> Figure:
    """Bits about class and place per sparse block, and accuracy with its experts drawn at random."""
    figure, (left, right) = panels(report, 2)
    blocks = list(report["layers"])
    at = np.arange(len(blocks))
    for offset, kind, colour in ((-0.2, "class", ORANGE), (0.2, "position", BLUE)):
        found = [report["layers"][n][f"{kind}_bits"] for n in blocks]
        bars(left, at + offset, found, colour, f"about the {'class' if kind == 'class' else 'place'}", 0.36)
    left.set_xticks(at, [f"block {n}" for n in blocks])
    left.set(title="What a token's expert tells", ylabel="bits, beyond chance")
    left.legend(title=f"mean of {report['seeds']} seeds, points: each")
    cases = {"as trained": report["top1"]}
    cases |= {f"block {n}\nat random": report["layers"][n]["random_router_top1"] for n in blocks}
    cases |= {"all\nat random": report["all_random_top1"]} if len(blocks) > 1 else {}
    bars(right, np.arange(len(cases)), list(cases.values()), GREY, None, 0.6)
    right.set_xticks(np.arange(len(cases)), list(cases))
    right.set(title="Accuracy with experts drawn at random", ylabel="test accuracy")
    percent(right)
    for axis in (left, right):
        axis.grid(axis="x", visible=False)
    return figure


def transfer(report: dict[str, Any]) -> Figure:
    """Few-shot accuracy on the target and on the models' own classes, and fine-tuning against scratch."""
    figure, axes = panels(report, 3)
    for axis, name, title in ((axes[0], "target", f"Few-shot on {report['target']}"),
                              (axes[1], "own", "Few-shot on their own images")):  # fmt: skip
        for kind in report["few_shot"]:
            line(axis, report["shots"], report["few_shot"][kind][name], COLOURS[kind], NAMES[kind])
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(report["shots"]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set(title=title, xlabel="images per class", ylabel="test accuracy")
    tuning = report["fine_tuning"]["top1"]
    starts = list(tuning["sparse"])
    for offset, kind in ((-0.2, "sparse"), (0.2, "dense")):
        found = [tuning[kind][start] for start in starts]
        bars(axes[2], np.arange(len(starts)) + offset, found, COLOURS[kind], NAMES[kind], 0.36)
    axes[2].set_xticks(np.arange(len(starts)), starts)
    axes[2].set(title=f"Trained on {report['target']}, {report['fine_tuning']['subset']}")
    axes[2].grid(axis="x", visible=False)
    for axis in axes:
        percent(axis)
    axes[0].legend(loc="lower right")
    return figure


DRAWERS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "equal_compute": equal_compute,
    "capacity": capacity,
    "experts_per_token": experts_per_token,
    "specialisation": specialisation,
    "transfer": transfer,
}


def panels(report: dict[str, Any], count: int, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.0 * count, 4.2), layout="constrained")
    figure.suptitle(TITLES[report["data_set"]], x=0.01, ha="left", fontsize=10, color="#555555")
    return figure, figure.subplots(1, count, **options)


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of the same seeds."""
    return runs.over_seeds([a - b for a, b in zip(one["per_seed"], other["per_seed"], strict=True)])


def line(axis: Axes, x: Sequence[float], found: Sequence[dict[str, Any]], colour: str, label: str) -> None:
    """Means with a band of one standard deviation."""
    mean, std = (np.array([one[name] for one in found]) for name in ("mean", "std"))
    axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axis.plot(x, mean, "o-", color=colour, markersize=5, label=label)
    percent(axis)


def percent(axis: Axes) -> None:
    """The vertical axis in percents."""
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def bars(axis: Axes, at: np.ndarray, found: Sequence[dict], colour: str, label: str | None, width: float) -> None:
    """Means as bars, the seeds as points."""
    axis.bar(at, [one["mean"] for one in found], width, color=colour, alpha=0.8, label=label)
    for x, one in zip(at, found, strict=True):
        axis.plot([x] * len(one["per_seed"]), one["per_seed"], "o", color="#333333", markersize=3)


def dense(axis: Axes, report: dict[str, Any], x: float | None) -> None:
    """The dense twin: a dotted line, and a diamond at its operations."""
    top1 = report["dense"]["top1"]["mean"]
    axis.axhline(top1, color=GREEN, linewidth=1.2, linestyle=":")
    if x is None:
        axis.annotate("dense ViT of equal training FLOPs", (0.98, top1), xycoords=("axes fraction", "data"), ha="right",
                      textcoords="offset points", xytext=(0, 3), color=GREEN, fontsize=8)  # fmt: skip
    else:
        axis.plot(x, top1, "D", color=GREEN, markersize=7)


if __name__ == "__main__":
    runs.run_script(main)
