"""Classification: top-1, top-5, loss, accuracy of every class, and speed over one pass of a loader."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionmoe.distributed.world import gather
from visionmoe.evaluate.forward import Loader, autocast_context, evaluation_mode, prepare
from visionmoe.evaluate.shared_batches import Share, broken_of_all, shared_batches


@dataclass
class Totals:
    """Sums over the images seen so far; per_class_* are (classes,).

    parts: of each batch, by its number, what is no integer: its summed loss and its share of dropped requests times its
    images, by name. Added up in the order of the batches they do not depend on who evaluated which.
    """

    num_images: int = 0
    top5: int = 0
    per_class_correct: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    per_class_images: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    parts: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, predictions: Tensor, losses: Tensor, labels: Tensor, number: int, dropped: Mapping[str, float]) -> Self:
        """Counts batch `number`: predictions (B, classes) probabilities, losses (B,), labels (B,), all on the CPU."""
        classes, size = predictions.shape[1], len(labels)
        best = predictions.topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        return cls(
            num_images=size,
            top5=int(hits.any(1).sum()),
            per_class_correct=torch.bincount(labels[hits[:, 0]], minlength=classes),
            per_class_images=torch.bincount(labels, minlength=classes),
            parts={number: {"loss": losses.double().sum().item()} | {k: size * v for k, v in dropped.items()}},
        )

    def add(self, other: Self) -> None:
        if not other.num_images:
            return
        if not self.num_images:
            self.per_class_correct = torch.zeros_like(other.per_class_correct)
            self.per_class_images = torch.zeros_like(other.per_class_images)
        self.num_images += other.num_images
        self.top5 += other.top5
        self.per_class_correct = self.per_class_correct + other.per_class_correct
        self.per_class_images = self.per_class_images + other.per_class_images
        self.parts |= other.parts

    def sums(self) -> dict[str, float]:
        """Of the parts, by name."""
        sums: dict[str, float] = {}
        for number in sorted(self.parts):
            for name, value in self.parts[number].items():
                sums[name] = sums.get(name, 0.0) + value
        return sums


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

    def __call__(self, model: nn.Module, on_start: Callable[[int], None] = lambda number: None) -> dict[str, Any]:
        """Evaluates `model` in evaluation mode and leaves its mode as it was. Raises ValueError without images.

        Of several processes (visionmoe.distributed) each evaluates some of the batches; all get the same result, whose
        speeds are those of all together. Collective. on_start: called with the number of every batch before it runs.
        """
        totals, model_seconds, start = Totals(), 0.0, time.perf_counter()
        with evaluation_mode(model):
            for share in shared_batches(model, self.loader, autocast=self.autocast):
                on_start(share.number)
                began = time.perf_counter()
                totals.add(self._batch(model, share))
                model_seconds += time.perf_counter() - began
                if self.on_batch is not None:
                    self.on_batch(share.progress)
        speed = totals.num_images / model_seconds if totals.num_images else 0.0
        of_all, speeds = Totals(), 0.0
        for own, own_speed in gather((totals, speed)):
            of_all.add(own)
            speeds += own_speed
        broken = broken_of_all(self.loader)
        if not of_all.num_images:
            raise ValueError("the evaluation data has no images")
        seconds = max(gather(time.perf_counter() - start))
        return self._summary(of_all, broken) | {
            "images_per_second": of_all.num_images / seconds,
            "model_images_per_second": speeds,
        }

    def _batch(self, model: nn.Module, share: Share) -> Totals:
        size, labels = len(share.images), share.labels
        images = prepare(model, share.images)
        with autocast_context(model, self.autocast):
            out = model(images)
        predictions = out.predictions()[:size].float().cpu()
        check_labels(labels, predictions.shape[1])
        if self.loss == "softmax":
            losses = -predictions[torch.arange(size), labels].clamp_min(1e-30).log()
        else:
            members = len(out.logits) // len(images)
            losses = sigmoid_losses(out.logits[: size * members].float().cpu(), labels)
        dropped = {name: value.item() for name, value in out.metrics.items() if name.endswith(".dropped")}
        return Totals.of(predictions, losses, labels, share.number, dropped)

    def _summary(self, totals: Totals, broken: dict[str, str]) -> dict[str, Any]:
        n, classes, sums = totals.num_images, len(totals.per_class_images), totals.sums()
        names = self.class_names or [str(c) for c in range(classes)]
        correct, images = totals.per_class_correct.tolist(), totals.per_class_images.tolist()
        return {
            "num_images": n,
            "top1": sum(correct) / n,
            "top5": totals.top5 / n,
            "loss": sums.pop("loss") / n,
            "per_class_accuracy": {k: c / m for k, c, m in zip(names, correct, images, strict=False) if m},
            "dropped": {name: value / n for name, value in sums.items()},
            "broken_images": broken,
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


def check_labels(labels: Tensor, num_classes: int) -> None:
    """ValueError when one of the labels is not a class of the model."""
    wrong = [label for label in torch.unique(labels).tolist() if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"the model has {num_classes} classes, but the data has the label {wrong[-1]}")
