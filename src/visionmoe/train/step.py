"""One training step: forward and backward over the parts of a batch, and the update, if everything is finite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionmoe.data.mixup import mixup, step_generator
from visionmoe.distributed.tensors import global_norm
from visionmoe.model.vit import ModelOutput
from visionmoe.train.losses import LossFn
from visionmoe.train.optim import ScheduledOptimizer
from visionmoe.train.parallel import Parallel


@dataclass(frozen=True)
class StepSettings:
    """How a step is made. mixup_alpha 0: no mixup. Gradients of the `accumulation` parts are averaged: equal to the
    whole batch's where routing groups lie within a part (their losses and capacities are per group)."""

    loss_fn: LossFn
    num_classes: int
    seed: int
    mixup_alpha: float = 0.0
    accumulation: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class StepResult:
    """Of one step, all detached: losses (), correct () share of rows whose best class is the target's, grad_norm ()
    before clipping, applied: False when something was not finite and the update was left out, router metrics."""

    main_loss: Tensor
    auxiliary_loss: Tensor
    accuracy: Tensor
    grad_norm: Tensor
    applied: bool
    metrics: dict[str, Tensor]


def train_step(
    forward: Callable[[Tensor], ModelOutput],
    optimizer: ScheduledOptimizer,
    images: Tensor,
    labels: Tensor,
    step: int,
    settings: StepSettings,
    parallel: Parallel | None = None,
) -> StepResult:
    """Runs step number `step` (0, 1, ...) on images (B, C, H, W) and labels (B,) int64, on the model's device.

    Everything random in it follows from (seed, step) and the places of the images in the global batch, so a resumed run
    repeats it, and so do other layouts, but for dropout's masks. A loss or gradient that is not finite, on whichever
    process, leaves parameters and optimizer as they were, on all of them.
    parallel: what `forward` was wrapped by; images and labels are then this process's slice of the batch, and the
    result's losses, accuracy and metrics are its own.
    """
    parallel = parallel or Parallel()
    rank, batch = parallel.world.rank, len(images)
    targets = F.one_hot(labels, settings.num_classes).float()
    if settings.mixup_alpha:
        generator = step_generator(settings.seed, step)
        images, targets = mixup(images, targets, settings.mixup_alpha, generator, next_row=parallel.next_row)
    optimizer.zero_grad(set_to_none=True)
    parts = list(zip(images.chunk(settings.accumulation), targets.chunk(settings.accumulation), strict=True))
    sums: dict[str, Tensor] = {}
    for number, (part_images, part_targets) in enumerate(parts):
        if parallel.shares_noise:
            seed_everything(settings.seed, step)
            parallel.place(rank * batch + number * len(part_images))
        else:
            seed_everything(settings.seed, step, rank * len(parts) + number)
        with parallel.part(last=number == len(parts) - 1):
            values = _backward(forward, part_images, part_targets, settings, share=1.0 / len(parts))
        for name, value in values.items():
            sums[name] = sums[name] + value if name in sums else value
    parallel.reduce_gradients()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = global_norm(grads)
    loss = parallel.mean(sums["main_loss"] + sums["auxiliary_loss"])
    applied = bool(torch.isfinite(loss) & torch.isfinite(norm))  # the step's only wait for the device
    if applied:
        optimizer.step(grad_norm=norm)
    means = {name: value / len(parts) for name, value in sums.items()}
    return StepResult(
        main_loss=means.pop("main_loss"),
        auxiliary_loss=means.pop("auxiliary_loss"),
        accuracy=means.pop("accuracy"),
        grad_norm=norm,
        applied=applied,
        metrics=means,
    )


def seed_everything(seed: int, *numbers: int) -> None:
    """Seeds torch's generators of all devices from (seed, numbers): router noise, dropout, initialisation."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


def _backward(
    forward: Callable[[Tensor], ModelOutput], images: Tensor, targets: Tensor, settings: StepSettings, share: float
) -> dict[str, Tensor]:
    """Adds the gradients of `share` times this part's loss; returns losses, accuracy and the router's metrics."""
    bf16 = settings.precision == "bfloat16"
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        out = forward(images)
    main_loss = settings.loss_fn(out.logits, targets)
    ((main_loss + out.auxiliary_loss) * share).backward()
    best = targets.argmax(dim=-1).repeat_interleave(out.logits.shape[0] // targets.shape[0])
    return {
        "main_loss": main_loss.detach(),
        "auxiliary_loss": out.auxiliary_loss.detach(),
        "accuracy": (out.logits.detach().argmax(dim=-1) == best).float().mean(),
        **out.metrics,
    }
