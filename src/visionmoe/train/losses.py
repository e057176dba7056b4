"""Main losses: logits and soft targets in, one number out (the mean over rows).

An ensemble (E3, arXiv 2110.03360) trains every member on its own: its logits are (B*M, classes), copies of an
image adjacent, and each row is compared with the image's targets. Evaluation averages the members' probabilities.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["softmax", "sigmoid"]
LossFn = Callable[[Tensor, Tensor], Tensor]


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum_c targets_c log softmax(logits)_c.

    logits (B*M, classes), targets (B, classes) of any floating type; computed in float32.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return -(_per_row(targets, logits) * log_probs).sum(dim=-1).mean()


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class, summed over classes, mean over rows (shapes as above)."""
    logits = logits.float()
    losses = F.binary_cross_entropy_with_logits(logits, _per_row(targets, logits), reduction="none")
    return losses.sum(dim=-1).mean()


def smooth_labels(targets: Tensor, amount: float) -> Tensor:
    """Moves the share `amount` of every target (B, classes) evenly to all classes (arXiv 1512.00567, section 7)."""
    return targets * (1.0 - amount) + amount / targets.shape[-1] if amount else targets


def create_loss(name: LossName, label_smoothing: float = 0.0) -> LossFn:
    """Returns the loss `name`, with label smoothing; ensembles are recognised by their rows of logits.

    Raises ValueError for an unknown name or a label_smoothing outside [0, 1).
    """
    if name not in get_args(LossName):
        raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {name!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be >= 0 and < 1, got {label_smoothing}")
    loss = softmax_cross_entropy if name == "softmax" else sigmoid_cross_entropy
    return lambda logits, targets: loss(logits, smooth_labels(targets, label_smoothing))


def ensemble_log_probs(logits: Tensor, ensemble_size: int) -> Tensor:
    """Log of the members' averaged class probabilities, (B*M, classes) -> (B, classes)."""
    log_probs = F.log_softmax(logits.float(), dim=-1).unflatten(0, (-1, ensemble_size))  # (B*M, c) -> (B, M, c)
    return torch.logsumexp(log_probs, dim=1) - torch.log(torch.tensor(float(ensemble_size)))


def _per_row(targets: Tensor, logits: Tensor) -> Tensor:
    """Repeats the targets for the M adjacent rows of logits that belong to each image."""
    copies, rest = divmod(logits.shape[0], targets.shape[0])
    if rest or copies < 1 or logits.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"logits must be (B*M, classes) for targets (B, classes), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    targets = targets.to(torch.float32)
    return targets if copies == 1 else targets.repeat_interleave(copies, dim=0)
