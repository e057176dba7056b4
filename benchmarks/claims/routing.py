"""Evaluations of trained runs at other routing settings, kept in WORK so that a stopped script goes on."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import runs
from runs import Run

from visionmoe.config import RoutingSetting
from visionmoe.data.loader import EvalLoader
from visionmoe.evaluate.adaptive import sweep
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.store import ResultStore, StoredEvaluator, context_of


def evaluate_settings(
    arguments: argparse.Namespace, sparse: Sequence[Run], settings: Sequence[RoutingSetting]
) -> list[dict[str, Any]]:
    """One row per setting: the setting, flops per image, and top1, loss and dropped over the seeds."""
    loader = runs.loader_of(arguments, sparse[0])
    by_seed = [evaluate_run(run, loader, settings) for run in sparse]
    rows = []
    for points in zip(*by_seed, strict=True):
        same = {
            name: points[0][name] for name in ("num_selected_experts", "capacity_factor", "batch_priority", "flops")
        }
        rows.append(same | {name: runs.over_seeds([p[name] for p in points]) for name in ("top1", "loss", "dropped")})
    return rows


def evaluate_run(run: Run, loader: EvalLoader, settings: Sequence[RoutingSetting]) -> list[dict[str, Any]]:
    """The points of one run's model, as `visionmoe sweep` has them, in the order of the settings."""
    model = run.model()
    first = next(iter(loader))[0]
    store = ResultStore(run.folder)
    evaluate = StoredEvaluator(ClassificationEvaluator(loader), store, context_of(model, loader, first, autocast=False))
    points = sweep(
        model, evaluate, settings, batch_size=len(first), on_point=lambda p: print(run.folder, p, flush=True)
    )
    return [asdict(point) for point in points]


def dense_rows(dense: Sequence[Run]) -> dict[str, Any]:
    """The dense twin on the same images, as its runs evaluated it at their end."""
    return {"flops": dense[0].results["flops_per_image"], "top1": runs.over_seeds([run.top1 for run in dense])}
