"""From a running training to a checkpoint and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visionmoe.checkpoint.sharded import open_checkpoint
from visionmoe.checkpoint.store import join_optimizer_state, split_optimizer_state
from visionmoe.config import to_dict
from visionmoe.distributed.tensors import empty_like, local, spread_like
from visionmoe.files import read_json
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.ema import Ema
from visionmoe.train.optim import ScheduledOptimizer
from visionmoe.train.scaling import state_placements


@dataclass
class Progress:
    """Numbers of a run that a resumed run goes on from. step: steps done, skipped ones included; the loader's place
    and all random numbers follow from it. best: metric -> [value, step]."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best: dict[str, list[float]] | None = None


def training_state(
    model: VisionTransformer, optimizer: ScheduledOptimizer, ema: Ema | None, progress: Progress
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a run goes on from: groups of tensors (whole ones, or DTensors of which this process has a part), and JSON
    values."""
    parameters = dict(model.named_parameters())
    own_tensors, optimizer_values = split_optimizer_state(optimizer.state_dict())
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, dict[str, Tensor]] = {"model": dict(model.state_dict()), "optimizer": {}}
    for key, value in own_tensors.items():
        param, placements = _of_state(optimizer, numbered, key)
        tensors["optimizer"][key] = spread_like(value, param, placements)
    if ema is not None:
        tensors["ema"] = {name: spread_like(average, parameters[name]) for name, average in ema.average.items()}
    values = {"progress": dict(vars(progress)), "model": to_dict(model.config), "optimizer": optimizer_values}
    return tensors, values


def restore_training(path: Path, model: VisionTransformer, optimizer: ScheduledOptimizer, ema: Ema | None) -> Progress:
    """Loads a verified checkpoint, of however many processes, into all parts, made with the saved run's config."""
    stored = open_checkpoint(path)
    state = read_json(path / "state.json")
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = dict(model.named_parameters())
    targets: dict[str, dict[str, Tensor]] = {"model": dict(model.state_dict()), "optimizer": {}}
    for key, whole in stored.groups["optimizer"].items():
        param, placements = _of_state(optimizer, numbered, key)
        targets["optimizer"][key] = empty_like(param, whole.size, whole.properties.dtype, placements)
    if ema is not None:
        if "ema" not in stored.groups:
            raise ValueError(f"{path} has no averaged parameters, but the run's config has ema_decay")
        targets["ema"] = {name: spread_like(average, parameters[name]) for name, average in ema.average.items()}
    stored.fill(targets)
    own = {key: local(tensor) for key, tensor in targets["optimizer"].items()}
    optimizer.load_state_dict(join_optimizer_state(own, state["optimizer"]))
    return Progress(**state["progress"])


def _of_state(optimizer: ScheduledOptimizer, numbered: list[Tensor], key: str) -> tuple[Tensor, list[Any] | None]:
    """The parameter to which the optimizer's tensor "3.mu" belongs, and how the tensor is divided."""
    number, _, name = key.partition(".")
    return numbered[int(number)], state_placements(optimizer.scaling, numbered[int(number)], name)
