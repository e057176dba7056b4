"""The demonstration: a small V-MoE trained on the embedded images, evaluated, swept over capacities, and drawn.

`make demo` runs this. It is `visionmoe train --recipe fashion_mnist`, `visionmoe evaluate` and `visionmoe sweep` in one
go; started again after a stop, it goes on where it was.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionmoe.analysis.report import FACTORS, draw_report
from visionmoe.checkpoint.load import load
from visionmoe.cli.evaluation import summary
from visionmoe.cli.main import warnings_on_stderr
from visionmoe.cli.shared import output_folder, progress
from visionmoe.cli.sweep import table
from visionmoe.cli.training import DEFAULT_RECIPE, train
from visionmoe.config import to_dict
from visionmoe.data.loader import EvalLoader
from visionmoe.evaluate.adaptive import SweepPoint, routing_grid, sweep
from visionmoe.evaluate.classify import ClassificationEvaluator, evaluate
from visionmoe.evaluate.store import ResultStore, StoredEvaluator, context_of
from visionmoe.files import write_json
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.config import TrainConfig, assign
from visionmoe.train.log import read_log
from visionmoe.train.loop import TrainingDivergedError
from visionmoe.train.recipes import get_recipe
from visionmoe.train.setup import ConfigChangedError

LOWEST_ACCURACY = 0.87  # below this the training did not work; the recipe reaches 88 %


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="visionmoe.demo", description="Train, evaluate and draw a small V-MoE.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of everything (default: out/demo)")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="NAME=VALUE",
                        help="change a field of the run's config")  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        with warnings_on_stderr():
            return run(arguments.out, arguments.changes)
    except KeyboardInterrupt:
        print("\nvisionmoe.demo: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    except TrainingDivergedError as error:
        print(f"visionmoe.demo: {error}", file=sys.stderr)
        return 1
    except ConfigChangedError as error:
        print(f"visionmoe.demo: {arguments.out} holds a demo of another recipe ({error}): delete it, or choose another "
              "folder (make demo OUT=...)", file=sys.stderr)  # fmt: skip
        return 2
    except (ValueError, OSError) as error:
        print(f"visionmoe.demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(out: Path, changes: Sequence[str] = (), lowest_accuracy: float = LOWEST_ACCURACY) -> int:
    """Does everything; returns the exit code."""
    output_folder(out)
    config = assign(dataclasses.replace(get_recipe(DEFAULT_RECIPE), out=str(out / "run")), changes)
    print(f"Training a small V-MoE on {config.data.source} (12,000 training, 2,000 test images); results go to {out}/")
    trained = train(config, resume=(out / "run" / "config.json").exists())
    if trained["status"] != "finished":
        print(f"stopped at step {trained['step']} of {trained['total_steps']}; the same command goes on from there")
        return trained["exit_code"]
    model = load(trained["model"])
    loader = EvalLoader(config.data)
    result = evaluate(model, loader, class_names=loader.class_names)
    points = run_sweep(model, loader, ResultStore(out))
    pictures = draw_report(out, model, loader, read_log(out / "run" / "log.jsonl"), points, loader.class_names)
    write_json(out / "results.json", results_of(config, trained, model, result, points, pictures))
    for line in closing_words(out, trained, result, points, pictures):
        print(line)
    if result["top1"] < lowest_accuracy:
        print(f"the accuracy is below {lowest_accuracy:.0%}: the training did not work", file=sys.stderr)
        return 1
    return 0


def run_sweep(model: VisionTransformer, loader: EvalLoader, store: ResultStore) -> list[SweepPoint]:
    """The trained model at capacities 1.0 ... 0.1, K = 1 and 2, vanilla and batch-priority. Settings that are in the
    store are not evaluated again."""
    settings = routing_grid((2, 1), FACTORS)
    print(f"Evaluating the trained model at {len(settings)} routing settings")
    with progress("sweep", len(settings) * loader.num_images) as advance:
        classify = ClassificationEvaluator(loader, on_batch=advance)
        context = context_of(model, loader, autocast=False)
        return sweep(
            model, StoredEvaluator(classify, store, context, on_reuse=lambda: advance(loader.num_images)), settings
        )


def results_of(
    config: TrainConfig,
    trained: dict[str, Any],
    model: VisionTransformer,
    result: dict[str, Any],
    points: Sequence[SweepPoint],
    pictures: dict[str, str],
) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "test_accuracy": result["top1"],
        "test": result,
        "sweep": [dataclasses.asdict(point) for point in points],
        "training": trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": count_flops(model),
        "model_config": to_dict(model.config),
        "run_config": to_dict(config),
        "pictures": pictures,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def closing_words(
    out: Path,
    trained: dict[str, Any],
    result: dict[str, Any],
    points: Sequence[SweepPoint],
    pictures: dict[str, str],
) -> list[str]:
    """A summary for people."""
    lowest, k = min(p.capacity_factor for p in points), max(p.num_selected_experts for p in points)
    shown = [p for p in points if p.num_selected_experts == k and p.capacity_factor in (1.0, 0.5, lowest)]
    return [
        "",
        f"Trained {trained['total_steps']} steps in {trained['train_seconds'] / 60:.1f} minutes, "
        f"{trained['num_parameters']:,} parameters.",
        *summary(result),
        "",
        *table(sorted(shown, key=lambda p: (p.batch_priority, -p.capacity_factor))),
        "",
        *(f"  {out / name}: {what}" for name, what in pictures.items()),
        f"  {out / 'results.json'}: all numbers",
        f"  {trained['model']}: the trained model, for visionmoe.load",
    ]


if __name__ == "__main__":
    sys.exit(main())
