"""Mixup (arXiv 1710.09412) as the reference does it: inside the training step, on the batch."""

import numpy as np
import torch
from torch import Tensor


def mixup(images: Tensor, labels: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixes every image with the next one of the batch, the last with the first.

    images (B, C, H, W); labels (B, classes) one-hot, float; alpha > 0. One pair of weights is drawn for the whole batch
    from a symmetric Dirichlet with concentration alpha; the larger one goes to the image itself.
    Processes that hold slices of one batch draw the same weights from equal generators and mix within their slice.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    if len(images) != len(labels) or labels.ndim != 2:
        raise ValueError(f"labels must be one-hot, ({len(images)}, classes), got {tuple(labels.shape)}")
    # torch has no public Dirichlet that takes a generator.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    weight = float(np.random.default_rng(seed).dirichlet((alpha, alpha)).max())
    return _mix(images, weight), _mix(labels, weight)


def step_generator(seed: int, step: int, purpose: str = "mixup", device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that follows from (seed, step, purpose) alone: a resumed run draws what it would have drawn."""
    state = np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


def _mix(x: Tensor, weight: float) -> Tensor:
    return weight * x + (1 - weight) * x.roll(-1, dims=0)
