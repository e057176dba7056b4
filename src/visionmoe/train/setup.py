"""What a run needs before its first step: folder, images, model, optimizer, and where it goes on."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmoe.checkpoint.load import empty_model, fill_parts, load
from visionmoe.checkpoint.sharded import latest_good_together
from visionmoe.checkpoint.sources import on_disk
from visionmoe.checkpoint.sources import open_source as open_checkpoint
from visionmoe.checkpoint.store import list_checkpoints, remove_newer
from visionmoe.config import ModelConfig, MoEConfig, check_names, from_dict, to_dict
from visionmoe.data.sources import Source, may_download, open_source
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import choose_device, current, first_before_others, from_first, own_device
from visionmoe.files import read_json, write_json
from visionmoe.model.layers import Attention, Mlp
from visionmoe.model.skeleton import materialise, skeleton
from visionmoe.model.vit import ModelOutput, VisionTransformer
from visionmoe.train.config import TrainConfig, read_config
from visionmoe.train.ema import Ema
from visionmoe.train.finetuning import decide_head, freeze, layer_decay_factors
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import ScheduledOptimizer, create_optimizer
from visionmoe.train.parallel import Parallel
from visionmoe.train.state import Progress, restore_training
from visionmoe.train.step import StepSettings, seed_everything

_INITIALISATION = 2**32 - 1  # in the place of a step's number: the seed of the first parameters

# What may change between the lives of a run: it does not touch the parameters.
_FREE = ("out", "recipe", "eval_every", "checkpoint_every", "keep_last", "log_every", "tensorboard", "device",
         "parallel", "data.workers", "data.eval_batch_size", "data.eval_split", "data.eval_resize", "data.cache_mb",
         "fewshot.sources", "fewshot.train_split", "fewshot.test_split", "fewshot.shots", "fewshot.seeds",
         "fewshot.every")  # fmt: skip


class ConfigChangedError(ValueError):
    """A run is to be resumed with another config than it had."""


@dataclass
class Parts:
    """A run, ready to go on from progress.step. forward: the model, wrapped and compiled as the config says.

    resumed_from: the checkpoint that it goes on from; None: it starts.
    """

    config: TrainConfig
    source: Source
    device: torch.device
    model: VisionTransformer
    forward: Callable[[Tensor], ModelOutput]
    optimizer: ScheduledOptimizer
    ema: Ema | None
    settings: StepSettings
    parallel: Parallel
    total_steps: int
    progress: Progress
    resumed_from: Path | None = None
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has its averaged parameters, where the run keeps an average."""
        swapped = self.ema.swapped() if self.ema is not None else contextlib.nullcontext()
        with swapped, self.parallel.evaluating():
            yield


def prepare(config: TrainConfig, resume: bool) -> Parts:
    """Opens the images, makes or restores everything, and writes OUT/config.json. ValueError for what cannot be."""
    device, world = own_device(choose_device(config.device)), current()
    parallel = Parallel(Layout.parse(config.parallel, world.size), world)
    if config.data.batch_size % (config.accumulation * world.size):
        raise ValueError(
            f"data.batch_size must be a multiple of accumulation times the number of processes, got "
            f"{config.data.batch_size}, {config.accumulation} and {world.size}"
        )
    with first_before_others(when=may_download(config.data.source)):
        source = open_source(config.data.source, config.data.train_split)
    config, notes = resolve(config, source)
    _check_folder(config, resume)
    path = latest_good_together(config.out) if resume else None
    model, fill = _model(config, source.class_names, path, notes)
    parallel.spread(model, device)
    if fill is not None:
        model.to_empty(device=device)
        fill(model)
    model.to(device)
    assert config.steps is not None
    optimizer = _optimizer(config, model, config.steps)
    ema = None if config.ema_decay is None else Ema(model, config.ema_decay)
    progress = Progress() if path is None else restore_training(path, model, optimizer, ema)
    if path is not None:
        notes.append(f"resumed from {path}")
        removed = from_first(remove_newer(path) if world.is_first else [])
        notes += [f"removed the damaged checkpoint {damaged}" for damaged in removed]
    if world.is_first:
        write_json(Path(config.out) / "config.json", to_dict(config))
    forward = parallel.wrap(model, device)
    return Parts(
        config=config,
        source=source,
        device=device,
        model=model,
        forward=_compiled(forward, model, parallel.layout) if config.compile else forward,
        optimizer=optimizer,
        ema=ema,
        settings=StepSettings(
            loss_fn=create_loss(config.loss, config.label_smoothing),
            num_classes=len(source.class_names),
            seed=config.seed,
            mixup_alpha=config.data.mixup_alpha,
            accumulation=config.accumulation,
            precision=config.precision,
        ),
        parallel=parallel,
        total_steps=config.steps,
        progress=progress,
        resumed_from=path,
        notes=notes,
    )


def _compiled(
    forward: Callable[[Tensor], ModelOutput], model: VisionTransformer, layout: Layout
) -> Callable[[Tensor], ModelOutput]:
    """The forward pass, compiled: as a whole, or, where layers gather parameters or exchange tokens, the attention and
    the dense MLPs, each by itself (in evaluation, too)."""
    if max(layout.fsdp, layout.ep) == 1:
        return torch.compile(forward)
    for module in model.modules():
        if isinstance(module, Attention | Mlp):
            module.compile()
    return forward


def resolve(config: TrainConfig, source: Source) -> tuple[TrainConfig, list[str]]:
    """The config with epochs as steps, a warm-up that fits into them and the data's number of classes, and notes about
    what that changed."""
    notes, classes = [], len(source.class_names)
    if config.epochs is not None:
        steps = math.ceil(config.epochs * len(source) / config.data.batch_size)
        config = dataclasses.replace(config, steps=steps, epochs=None)
    if config.model is not None and config.model.num_classes != classes:
        notes.append(f"the model gets {classes} classes, as the data has, not {config.model.num_classes}")
        config = dataclasses.replace(config, model=config.model.replace(num_classes=classes))
    return _shorter_warmup(config, notes), notes


def _shorter_warmup(config: TrainConfig, notes: list[str]) -> TrainConfig:
    """A run that is not longer than its warm-up gets a warm-up of a tenth of its steps."""
    rate, steps = config.optimizer.learning_rate, config.steps
    if not steps or rate.decay_steps is not None or rate.warmup_steps is None or rate.warmup_steps < steps:
        return config
    notes.append(f"the warm-up of {rate.warmup_steps} steps does not fit into {steps} steps: it becomes {steps // 10}")
    rate = dataclasses.replace(rate, warmup_steps=steps // 10)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))


def _optimizer(config: TrainConfig, model: VisionTransformer, steps: int) -> ScheduledOptimizer:
    """The optimizer over all parameters; those that it leaves as they are get no gradients."""
    arguments = config.optimizer.arguments()
    if config.optimizer.layer_decay is not None:
        factors = layer_decay_factors(config.optimizer.layer_decay, model.config.num_layers)
        arguments["learning_rate_factors"] = (*config.optimizer.learning_rate_factors, *factors)
    if steps == 0:  # nothing to schedule: an evaluation of the start
        arguments["learning_rate"] = 0.0
    optimizer = create_optimizer(model.named_parameters(), total_steps=steps, **arguments)
    freeze(optimizer)
    return optimizer


def _model(
    config: TrainConfig, class_names: tuple[str, ...], resumed_from: Path | None, notes: list[str]
) -> tuple[VisionTransformer, Callable[[VisionTransformer], Any] | None]:
    """The model, and, where it is a skeleton yet, what gives it its first parameters when it has been spread.

    Adds to `notes` what was decided about a fine-tuned model's head.
    """
    if resumed_from is not None:
        saved = read_json(resumed_from / "state.json")["model"]
        return skeleton(VisionTransformer, from_dict(ModelConfig, saved)), lambda model: None
    if config.model is not None:
        return skeleton(VisionTransformer, config.model), lambda model: _first_parameters(model, config.seed)
    assert config.init_from is not None
    fixed = {
        "image_size": config.data.image_size,
        "num_classes": len(class_names),
        "in_channels": config.data.in_channels,
    }
    for name in fixed:
        if name in config.model_options:
            raise ValueError(f"model_options cannot hold {name!r}: it follows from the data")
    with first_before_others(when=not on_disk(config.init_from)):
        stored = open_checkpoint(config.init_from, config.init_config)
    final, options = _with_options(stored.config, {**config.model_options, **fixed})
    head = decide_head(config.new_head, stored.config, final, stored.class_names, class_names)
    notes.append(head.reason)
    if head.new and final.representation_size and "representation_size" not in config.model_options:
        # arXiv 2010.11929, section 3.1, and google-research/vmoe: fine-tuned heads are one linear layer
        options["representation_size"], final = None, final.replace(representation_size=None)
        notes.append("pre_logits is left out: it belongs to the old head")
    if head.new and config.steps == 0:
        notes.append("0 steps: a head that was not trained classifies no better than chance")
    if current().size > 1:  # each process reads its own parts
        model, fresh = empty_model(stored, head.new, options)
        return model, lambda model: fill_parts(model.state_dict(), stored, final, fresh)
    return load(config.init_from, config.init_config, new_head=head.new, **options), None


def _first_parameters(model: VisionTransformer, seed: int) -> None:
    seed_everything(seed, _INITIALISATION)
    materialise(model)


def _with_options(stored: ModelConfig, options: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The stored config with options as JSON has them, and these options with their types. ValueError names a wrong
    one."""
    plain, moe = to_dict(stored), {f.name for f in dataclasses.fields(MoEConfig)}
    check_names("model_options", options, {*plain, *moe})
    for name, value in options.items():
        (plain["moe"] if name in moe else plain)[name] = value
    final = from_dict(ModelConfig, plain, "model_options")
    return final, {name: getattr(final.moe if name in moe else final, name) for name in options}


def _check_folder(config: TrainConfig, resume: bool) -> None:
    """A new run needs a folder without one; a resumed run needs the same config as before."""
    stored = Path(config.out) / "config.json"
    if not resume:
        if list_checkpoints(config.out):
            raise ValueError(f"{config.out} already holds a run: resume it, or give another out")
        return
    if not stored.exists():
        raise ValueError(f"{config.out} holds no run to resume: {stored} is missing")
    if not list_checkpoints(config.out):
        return
    old, new = _flat(to_dict(read_config(str(stored)))), _flat(to_dict(config))
    for name in sorted({*old, *new}, key=lambda name: (name != "steps", name)):  # other values follow from the steps
        if name not in _FREE and old.get(name) != new.get(name):
            raise ConfigChangedError(
                f"a resumed run must keep its config: {name} was {old.get(name)!r}, got {new.get(name)!r}"
            )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
