"""Transfer of trained V-MoE and dense models to other images: few-shot, and fine-tuned on a small subset.

    python benchmarks/claims/transfer.py --data-set cifar10 --images parquet:PATH
    python benchmarks/claims/transfer.py --data-set fashion_mnist --target parquet:PATH

Few-shot: ridge regression on frozen features, k images per class out of train[:2500], as `visionmoe fewshot` does it,
on the target's test images and on those of --split of the images that the models were trained on. Fine-tuning: every
seed's model with a new head, and for comparison the same model from scratch, on the target's --subset, with the
recipe's optimizer and the same number of steps; the peak learning rates of the two are options.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import figures
import runs
from runs import Run

from visionmoe.data.config import DataConfig
from visionmoe.data.loader import EvalLoader
from visionmoe.evaluate.features import FeatureCache
from visionmoe.evaluate.fewshot import FewShotData, FewShotEvaluator
from visionmoe.train.config import TrainConfig
from visionmoe.train.recipes import get_recipe

STARTS = ("fine-tuned", "scratch")


def main() -> None:
    arguments = parse()
    compared = {kind: runs.trained(arguments, kind) for kind in runs.KINDS}
    few = {kind: few_shot(arguments, own) for kind, own in compared.items()}
    tuned = {kind: {start: runs.over_seeds([fine_tuned(arguments, run, start) for run in own]) for start in STARTS}
             for kind, own in compared.items()}  # fmt: skip
    content = {
        "target": "fashion-mnist" if arguments.target == "fashion-mnist" else "other images",
        "shots": arguments.shots,
        "few_shot_seeds": len(arguments.few_shot_seeds),
        "few_shot": few,
        "fine_tuning": {"subset": arguments.subset, "steps": arguments.steps, "batch_size": arguments.batch_size,
                        "rate": arguments.rate, "scratch_rate": arguments.scratch_rate, "top1": tuned},
    }  # fmt: skip
    report = runs.write_report(arguments, "transfer", content)
    figures.draw("transfer", report, arguments.pictures)


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__)
    parser.add_argument("--target", help="images to transfer to; default for cifar10: fashion-mnist")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 25])
    parser.add_argument("--few-shot-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--subset", default="train[:1000]", help="split of the target to fine-tune on")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--scratch-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    arguments.target = arguments.target or ("fashion-mnist" if arguments.data_set == "cifar10" else None)
    if arguments.target is None:
        raise ValueError("--target: name the images to transfer to, as parquet:PATH")
    return arguments


def few_shot(arguments: argparse.Namespace, own: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """{"target": [...], "own": [...]}: for every number of shots the accuracy over the runs, each a mean over the draws
    of images."""
    sources = {"target": (arguments.target, "test"), "own": (runs.source_of(arguments, own[0]), arguments.split)}
    accuracies: dict[str, list[list[float]]] = {name: [] for name in sources}
    for run in own:
        data = [FewShotData(name, few_shot_loader(run, source, "train[:2500]"), few_shot_loader(run, source, split))
                for name, (source, split) in sources.items()]  # fmt: skip
        cache = FeatureCache(run.folder / "features")
        evaluator = FewShotEvaluator(data, shots=arguments.shots, seeds=arguments.few_shot_seeds, cache=cache)
        for result in evaluator.evaluate(run.model()):
            accuracies[result.name].append(result.mean)
            print(run.folder, result.name, result.mean, flush=True)
    return {name: [runs.over_seeds(column) for column in zip(*rows, strict=True)] for name, rows in accuracies.items()}


def few_shot_loader(run: Run, source: str, split: str) -> EvalLoader:
    """Images as the run's model takes them; each is read once, so none are kept."""
    size, channels = run.config.data.image_size, run.config.data.in_channels
    return EvalLoader(DataConfig(source=source, eval_split=split, image_size=size, in_channels=channels, cache_mb=0))


def fine_tuned(arguments: argparse.Namespace, run: Run, start: str) -> float:
    """Test accuracy on the target after training on the subset from the run's parameters, or from scratch."""
    config = tuning_config(arguments, run, start)
    results = runs.finished(Path(config.out)) or runs.train_to_end(config)
    return results["eval"]["test"]["top1"]


def tuning_config(arguments: argparse.Namespace, run: Run, start: str) -> TrainConfig:
    recipe = get_recipe(run.config.recipe)
    rate = arguments.rate if start == "fine-tuned" else arguments.scratch_rate
    schedule = dataclasses.replace(
        recipe.optimizer.learning_rate, peak_value=rate, warmup_steps=max(1, arguments.steps // 10)
    )
    data = dataclasses.replace(
        recipe.data, source=arguments.target, train_split=arguments.subset, batch_size=arguments.batch_size
    )
    name = f"{start}-{arguments.subset}-{arguments.steps}x{arguments.batch_size}-{rate:g}"
    config = dataclasses.replace(
        recipe,
        out=str(run.folder / "transfer" / name),
        seed=run.seed,
        data=data,
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=schedule),
        steps=arguments.steps,
        epochs=None,
        ema_decay=None,  # in so few steps the average would still hold the start
        eval_every=None,
        checkpoint_every=None,
        tensorboard=False,
    )
    if start == "scratch":
        return config
    return dataclasses.replace(config, model=None, init_from=str(run.folder / "model"), new_head=True)


if __name__ == "__main__":
    runs.run_script(main)
