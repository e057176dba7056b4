"""The loss of predictions whose confidence is set right: how well classes are told apart, however sure the model is.

Fewer experts make a model less sure before they make it wrong, and one trained with smoothed labels is not sure to
begin with. The plain loss then prefers settings that keep the confidence to those that keep the accuracy; the loss at
the best temperature (arXiv 1706.04599) follows the accuracy and, unlike it, also moves when no image changes sides.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.evaluate.classify import check_labels
from visionmoe.evaluate.forward import Loader, autocast_context, evaluation_mode, prepare
from visionmoe.evaluate.shared_batches import broken_of_all, rows_in_order, shared_batches

_SHARPEST = 32.0  # the largest inverse temperature that is looked for; the smallest is its reciprocal


class CalibratedEvaluator:
    """Called with a model; returns num_images, top1, loss, calibrated_loss, temperature.

    keep_images: also the lists image_losses (calibrated) and image_correct, in the order of the loader.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        autocast: bool = False,
        keep_images: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.loader, self.autocast, self.keep_images, self.on_batch = loader, autocast, keep_images, on_batch

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Evaluates in evaluation mode. Raises ValueError without images or with labels that the model lacks.

        Several processes share the batches, and all get the whole result. Collective.
        """
        rows: dict[int, tuple[Tensor, ...]] = {}
        with evaluation_mode(model):
            for share in shared_batches(model, self.loader, autocast=self.autocast):
                with autocast_context(model, self.autocast):
                    out = model(prepare(model, share.images))
                predictions = out.predictions()[: len(share.images)].float().cpu()
                check_labels(share.labels, predictions.shape[1])
                rows[share.number] = predictions.clamp_min(1e-30).log(), share.labels
                if self.on_batch is not None:
                    self.on_batch(share.progress)
        broken_of_all(self.loader)
        columns = rows_in_order(rows)
        if not columns:
            raise ValueError("the evaluation data has no images")
        return self._summary(*columns)

    def _summary(self, log_probs: Tensor, labels: Tensor) -> dict[str, Any]:
        sharpness = best_sharpness(log_probs, labels)
        losses = image_losses(log_probs, labels, sharpness)
        correct = log_probs.argmax(1) == labels
        result: dict[str, Any] = {
            "num_images": len(labels),
            "top1": correct.double().mean().item(),
            "loss": image_losses(log_probs, labels, 1.0).mean().item(),
            "calibrated_loss": losses.mean().item(),
            "temperature": 1 / sharpness,
        }
        if self.keep_images:
            result |= {"image_losses": [round(x, 6) for x in losses.tolist()], "image_correct": correct.int().tolist()}
        return result


def image_losses(log_probs: Tensor, labels: Tensor, sharpness: float) -> Tensor:
    """Cross-entropies (N,) float64 of log-probabilities (N, classes) multiplied by `sharpness`, 1 / temperature."""
    scaled = log_probs.double() * sharpness
    return scaled.logsumexp(1) - scaled[torch.arange(len(labels)), labels]


def best_sharpness(log_probs: Tensor, labels: Tensor) -> float:
    """The inverse temperature of the lowest mean loss, between 1/32 and 32: the loss is convex in it."""
    own = log_probs[torch.arange(len(labels)), labels].double().mean()
    low, high = -math.log(_SHARPEST), math.log(_SHARPEST)
    for _ in range(24):  # bisection of the derivative
        middle = (low + high) / 2
        weights = torch.softmax(log_probs * math.exp(middle), dim=1)
        if (weights * log_probs).sum(1).double().mean() > own:
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)
