"""Classification: top-1, top-5, loss, accuracy of every class, and speed over one pass of a loader."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]
"""images (B,C,H,W) in [-1, 1], labels (B,) int64, indices (B,) of the images in their source."""


class Loader(Protocol):
    """What evaluation needs of a loader; visionmoe.data.EvalLoader and a list of batches are such."""

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass
class Totals:
    """Sums over the images seen so far; per_class_* are (classes,)."""

    num_images: int = 0
    loss: float = 0.0
    top5: int = 0
    per_class_correct: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    per_class_images: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    dropped: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, predictions: Tensor, losses: Tensor, labels: Tensor) -> Self:
        """Counts one batch: predictions (B, classes) probabilities, losses (B,), labels (B,), all on the CPU."""
        classes = predictions.shape[1]
        best = predictions.topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        return cls(
            num_images=len(labels),
            loss=losses.double().sum().item(),
            top5=int(hits.any(1).sum()),
            per_class_correct=torch.bincount(labels[hits[:, 0]], minlength=classes),
            per_class_images=torch.bincount(labels, minlength=classes),
        )

    def add(self, other: Self) -> None:
        if not self.num_images:
            self.per_class_correct = torch.zeros_like(other.per_class_correct)
            self.per_class_images = torch.zeros_like(other.per_class_images)
        self.num_images += other.num_images
        self.loss += other.loss
        self.top5 += other.top5
        self.per_class_correct = self.per_class_correct + other.per_class_correct
        self.per_class_images = self.per_class_images + other.per_class_images
        for name, value in other.dropped.items():
            self.dropped[name] = self.dropped.get(name, 0.0) + value


class ClassificationEvaluator:
    """Built once for a loader, then called with a model as often as wanted; returns a dict of plain numbers.

    loader: yields (images (B,C,H,W), labels (B,), indices (B,)); its attribute `broken`, where it has one, maps the
        names of images that could not be read to the reasons.
    loss: "softmax" is -log of the predicted probability of the label (an ensemble's members averaged), "sigmoid" the
        sum over the classes of the binary cross-entropies (members averaged), as in pretraining.
    autocast: compute in bfloat16 where torch.autocast allows it. A bfloat16 model is used as it is.
    class_names: keys of per_class_accuracy, the numbers 0, 1, ... without them.
    on_batch: called with the number of images of every batch (for a progress bar).
    """

    def __init__(
        self,
        loader: Loader,
        *,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        autocast: bool = False,
        class_names: Sequence[str] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if loss not in ("softmax", "sigmoid"):
            raise ValueError(f"loss must be softmax or sigmoid, got {loss!r}")
        self.loader = loader
        self.loss = loss
        self.autocast = autocast
        self.class_names = None if class_names is None else list(class_names)
        self.on_batch = on_batch

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Evaluates `model` in evaluation mode and leaves its mode as it was. Raises ValueError without images."""
        totals, model_seconds, start = Totals(), 0.0, time.perf_counter()
        with evaluation_mode(model):
            for images, labels, _ in self.loader:
                began = time.perf_counter()
                totals.add(self._batch(model, images, labels))
                model_seconds += time.perf_counter() - began
                if self.on_batch is not None:
                    self.on_batch(len(labels))
        if not totals.num_images:
            raise ValueError("the evaluation data has no images")
        return self._summary(totals, time.perf_counter() - start, model_seconds)

    def _batch(self, model: nn.Module, images: Tensor, labels: Tensor) -> Totals:
        size = len(images)
        images = prepare(model, images)
        with autocast_context(model, self.autocast):
            out = model(images)
        predictions = out.predictions()[:size].float().cpu()
        check_labels(labels, predictions.shape[1])
        if self.loss == "softmax":
            losses = -predictions[torch.arange(size), labels].clamp_min(1e-30).log()
        else:
            members = len(out.logits) // len(images)
            losses = sigmoid_losses(out.logits[: size * members].float().cpu(), labels)
        totals = Totals.of(predictions, losses, labels)
        totals.dropped = {k: size * v.item() for k, v in out.metrics.items() if k.endswith(".dropped")}
        return totals

    def _summary(self, totals: Totals, seconds: float, model_seconds: float) -> dict[str, Any]:
        n, classes = totals.num_images, len(totals.per_class_images)
        names = self.class_names or [str(c) for c in range(classes)]
        correct, images = totals.per_class_correct.tolist(), totals.per_class_images.tolist()
        return {
            "num_images": n,
            "top1": sum(correct) / n,
            "top5": totals.top5 / n,
            "loss": totals.loss / n,
            "images_per_second": n / seconds,
            "model_images_per_second": n / model_seconds,
            "per_class_accuracy": {k: c / m for k, c, m in zip(names, correct, images, strict=False) if m},
            "dropped": {name: value / n for name, value in totals.dropped.items()},
            "broken_images": dict(getattr(self.loader, "broken", {})),
        }


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    autocast: bool = False,
    class_names: Sequence[str] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluates once; see `ClassificationEvaluator` for the arguments and the result."""
    evaluator = ClassificationEvaluator(
        loader, loss=loss, autocast=autocast, class_names=class_names, on_batch=on_batch
    )
    return evaluator(model)


def sigmoid_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over classes of the binary cross-entropy, (B*M, classes) and (B,) -> (B,), members averaged."""
    members = len(logits) // len(labels)
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype).repeat_interleave(members, dim=0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return losses.view(len(labels), members).mean(1)  # (B*M,) -> (B, M) -> (B,)


def padded_batch(num_images: int, tokens_per_image: int, group_size: int) -> int:
    """The smallest number of images >= num_images whose tokens divide into groups of `group_size` tokens."""
    step = group_size // math.gcd(group_size, tokens_per_image)
    return -(-num_images // step) * step


def prepare(model: nn.Module, images: Tensor) -> Tensor:
    """Moves images to the model's device and dtype, and fills the last routing group with black images.

    Only models whose groups have a fixed number of tokens need the filling; its logits are to be cut off.
    """
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype, non_blocking=True)
    config: Any = getattr(model, "config", None)
    if config is None or not config.moe.layers or not isinstance(config.moe.group_size, int):
        return images
    height, width = images.shape[-2] // config.patch_hw[0], images.shape[-1] // config.patch_hw[1]
    tokens = (height * width + (config.pooling == "token")) * config.ensemble_size
    missing = padded_batch(len(images), tokens, config.moe.group_size) - len(images)
    return torch.cat([images, images.new_full((missing, *images.shape[1:]), -1.0)]) if missing else images


def autocast_context(model: nn.Module, enabled: bool) -> torch.autocast:
    """bfloat16 autocast on the model's device."""
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every model is in the mode in which it was."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """ValueError when one of the labels is not a class of the model."""
    wrong = [label for label in torch.unique(labels).tolist() if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"the model has {num_classes} classes, but the data has the label {wrong[-1]}")
