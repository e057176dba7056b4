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
from visionmoe.model.vit import VisionTransformer


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
    batch_size = min(loader.config.eval_batch_size, loader.num_images)
    evaluate = stored_evaluator(run, loader, model)
    points = sweep(
        model, evaluate, settings, batch_size=batch_size, on_point=lambda p: print(run.folder, p, flush=True)
    )
    return [asdict(point) for point in points]


def evaluate_dense(arguments: argparse.Namespace, dense: Sequence[Run]) -> dict[str, Any]:
    """The dense twin on the same images: flops per image, and top1 over the seeds."""
    loader, top1 = runs.loader_of(arguments, dense[0]), []
    for run in dense:
        model = run.model()
        evaluate = stored_evaluator(run, loader, model)
        top1.append(evaluate(model)["top1"])
        print(run.folder, top1[-1], flush=True)
    return {"flops": dense[0].results["flops_per_image"], "top1": runs.over_seeds(top1)}


def stored_evaluator(run: Run, loader: EvalLoader, model: VisionTransformer) -> StoredEvaluator:
    """Results are kept in the run's folder."""
    context = context_of(model, loader, autocast=False)
    return StoredEvaluator(ClassificationEvaluator(loader), ResultStore(run.folder), context)
