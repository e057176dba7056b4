"""The typed configuration of a training run. Everything that a run does follows from it; unknown fields are errors."""

import ast
import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from visionmoe.config import ModelConfig, from_dict, to_dict
from visionmoe.data.config import DataConfig
from visionmoe.files import read_json

Factors = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run; see `visionmoe.train.schedules`. None: not given."""

    schedule: Literal["constant", "warmup_linear_decay", "warmup_cosine_decay", "big_vision_rsqrt"] = (
        "warmup_cosine_decay"
    )
    value: float | None = None
    peak_value: float | None = None
    end_value: float | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    timescale: float | None = None
    cooldown_steps: int | None = None


@dataclass(frozen=True)
class ClipConfig:
    """Clipping of the gradients, by their global norm or every element by itself. None: not clipped."""

    global_norm: float | None = None
    absolute_value: float | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """See `visionmoe.train.optim.create_optimizer`, whose names these are.

    weight_decay, learning_rate_factors, gradient_scale: [pattern, number] pairs; patterns are searched in our
    parameters' names. options: the optimizer's own, as {"b2": 0.99}.
    layer_decay: factor by which the rate falls from each block to the one before it, None: it does not. It becomes
    learning_rate_factors (`finetuning.layer_decay_factors`); those given here come first and replace its.
    frozen_pattern, trainable_pattern: which parameters (not) to train. A run computes no gradients of frozen ones.
    """

    name: Literal["adam", "adamw", "sgd", "big_vision_adafactor", "adafactor"] = "adam"
    learning_rate: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(peak_value=1e-3))
    weight_decay: float | Factors = 0.0
    gradient_clip: ClipConfig = field(default_factory=ClipConfig)
    learning_rate_factors: Factors = ()
    layer_decay: float | None = None
    gradient_scale: Factors = ()
    frozen_pattern: str | tuple[str, ...] | None = None
    trainable_pattern: str | tuple[str, ...] | None = None
    options: dict[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be > 0 and <= 1, got {self.layer_decay}")

    def arguments(self) -> dict[str, Any]:
        """The arguments of `create_optimizer`, but for layer_decay, which needs the model's number of blocks."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layer_decay"}
        options = own.pop("options")
        for name in ("learning_rate", "gradient_clip"):
            own[name] = {k: v for k, v in to_dict(own[name]).items() if v is not None}
        clash = sorted(set(own) & set(options))
        if clash:
            raise ValueError(f"optimizer.options cannot hold {clash[0]!r}: set optimizer.{clash[0]}")
        return {**own, **options}


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot accuracy of the features while a run trains; see `visionmoe.evaluate.fewshot`.

    sources: data sets, none: no few-shot evaluation. Their images are prepared as the run's for evaluation.
    every: in steps; None: only at the end.
    """

    sources: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    shots: tuple[int, ...] = (5, 10)
    seeds: tuple[int, ...] = (0,)
    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"fewshot.every must be >= 1, got {self.every}")


@dataclass(frozen=True)
class TrainConfig:
    """One run, from scratch (`model`) or from trained weights (`init_from`).

    recipe: where the config comes from. out: folder of the run.
    init_from: what `visionmoe.load` reads; init_config: config.json of a released PREFIX. image_size, in_channels and
        the number of classes are the data's. model_options: other options of ModelConfig and MoEConfig to change, as
        {"capacity_factor": 1.5}.
    new_head: True: the head starts from zeros; False: it must be kept; None: it is kept where the checkpoint has the
        same classes as the data (`finetuning.decide_head`).
    loss: "softmax" or "sigmoid" cross-entropy; an ensemble's members are trained each on its own.
    steps or epochs: the length. accumulation: a batch is run in so many parts; routing groups lie within a part.
    precision: "bfloat16" runs the model under autocast. ema_decay: averages the parameters over steps; evaluation and
        the saved model then use the average.
    max_nonfinite: so many steps in a row without a finite gradient stop the run; such steps change nothing.
    eval_every, checkpoint_every, log_every: in steps; None: only at the end. keep_last: checkpoints that are kept.
    device: "auto" is a GPU where there is one.
    parallel: how the processes of a job share the work, as "dp=2,ep=2" (`visionmoe.distributed.layout`); None: all are
        data parallel. A run may be resumed with another layout and number of processes.
    """

    recipe: str = "custom"
    out: str = "runs/custom"
    model: ModelConfig | None = None
    init_from: str | None = None
    init_config: str | None = None
    new_head: bool | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int | None = None
    epochs: float | None = None
    accumulation: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float | None = None
    max_nonfinite: int = 5
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = 1000
    keep_last: int = 2
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    log_every: int = 50
    tensorboard: bool = True
    compile: bool = False
    device: str = "auto"
    parallel: str | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs, one of them: got steps={self.steps}, epochs={self.epochs}")
        if self.epochs is not None and not 0 <= self.epochs < float("inf"):
            raise ValueError(f"epochs must be >= 0 and finite, got {self.epochs}")
        for name, lowest in (("steps", 0), ("accumulation", 1), ("max_nonfinite", 1), ("eval_every", 1),
                             ("checkpoint_every", 1), ("keep_last", 1), ("log_every", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be >= {lowest}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")
        if self.data.batch_size % self.accumulation:
            raise ValueError(
                f"data.batch_size must be a multiple of accumulation, got {self.data.batch_size} and "
                f"{self.accumulation}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be >= 0 and < 1, got {self.ema_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be >= 0 and < 1, got {self.label_smoothing}")
        if (self.model is None) == (self.init_from is None):
            raise ValueError("give model (from scratch) or init_from (trained weights), one of them")
        if self.model is not None:
            self._check_model(self.model)

    def _check_model(self, model: ModelConfig) -> None:
        if self.model_options:
            raise ValueError("model_options belong to init_from; a run from scratch sets the fields of model")
        if model.image_hw != self.data.image_hw:
            raise ValueError(
                f"model.image_size must be data.image_size, got {model.image_size} and {self.data.image_size}"
            )
        if model.in_channels != self.data.in_channels:
            raise ValueError(
                f"model.in_channels must be data.in_channels, got {model.in_channels} and {self.data.in_channels}"
            )


def with_model(config: TrainConfig, model: ModelConfig | str) -> TrainConfig:
    """The run with another model, by config or name, for the same images; its number of classes follows the data."""
    from visionmoe.variants import get_config

    model = get_config(model) if isinstance(model, str) else model
    model = model.replace(image_size=config.data.image_size, in_channels=config.data.in_channels)
    if config.model is not None:
        model = model.replace(num_classes=config.model.num_classes, head_bias_init=config.model.head_bias_init)
    return dataclasses.replace(config, model=model, init_from=None, init_config=None, model_options={})


def assign(config: TrainConfig, assignments: Iterable[str]) -> TrainConfig:
    """Changes fields by "name=value" texts such as "optimizer.learning_rate.peak_value=0.001".

    Values are read as JSON or Python literals, else as text. "steps" and "epochs" replace each other; "image_size" and
    "in_channels" alone set the data's and the model's; data.eval_resize, unless it is set too, keeps its proportion to
    "image_size". Unknown fields are ValueErrors with the nearest name.
    """
    data, assignments = to_dict(config), list(assignments)
    resize_too = any(text.partition("=")[0].strip() == "data.eval_resize" for text in assignments)
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"an assignment must be NAME=VALUE, got {text!r}")
        name = name.strip()
        if name == "image_size" and not resize_too:
            before = from_dict(DataConfig, data["data"], "data")
            size = from_dict(DataConfig, {"image_size": _value(value)}, "data").image_size
            data["data"]["eval_resize"] = before.at_size(size).eval_resize
        if name in ("image_size", "in_channels"):
            _set(data, f"data.{name}", _value(value))
            if data["model"] is not None:
                _set(data, f"model.{name}", _value(value))
            continue
        _set(data, name, _value(value))
        if name in ("steps", "epochs"):
            data["epochs" if name == "steps" else "steps"] = None
        if name == "init_from" and data["init_from"] is not None:
            data["model"] = None
    return from_dict(TrainConfig, data)


def read_config(path: str) -> TrainConfig:
    """The config.json of a run; ValueError naming the file when it is not one."""
    try:
        return from_dict(TrainConfig, read_json(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


# Tables whose keys are free: what they hold is checked where it is used.
_OPEN = ("optimizer.options", "model_options", "model.moe.layer_routing")


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    """Sets data["a"]["b"] for the name "a.b"."""
    *path, leaf = name.split(".")
    table: Any = data
    for depth, part in enumerate([*path, leaf]):
        where = ".".join(path[:depth])
        if table is None and where == "model":
            raise ValueError(f"{name}: this run takes its model from init_from; use model_options.{leaf}=...")
        if not isinstance(table, dict):
            raise ValueError(f"{name}: {where} is one value, not a table")
        if part not in table and where not in _OPEN:
            near = difflib.get_close_matches(part, table, n=1)
            prefix = f"{where}." if where else ""
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"allowed: {', '.join(sorted(table))}"
            raise ValueError(f"unknown field {name!r}; {hint}")
        if depth < len(path):
            table = table.get(part)
    table[leaf] = value


def _value(text: str) -> Any:
    text = text.strip()
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
