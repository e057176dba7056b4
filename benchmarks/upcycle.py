"""Sparse upcycling against going on with the dense model, at equal added compute, over several seeds.

    python benchmarks/upcycle.py --out benchmarks/results/upcycle_fashion_mnist.json
    python benchmarks/upcycle.py --recipe cifar10_small --data parquet:PATH --out benchmarks/results/upcycle_cifar.json

For every seed a dense ViT (the recipe's model without experts; --set changes fields of the recipe) is trained for
--dense-steps. From its parameters two runs go on, both with a new optimizer and the same schedule (warm-up, cosine to
0, peak --rate; --dense-rate gives the dense one its own): the dense model for --more-steps, and the upcycled one for as
many steps as cost the same floating-point operations, so for fewer. A run that is interrupted goes on where it was when
the command is given again; finished runs in --work are not repeated.
"""

import argparse
import dataclasses
import datetime
import hashlib
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from visionmoe.checkpoint.load import load
from visionmoe.checkpoint.upcycle import upcycle
from visionmoe.cli.training import train
from visionmoe.config import MoEConfig
from visionmoe.files import read_json, write_json
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer, create_model
from visionmoe.train.config import ScheduleConfig, TrainConfig, assign
from visionmoe.train.recipes import get_recipe

RUNS = ("start", "dense", "upcycled")


def main() -> None:
    arguments = parse()
    try:
        measure(arguments)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def measure(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {arguments.seeds}")
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        row = one_seed(arguments, seed)
        if row is None:
            sys.exit(130)
        rows.append(row)
        print(row, flush=True)
        write_json(arguments.out, report(arguments, rows))
    for name, numbers in report(arguments, rows)["top1"].items():
        print(f"{name:<24} {numbers['mean']:.4f} +- {numbers['standard_deviation']:.4f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/upcycle_benchmark"), help="folder of the runs")
    parser.add_argument("--recipe", default="fashion_mnist", choices=("fashion_mnist", "cifar10_small"))
    parser.add_argument("--data", help="images in the place of the recipe's")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the recipe to change")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="others than those on which a setting was chosen")
    parser.add_argument("--dense-steps", type=int, default=750, help="of the dense ViT before it is upcycled")
    parser.add_argument("--more-steps", type=int, default=5250, help="of the dense ViT that goes on")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of both continued runs")
    parser.add_argument("--dense-rate", type=float, help="of the dense one, where another is better for it")
    parser.add_argument("--router-rate", type=float, default=5.0, help="factor on the routers' learning rate")
    parser.add_argument("--expert-rate", type=float, default=1.0, help="factor on the experts' learning rate")
    parser.add_argument("--layers", type=int, nargs="+", help="blocks that get experts; default: the recipe's")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--num-selected-experts", type=int, default=1)
    parser.add_argument("--capacity-factor", type=float, default=1.5)
    parser.add_argument(
        "--moe", nargs="+", default=[], metavar="NAME=VALUE", help="fields of MoEConfig to change in the upcycled model"
    )
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--normalize-weights", action=argparse.BooleanOptionalAction, default=False)
    return parser.parse_args()


def one_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any] | None:
    """Top-1, loss and cost of the three runs of a seed; None when one was interrupted."""
    recipe = assign(get_recipe(arguments.recipe), arguments.set)
    assert recipe.model is not None
    folder = arguments.work / f"{arguments.recipe}_seed{seed}"
    base = dataclasses.replace(
        recipe,
        seed=seed,
        steps=arguments.dense_steps,
        epochs=None,
        eval_every=None,
        checkpoint_every=200,
        tensorboard=False,
        data=dataclasses.replace(recipe.data, source=arguments.data or recipe.data.source),
    )
    warmup = min(recipe.optimizer.learning_rate.warmup_steps or 0, arguments.dense_steps // 10)
    schedule = dataclasses.replace(recipe.optimizer.learning_rate, warmup_steps=warmup)
    start = dataclasses.replace(
        base,
        model=dataclasses.replace(recipe.model, moe=MoEConfig()),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=schedule),
    )
    start = dataclasses.replace(start, out=str(own_folder(folder / "start", start)))
    results = {"start": run(start)}
    if results["start"] is None:
        return None
    upcycling = {
        "layers": tuple(arguments.layers or recipe.model.moe.layers),
        "num_experts": arguments.num_experts,
        "num_selected_experts": arguments.num_selected_experts,
        "capacity_factor": arguments.capacity_factor,
        "noise": arguments.noise,
        "normalize_weights": arguments.normalize_weights,
        "seed": seed,
    }
    models = {"dense": Path(start.out) / "model"}
    models["upcycled"] = own_folder(folder / "upcycled_start", (start, upcycling, arguments.moe))
    with_moe(upcycle(models["dense"], **upcycling), base, arguments.moe).save_pretrained(models["upcycled"])
    flops = {name: count_flops(load(path)) for name, path in models.items()}
    steps = {name: round(arguments.more_steps * flops["dense"] / flops[name]) for name in flops}
    for name, path in models.items():
        config = continued(dataclasses.replace(base, seed=seed + 1000), arguments, name, path, steps[name])
        results[name] = run(dataclasses.replace(config, out=str(own_folder(folder / name, config))))
        if results[name] is None:
            return None
    evaluated = {name: results[name]["eval"]["test"] for name in RUNS}
    batch = base.data.batch_size
    return {
        "seed": seed,
        **{f"top1_{name}": evaluated[name]["top1"] for name in RUNS},
        **{f"loss_{name}": evaluated[name]["loss"] for name in RUNS},
        **{f"steps_{name}": steps[name] for name in flops},
        # a backward pass costs two forward passes
        **{f"added_train_flops_{name}": 3 * batch * steps[name] * flops[name] for name in flops},
        **{f"train_seconds_{name}": results[name]["train_seconds"] for name in RUNS},
    }


def with_moe(model: VisionTransformer, base: TrainConfig, assignments: list[str]) -> VisionTransformer:
    """The model with fields of its MoEConfig changed, of which no parameter's shape may depend."""
    if not assignments:
        return model
    changed = assign(dataclasses.replace(base, model=model.config), [f"model.moe.{text}" for text in assignments])
    assert changed.model is not None
    new = create_model(changed.model)
    try:
        new.load_state_dict(model.state_dict())
    except RuntimeError:
        raise ValueError(f"--moe must not change parameters' names or shapes, got {' '.join(assignments)}") from None
    new.class_names, new.preprocessing = model.class_names, model.preprocessing
    return new


def own_folder(prefix: Path, what: Any) -> Path:
    """A folder that belongs to these settings, so that other settings do not find its results."""
    return prefix.with_name(f"{prefix.name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}")


def continued(base: TrainConfig, arguments: argparse.Namespace, name: str, model: Path, steps: int) -> TrainConfig:
    """The dense or the upcycled run from trained parameters, with the base's images, loss and decay."""
    rate = arguments.dense_rate if name == "dense" and arguments.dense_rate is not None else arguments.rate
    schedule = ScheduleConfig("warmup_cosine_decay", peak_value=rate, warmup_steps=steps // 20)
    given = ((r"router\.gate", arguments.router_rate), (r"mlp\.experts\.", arguments.expert_rate))
    factors = tuple(pair for pair in given if name == "upcycled" and pair[1] != 1)
    optimizer = dataclasses.replace(base.optimizer, learning_rate=schedule, learning_rate_factors=factors)
    return dataclasses.replace(base, model=None, init_from=str(model), optimizer=optimizer, steps=steps)


def run(config: TrainConfig) -> dict[str, Any] | None:
    """The results of a run: those of its folder where it has finished, else it is trained or goes on."""
    out = Path(config.out)
    stored = read_json(out / "results.json") if (out / "results.json").is_file() else {}
    if stored.get("status") == "finished" and stored.get("total_steps") == config.steps:
        return stored
    results = train(config, resume=(out / "config.json").is_file())
    return results if results["status"] == "finished" else None


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    top1 = {name: [row[f"top1_{name}"] for row in rows] for name in RUNS}
    top1["upcycled minus dense"] = [row["top1_upcycled"] - row["top1_dense"] for row in rows]
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    return {
        "date": str(datetime.date.today()),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "torch": torch.__version__},
        "command": " ".join(["python", *sys.argv]),
        "options": options,
        "top1": {name: summary(values) for name, values in top1.items()},
        "loss": {name: summary([row[f"loss_{name}"] for row in rows]) for name in RUNS},
        "rows": rows,
    }  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "standard_deviation": spread, "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
