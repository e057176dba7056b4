"""`visionmoe train` and `visionmoe finetune`."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from visionmoe.checkpoint.sources import on_disk
from visionmoe.cli.evaluation import summary
from visionmoe.cli.fewshot import fewshot_data
from visionmoe.cli.options import Finetune, Train
from visionmoe.cli.shared import data_of_run, model_folder, open_loader, output_folder
from visionmoe.data.config import DataConfig
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import current, requested
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.fewshot import FewShotEvaluator
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.config import OptimizerConfig, TrainConfig, assign, read_config, with_model
from visionmoe.train.finetuning import ROUTERS
from visionmoe.train.loop import FEWSHOT, Evaluator, TrainingDivergedError, run_training
from visionmoe.train.recipes import get_finetuning, get_recipe

DEFAULT_RECIPE, FINETUNING_RECIPE = "fashion_mnist", "finetune"
HEADS = {"auto": None, "keep": False, "new": True}  # --head -> TrainConfig.new_head


def run(options: Train | Finetune) -> int:
    config = finetune_config(options) if isinstance(options, Finetune) else train_config(options)
    output_folder(Path(config.out), of_run=True)
    try:
        results = train(config, resume=options.resume)
    except TrainingDivergedError as error:
        if current().is_first:
            print(f"visionmoe: {error}", file=sys.stderr)
        return 1
    if current().is_first:
        report(config, results)
    return results["exit_code"]


def train(config: TrainConfig, *, resume: bool) -> dict[str, Any]:
    """Trains as `config` says, evaluating on its evaluation split; see `visionmoe.train.loop.run_training`."""
    evaluators = {"test": evaluator_of(config)}
    if config.fewshot.sources:
        evaluators[FEWSHOT] = fewshot_evaluator_of(config)
    return run_training(config, evaluators, resume=resume)


def evaluator_of(config: TrainConfig) -> Evaluator:
    """The evaluator of a run's images, built once."""
    loader, bf16 = open_loader(config.data), config.precision == "bfloat16"
    classify = ClassificationEvaluator(loader, autocast=bf16, loss=config.loss, class_names=loader.class_names)

    def evaluate(model: nn.Module, step: int) -> Mapping[str, Any]:
        return classify(model)

    return evaluate


def fewshot_evaluator_of(config: TrainConfig) -> Evaluator:
    """The few-shot evaluator that a run's config describes, built once."""
    few = config.fewshot
    data = fewshot_data(few.sources, [few.train_split], [few.test_split], config.data)
    evaluator = FewShotEvaluator(data, shots=few.shots, seeds=few.seeds, autocast=config.precision == "bfloat16")

    def evaluate(model: nn.Module, step: int) -> Mapping[str, Any]:
        assert isinstance(model, VisionTransformer)
        return dict(evaluator.run(model))

    return evaluate


def train_config(options: Train) -> TrainConfig:
    """The recipe or the config of an earlier run, with what the command line changes."""
    if options.config is not None and options.recipe is not None:
        raise ValueError("give --recipe or --config, one of them")
    stored = stored_config(options)
    if stored is not None and options.recipe is None and options.config is None and options.model is None:
        return changed(stored, options, Path(stored.out))
    name = options.recipe or DEFAULT_RECIPE
    if options.config is None:
        config = get_recipe(name, options.model)
    else:
        config = read_config(str(options.config))
        config = config if options.model is None else with_model(config, options.model)
    out = options.out or (Path("runs") / name if options.config is None else None)
    if out is None:
        raise ValueError("--config needs --out: the folder of the new run")
    return changed(config, options, out)


def finetune_config(options: Finetune) -> TrainConfig:
    """The recipe with the trained model in the place of the recipe's own."""
    stored = stored_config(options)
    if stored is not None:
        return changed(as_given(stored, options), options, Path(stored.out))
    path = model_folder(options.path)
    on_disk(path)  # before the images are looked at: its mistakes are to be told first
    config = get_finetuning(
        options.recipe or FINETUNING_RECIPE,
        path,
        None if options.model_config is None else str(options.model_config),
    )
    config = dataclasses.replace(
        config,
        data=finetune_data(options, config.data),
        new_head=HEADS[options.head],
        optimizer=finetune_optimizer(options, config.optimizer),
    )
    return changed(config, options, options.out or Path("runs") / config.recipe)


def as_given(stored: TrainConfig, options: Finetune) -> TrainConfig:
    """The config of a run to resume with what was given again, so that training can tell what differs."""
    if options.recipe not in (None, stored.recipe):
        raise ValueError(f"a resumed run must keep its recipe: it was {stored.recipe!r}, got {options.recipe!r}")
    places = {Path(options.path).resolve(), (Path(options.path) / "model").resolve()}
    if stored.init_from is None or Path(stored.init_from).resolve() not in places:
        stored = dataclasses.replace(stored, init_from=model_folder(options.path), model=None)
    if options.model_config is not None:
        stored = dataclasses.replace(stored, init_config=str(options.model_config))
    if HEADS[options.head] is not None:
        stored = dataclasses.replace(stored, new_head=HEADS[options.head])
    return dataclasses.replace(stored, optimizer=finetune_optimizer(options, stored.optimizer))


def finetune_data(options: Finetune, data: DataConfig) -> DataConfig:
    """Images of a run that is fine-tuned: evaluated as there, and, unless --data names others, the same ones.

    The reference's recipes say their images themselves. ValueError where nobody says any.
    """
    if options.recipe not in (None, FINETUNING_RECIPE):
        return data
    named = options.data is not None or any(text.startswith("data.source=") for text in options.assignments)
    run = data_of_run(options.path, required=not named)
    names = ["eval_batch_size", "max_pixels", *([] if named else ["source", "train_split", "eval_split"])]
    data = dataclasses.replace(data, **{name: getattr(run, name) for name in names})
    return dataclasses.replace(data, eval_resize=run.at_size(data.image_size).eval_resize)


def finetune_optimizer(options: Finetune, optimizer: OptimizerConfig) -> OptimizerConfig:
    """With what --layer-decay, --freeze and --freeze-router change."""
    frozen = (*options.freeze, *([ROUTERS] if options.freeze_router else []))
    if frozen:
        optimizer = dataclasses.replace(optimizer, frozen_pattern=frozen)
    if options.layer_decay is not None:
        optimizer = dataclasses.replace(optimizer, layer_decay=options.layer_decay)
    return optimizer


def stored_config(options: Train | Finetune) -> TrainConfig | None:
    """The config of the run in --out that --resume goes on with; None where there is none yet."""
    if not options.resume or options.out is None or not (options.out / "config.json").is_file():
        return None
    return dataclasses.replace(read_config(str(options.out / "config.json")), out=str(options.out))


def changed(config: TrainConfig, options: Train | Finetune, out: Path) -> TrainConfig:
    """Applies the options that both commands have; assignments last, so that they win."""
    lengths = {"steps": options.steps, "epochs": options.epochs}
    assignments = [f"{name}={value}" for name, value in lengths.items() if value is not None]
    if len(assignments) == 2:
        raise ValueError(f"give --steps or --epochs, one of them, got {options.steps} and {options.epochs}")
    if isinstance(options, Finetune) and options.image_size is not None:
        assignments.append(f"image_size={options.image_size}")
    data = config.data if options.data is None else dataclasses.replace(config.data, source=options.data)
    config = dataclasses.replace(config, data=data, out=str(out))
    config = dataclasses.replace(config, parallel=options.parallel or fitting(config.parallel))
    config = assign(config, [*assignments, *options.assignments])
    check_warmup(config, options.assignments)
    return config


def fitting(parallel: str | None) -> str | None:
    """The layout of a stored config, where the job has as many processes; else None: a resumed run may have others."""
    try:
        Layout.parse(parallel, requested().size)
    except ValueError:
        return None
    return parallel


def check_warmup(config: TrainConfig, assignments: Iterable[str]) -> None:
    """ValueError for a warm-up that was asked for and does not fit; that of a recipe is shortened when it starts."""
    field, steps = "optimizer.learning_rate.warmup_steps", config.steps
    warmup = config.optimizer.learning_rate.warmup_steps
    asked = any(text.partition("=")[0].strip() == field for text in assignments)
    if asked and steps and warmup is not None and warmup >= steps:
        raise ValueError(f"{field} must be less than the run's {steps} steps, got {warmup}")


def report(config: TrainConfig, results: Mapping[str, Any]) -> None:
    if results["status"] != "finished":
        print(f"stopped at step {results['step']} of {results['total_steps']}; --resume goes on in {config.out}")
        return
    for line in summary(results["eval"]["test"]):
        print(line)
    print(f"model: {results['model']}, everything: {Path(config.out) / 'results.json'}")
