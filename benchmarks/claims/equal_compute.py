"""V-MoE against the dense ViT of equal training FLOPs: accuracy over training FLOPs and over training seconds.

    python benchmarks/claims/equal_compute.py --data-set cifar10 --images parquet:PATH
    python benchmarks/claims/equal_compute.py --data-set fashion_mnist

Evaluates nothing itself: the accuracies are those that the runs logged. Seconds are the steps made times the seconds of
one step, which is measured here, for both models in turns on the same machine (`step_time`).
"""

import itertools
from typing import Any

import figures
import runs
from runs import Run
from step_time import seconds_per_step

from visionmoe.train.log import read_log


def main() -> None:
    arguments = runs.parser(__doc__).parse_args()
    compared = {kind: runs.trained(arguments, kind) for kind in runs.KINDS}
    seconds = seconds_per_step({kind: own[0] for kind, own in compared.items()})
    curves = {kind: [curve(run, seconds[kind]) for run in own] for kind, own in compared.items()}
    content = {
        "facts": {kind: runs.facts(own[0]) for kind, own in compared.items()},
        "num_images": {split: runs.loader_of(arguments, compared["dense"][0], split).num_images
                       for split in ("train", "test")},
        "seconds_per_step": seconds,
        "wall_seconds": {kind: runs.over_seeds([run.results["train_seconds"] for run in own])
                         for kind, own in compared.items()},
        "final_top1": {kind: runs.over_seeds([run.top1 for run in own]) for kind, own in compared.items()},
        "compared": compare(curves["sparse"], curves["dense"]),
        "curves": curves,
    }  # fmt: skip
    report = runs.write_report(arguments, "equal_compute", content)
    figures.draw("equal_compute", report, arguments.pictures)


def curve(run: Run, seconds: float) -> list[dict[str, Any]]:
    """Every evaluation of a run, in order: step, top1, loss, train_flops and train_seconds up to there.

    seconds: of one step.
    """
    return [
        {
            "step": record["step"],
            **{name: record["metrics"][name] for name in ("top1", "loss")},
            "train_flops": runs.train_flops(run, record["step"]),
            "train_seconds": record["step"] * seconds,
        }
        for record in read_log(run.folder / "log.jsonl")
        if record["kind"] == "eval" and record["name"] == "test"
    ]


def compare(sparse: list[list[dict]], dense: list[list[dict]]) -> dict[str, Any]:
    """Differences in top-1 (sparse less dense) of the runs of the same seed.

    final: when both have finished, at equal FLOPs. at_dense_seconds: when the dense run has finished, while the sparse
    one is still training (its accuracy between two evaluations is interpolated). to_dense_accuracy: shares of the dense
    run's FLOPs and seconds after which the sparse run first is as accurate as the dense run ends; null: never.
    """
    pairs = list(zip(sparse, dense, strict=True))
    early = [interpolated(s, "train_seconds", d[-1]["train_seconds"]) - d[-1]["top1"] for s, d in pairs]
    reached = {}
    for axis in ("train_flops", "train_seconds"):
        shares = [first_reached(s, axis, d[-1]["top1"]) for s, d in pairs]
        reached[axis] = [x and x / d[-1][axis] for x, (_, d) in zip(shares, pairs, strict=True)]
    return {
        "final": runs.over_seeds([s[-1]["top1"] - d[-1]["top1"] for s, d in pairs]),
        "at_dense_seconds": runs.over_seeds(early),
        "to_dense_accuracy": reached,
    }


def interpolated(points: list[dict], axis: str, x: float) -> float:
    """top1 at x, on the line between the evaluations before and after; at the ends those."""
    before = [p for p in points if p[axis] <= x]
    after = [p for p in points if p[axis] > x]
    if not before or not after:
        return (before or points)[-1 if before else 0]["top1"]
    left, right = before[-1], after[0]
    share = (x - left[axis]) / (right[axis] - left[axis])
    return left["top1"] + share * (right["top1"] - left["top1"])


def first_reached(points: list[dict], axis: str, top1: float) -> float | None:
    """Where the line through the evaluations first is at `top1`; None: nowhere."""
    for left, right in itertools.pairwise(points):
        if left["top1"] >= top1:
            return left[axis]
        if right["top1"] >= top1:
            share = (top1 - left["top1"]) / (right["top1"] - left["top1"])
            return left[axis] + share * (right[axis] - left[axis])
    return points[-1][axis] if points[-1]["top1"] >= top1 else None


if __name__ == "__main__":
    runs.run_script(main)
