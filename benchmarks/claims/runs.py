"""What the scripts of this folder share: their options, the trained runs that they compare, and how results are kept.

A run is WORK/DATA_SET/RECIPE/seedN, the recipe trained with that seed and evaluated on the way. One that has finished
is used as it is, after a look whether its config is the recipe's; what is missing is trained, what was stopped goes on.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visionmoe.checkpoint.load import load
from visionmoe.cli.training import train
from visionmoe.config import to_dict
from visionmoe.data.loader import EvalLoader
from visionmoe.data.sources import open_source
from visionmoe.evaluate.timing import device_name
from visionmoe.files import read_json, write_json
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.config import TrainConfig, read_config
from visionmoe.train.recipes import get_recipe
from visionmoe.train.setup import resolve

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims"
PICTURES = ROOT / "docs" / "images"
KINDS = ("sparse", "dense")
# data set -> the recipes of the V-MoE and of its dense twin of equal training FLOPs
RECIPES = {
    "cifar10": {"sparse": "cifar10_small", "dense": "cifar10_small_dense"},
    "fashion_mnist": {"sparse": "fashion_mnist", "dense": "fashion_mnist_dense"},
}
# What must be the recipe's in a run that is used; the rest is where its files are and when it is evaluated.
CHECKED = (
    "recipe",
    "seed",
    "steps",
    "model",
    "optimizer",
    "loss",
    "label_smoothing",
    "ema_decay",
    "accumulation",
    "precision",
)
CHECKED_DATA = ("train_split", "eval_split", "batch_size", "crop", "flip", "randaugment_ops", "mixup_alpha")


@dataclass(frozen=True)
class Run:
    """A finished run. results: its results.json."""

    kind: str
    seed: int
    folder: Path
    config: TrainConfig
    results: dict[str, Any]

    def model(self) -> VisionTransformer:
        return load(self.folder / "model")

    @property
    def top1(self) -> float:
        return self.results["eval"]["test"]["top1"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    own = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--data-set", choices=tuple(RECIPES), required=True)
    own.add_argument("--images", help="images in the place of the recipe's, as parquet:PATH")
    own.add_argument("--split", default="test", help="images to evaluate on, as test[:5000]")
    own.add_argument("--seeds", type=int, default=3)
    own.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of the runs")
    own.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    own.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the picture")
    own.add_argument("--train-steps", type=int, help="shorter runs than the recipe's, to see that it works")
    own.add_argument("--no-training", action="store_true", help="a run that has not finished is an error")
    return own


def run_script(main: Callable[[], None]) -> None:
    """A mistake becomes one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def wanted(arguments: argparse.Namespace, kind: str, seed: int) -> TrainConfig:
    """The config of a run, with its length in steps and the number of classes that the images have."""
    name = RECIPES[arguments.data_set][kind]
    recipe = get_recipe(name)
    config = dataclasses.replace(
        recipe,
        seed=seed,
        out=str(arguments.work / arguments.data_set / name / f"seed{seed}"),
        data=dataclasses.replace(recipe.data, source=arguments.images or recipe.data.source),
        eval_every=250,
        tensorboard=False,
    )
    if arguments.train_steps is not None:
        config = dataclasses.replace(config, steps=arguments.train_steps, epochs=None)
    return resolve(config, open_source(config.data.source, config.data.train_split))[0]


def trained(arguments: argparse.Namespace, kind: str) -> list[Run]:
    """The runs of all seeds, trained where they are missing."""
    return [_trained(arguments, kind, seed) for seed in range(arguments.seeds)]


def _trained(arguments: argparse.Namespace, kind: str, seed: int) -> Run:
    config = wanted(arguments, kind, seed)
    folder = Path(config.out)
    results = finished(folder)
    if results is None:
        if arguments.no_training:
            raise ValueError(f"{folder} holds no finished run")
        results = train_to_end(config)
    stored = read_config(str(folder / "config.json"))
    check_same(stored, config)
    return Run(kind, seed, folder, stored, results)


def train_to_end(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on; leaves the program when that is interrupted."""
    results = train(config, resume=(Path(config.out) / "config.json").is_file())
    if results["status"] != "finished":
        sys.exit(results["exit_code"])
    return results


def finished(folder: Path) -> dict[str, Any] | None:
    """The results.json of a finished run; None where there is none."""
    path = folder / "results.json"
    results = read_json(path) if path.is_file() else {}
    return results if results.get("status") == "finished" else None


def check_same(stored: TrainConfig, config: TrainConfig) -> None:
    """ValueError when a run is not of this recipe and seed."""
    old, new = to_dict(stored), to_dict(config)
    pairs = [(name, old[name], new[name]) for name in CHECKED]
    pairs += [(f"data.{name}", old["data"][name], new["data"][name]) for name in CHECKED_DATA]
    for name, was, now in pairs:
        if was != now:
            raise ValueError(f"{config.out} holds a run of other settings: {name} is {was!r}, the recipe has {now!r}")


def source_of(arguments: argparse.Namespace, run: Run) -> str:
    """Where the images are that the run was trained on."""
    return arguments.images or get_recipe(run.config.recipe).data.source


def loader_of(arguments: argparse.Namespace, run: Run, split: str | None = None) -> EvalLoader:
    """Images of a split (None: --split), prepared as the run's for evaluation, in its batches."""
    return EvalLoader(
        dataclasses.replace(run.config.data, source=source_of(arguments, run), eval_split=split or arguments.split)
    )


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one) and every seed's value."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": spread, "per_seed": list(values)}


def facts(run: Run) -> dict[str, Any]:
    """What a reader wants to know of a run's model and training."""
    config, results = run.config, run.results
    assert config.model is not None
    moe = config.model.moe
    return {
        "recipe": config.recipe,
        "image_size": config.model.image_size,
        "patch_size": config.model.patch_size,
        "hidden_size": config.model.hidden_size,
        "mlp_dim": config.model.mlp_dim,
        "blocks": config.model.num_layers,
        "experts": {"number": moe.num_experts, "blocks": list(moe.layers), "selected": moe.num_selected_experts,
                    "capacity_factor": moe.capacity_factor} if moe.layers else None,
        "parameters": results["num_parameters"],
        "flops_per_image": results["flops_per_image"],
        "steps": results["total_steps"],
        "batch_size": config.data.batch_size,
        "images_seen": results["images_seen"],
        "train_flops": train_flops(run, results["total_steps"]),
    }  # fmt: skip


def train_flops(run: Run, steps: int) -> int:
    """Of so many steps: a backward pass costs two forward passes."""
    return 3 * run.config.data.batch_size * steps * run.results["flops_per_image"]


def write_report(arguments: argparse.Namespace, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Writes RESULTS/NAME_DATA_SET.json and returns what is in it. Where the images lie is nobody's business."""
    options = " --images parquet:PATH" if arguments.images else ""
    options += "" if arguments.split == "test" else f' --split "{arguments.split}"'
    report = {
        "date": str(datetime.date.today()),
        "machine": {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "torch": torch.__version__,
                    "python": platform.python_version()},
        "command": f"python benchmarks/claims/{name}.py --data-set {arguments.data_set}{options}",
        "data_set": arguments.data_set,
        "seeds": arguments.seeds,
        "split": arguments.split,
        **content,
    }  # fmt: skip
    path = arguments.results / f"{name}_{arguments.data_set}.json"
    write_json(path, report)
    print(f"everything: {path}")
    return report
