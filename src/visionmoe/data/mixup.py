"""Mixup (arXiv 1710.09412) as the reference does it: inside the training step, on the batch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def mixup(
    images: Tensor,
    labels: Tensor,
    alpha: float,
    generator: torch.Generator,
    *,
    next_row: Callable[[Tensor], Tensor] = lambda x: x[:1],
) -> tuple[Tensor, Tensor]:
    """Mixes every image with the next one of the batch, the last with the first.

    images (B, C, H, W); labels (B, classes) one-hot, float; alpha > 0. One pair of weights is drawn for the whole batch
    from a symmetric Dirichlet with concentration alpha; the larger one goes to the image itself.
    next_row: of processes that hold slices of one batch: gives the row (1, ...) that follows the slice's last one. They
    draw the same weights from equal generators.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    if len(images) != len(labels) or labels.ndim != 2:
        raise ValueError(f"labels must be one-hot, ({len(images)}, classes), got {tuple(labels.shape)}")
    # torch has no public Dirichlet that takes a generator.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    weight = float(np.random.default_rng(seed).dirichlet((alpha, alpha)).max())
    mixed = (weight * x + (1 - weight) * torch.cat([x[1:], next_row(x)]) for x in (images, labels))
    return next(mixed), next(mixed)


def step_generator(seed: int, step: int, purpose: str = "mixup", device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that follows from (seed, step, purpose) alone: a resumed run draws what it would have drawn."""
    state = np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))
