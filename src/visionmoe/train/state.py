"""From a running training to a checkpoint and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmoe.checkpoint.store import RunState, join_optimizer_state, save_run_state, split_optimizer_state
from visionmoe.config import to_dict
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.ema import Ema
from visionmoe.train.optim import ScheduledOptimizer


@dataclass
class Progress:
    """Numbers of a run that a resumed run goes on from. step: steps done, skipped ones included; the loader's place
    and all random numbers follow from it. best: metric -> [value, step]."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best: dict[str, list[float]] | None = None


def save_training(
    out: str,
    model: VisionTransformer,
    optimizer: ScheduledOptimizer,
    ema: Ema | None,
    progress: Progress,
    keep_last: int,
) -> Path:
    """Writes OUT/checkpoints/step_XXXXXXXX."""
    optimizer_tensors, optimizer_values = split_optimizer_state(optimizer.state_dict())
    tensors: dict[str, dict[str, Tensor]] = {"model": dict(model.state_dict()), "optimizer": optimizer_tensors}
    if ema is not None:
        tensors["ema"] = ema.average
    values = {"progress": dict(vars(progress)), "model": to_dict(model.config), "optimizer": optimizer_values}
    return save_run_state(out, progress.step, tensors, values, keep_last)


def restore_training(
    saved: RunState, path: str, model: VisionTransformer, optimizer: ScheduledOptimizer, ema: Ema | None
) -> Progress:
    """Loads a checkpoint (read from `path`) into all parts, made with the saved run's config."""
    model.load_state_dict(saved.tensors["model"])
    values: dict[str, Any] = saved.state["optimizer"]
    optimizer.load_state_dict(join_optimizer_state(saved.tensors["optimizer"], values))
    if ema is not None:
        if "ema" not in saved.tensors:
            raise ValueError(f"{path} has no averaged parameters, but the run's config has ema_decay")
        ema.load(saved.tensors["ema"])
    return Progress(**saved.state["progress"])


def choose_device(name: str) -> torch.device:
    """ "auto": a GPU where there is one. ValueError for a device that torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device must be auto, cpu, cuda, ... and be there, got {name!r}") from None
    return device
