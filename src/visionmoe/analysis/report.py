"""The pictures of a trained model: from its log, its sweep and a batch of images to files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionmoe.analysis.record import experts_by_class, kept_patches
from visionmoe.analysis.seriation import seriate
from visionmoe.config import RoutingSetting
from visionmoe.data.transforms import to_uint8
from visionmoe.evaluate.adaptive import SweepPoint, most_selected_experts
from visionmoe.evaluate.forward import Loader
from visionmoe.model.vit import VisionTransformer

Curves = tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[list[float]]]]
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def curves_of_log(records: Sequence[Mapping[str, Any]]) -> Curves:
    """The columns of a run's log.jsonl that `figures.learning_curves` draws."""
    rows = [r for r in records if r["kind"] == "train" and r["main_loss"] is not None]
    evaluations = [r for r in records if r["kind"] == "eval" and "top1" in r["metrics"]]
    train = {
        "step": [r["step"] for r in rows],
        "loss": [r["main_loss"] + r["auxiliary_loss"] for r in rows],
        "auxiliary_loss": [r["auxiliary_loss"] for r in rows],
        "accuracy": [r["accuracy"] for r in rows],
    }
    load = {
        block.replace(".", " ").replace("blocks", "block"): [r["router"][block]["expert_load"] for r in rows]
        for block in (rows[0]["router"] if rows else {})
    }
    shown = {
        "step": [r["step"] for r in evaluations],
        "top1": [r["metrics"]["top1"] for r in evaluations],
    }
    return train, shown, load


def spread_examples(labels: Tensor, classes: Sequence[int]) -> list[int]:
    """For every class the place of one of its images in the batch, the places spread over the batch in this order.

    Vanilla routing serves a batch from its beginning, so the places matter. Classes that the batch lacks are left out.
    """
    chosen = []
    for number, label in enumerate(classes):
        places = torch.nonzero(labels == label).flatten()
        if len(places):
            wanted = (number + 0.5) * len(labels) / len(classes)
            chosen.append(int(places[(places - wanted).abs().argmin()]))
    return chosen


def draw_kept_patches(
    path: Path,
    model: VisionTransformer,
    batch: tuple[Tensor, Tensor, Tensor],
    class_names: Sequence[str],
    *,
    batch_priority: bool,
    classes: Sequence[int],
    factors: Sequence[float] = FACTORS,
    order: str = "",
) -> dict[float, float]:
    """Photographs of the batch with the patches that the last sparse layer processes at every capacity factor.

    order: what the title calls the routing; "": by batch_priority.
    Returns the share of all patches of the batch that are kept, by capacity factor.
    """
    layer, k = model.moe_layers[-1], most_selected_experts(model)
    settings = [RoutingSetting(k, factor, batch_priority) for factor in factors]
    masks = dict(zip(factors, kept_patches(model, batch[0], settings)[layer], strict=True))
    order = order or ("batch-priority routing" if batch_priority else "vanilla routing")
    return draw_masks(path, batch, masks, class_names, classes, f"block {layer}, K={k}, {order}")


def draw_masks(
    path: Path,
    batch: tuple[Tensor, Tensor, Tensor],
    masks: Mapping[float, Tensor],
    class_names: Sequence[str],
    classes: Sequence[int],
    what: str,
) -> dict[float, float]:
    """Photographs of these classes with masks (B, rows, columns) bool by capacity factor; returns the shares kept."""
    from visionmoe.analysis import figures

    images, labels, _ = batch
    rows = spread_examples(labels, classes)
    pictures = to_uint8(images[rows]).permute(0, 2, 3, 1).cpu().numpy()  # (B, C, H, W) -> (B, H, W, C)
    shares = {factor: mask.float().mean().item() for factor, mask in masks.items()}
    figures.kept_patches(
        path,
        pictures,
        [mask[rows].numpy() for mask in masks.values()],
        shares,
        [class_names[label] for label in labels[rows].tolist()],
        title=f"What is left when experts have fewer places: {what}",
    )
    return shares


def draw_report(
    out: Path,
    model: VisionTransformer,
    loader: Loader,
    records: Sequence[Mapping[str, Any]],
    points: Sequence[SweepPoint],
    class_names: Sequence[str],
) -> dict[str, str]:
    """Draws everything into `out`; returns what each file shows, by its name."""
    from visionmoe.analysis import figures

    figures.learning_curves(out / "learning_curves.png", *curves_of_log(records))
    figures.accuracy_against_compute(out / "accuracy_vs_compute.png", points)
    batch = next(iter(loader))
    classes = _every_other(len(class_names))
    for name, priority in (("kept_patches.png", True), ("kept_patches_vanilla.png", False)):
        draw_kept_patches(out / name, model, batch, class_names, batch_priority=priority, classes=classes)
    shares = {n: np.asarray(share) for n, share in experts_by_class(model, loader, len(class_names)).items()}
    figures.experts_by_class(
        out / "experts_by_class.png",
        shares,
        class_names,
        "Which experts the tokens of each class ask for, in %",
        {layer: seriate(share) for layer, share in shares.items()},
    )
    return {
        "learning_curves.png": "loss, accuracy and the experts' shares over the run",
        "accuracy_vs_compute.png": "the trained model with fewer places per expert, in both orders",
        "kept_patches.png": "photographs with the patches that each capacity keeps, batch-priority routing",
        "kept_patches_vanilla.png": "the same with vanilla routing",
        "experts_by_class.png": "which experts each class uses, per layer",
    }


def _every_other(num_classes: int, most: int = 6) -> list[int]:
    """At most `most` classes, spread over all of them."""
    return sorted({round(i * (num_classes - 1) / (most - 1)) for i in range(most)})
