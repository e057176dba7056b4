"""How much of the experts' compute each image gets, and how that goes with how hard the image is.

With batch-priority routing and scarce places the images of a batch compete: the tokens that the router is surest of are
processed, wherever they are (arXiv 2106.05974, section 4). So one image may keep most of its tokens and another few.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionmoe.analysis.record import experts_per_token, recording, to_grid
from visionmoe.config import ModelConfig, RoutingSetting
from visionmoe.data.transforms import to_uint8
from visionmoe.distributed.world import current, gather
from visionmoe.evaluate.adaptive import most_selected_experts, restored_routing, set_routing
from visionmoe.evaluate.forward import Loader, autocast_context, evaluation_mode, prepare
from visionmoe.evaluate.shared_batches import broken_of_all, rows_in_order, shared_batches
from visionmoe.model.routing import Routing
from visionmoe.model.vit import ModelOutput, VisionTransformer

CAPACITY = 0.3  # places for three requests of ten: scarce enough for images to differ, still accurate


@dataclass(frozen=True)
class ImageCompute:
    """What images got at one setting. All are (N,), over all images in the order of the loader.

    share: kept requests over made ones, mean over the sparse layers. tokens: those that at least one expert of the last
    sparse layer processed. correct, loss: at this setting. own_correct, own_loss: at the model's own setting, where
    (almost) nothing is dropped: how hard the image is, whatever it got here. labels, indices: as the loader's.
    """

    share: Tensor
    tokens: Tensor
    correct: Tensor
    loss: Tensor
    own_correct: Tensor
    own_loss: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Example:
    """One image with what it got: picture uint8 (H, W, C), kept patches (rows, columns) bool by block number."""

    share: float
    tokens: int
    label: int
    correct: bool
    index: int
    picture: np.ndarray
    kept: Mapping[int, np.ndarray]


def tokens_per_image(routing: Routing, config: ModelConfig, num_images: int) -> Tensor:
    """(B,) how many of each image's tokens at least one expert processes (of any member of an ensemble)."""
    return (experts_per_token(routing, config, num_images) > 0).sum(1)


def requests_per_image(routing: Routing, config: ModelConfig, num_images: int) -> Tensor:
    """(B,) how many times an expert runs on a token of each image: what the image costs."""
    return experts_per_token(routing, config, num_images).sum(1)


def shares_per_image(routings: Mapping[int, Routing], config: ModelConfig, num_images: int) -> Tensor:
    """(B,) kept requests over those that an image makes on average, mean over the layers."""
    shares = []
    for routing in routings.values():
        made = routing.token_index.shape[1] / routing.num_tokens * config.num_tokens * config.ensemble_size
        shares.append(requests_per_image(routing, config, num_images) / made)
    return torch.stack(shares).mean(0)


def record_compute(
    model: VisionTransformer,
    loader: Loader,
    setting: RoutingSetting,
    *,
    examples: int = 6,
    autocast: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[ImageCompute, list[Example], list[Example]]:
    """Runs all images at `setting` and at the model's own, which is restored.

    Returns the table, and the `examples` images that got least and most, in the order of what they got. on_batch:
    called with the number of images of every batch. Several processes share the batches, and all get the whole.
    """
    rows: dict[int, tuple[Tensor, ...]] = {}
    fewest: list[_Ranked] = []
    most: list[_Ranked] = []
    with evaluation_mode(model):
        for batch in shared_batches(model, loader, autocast=autocast):
            images, labels = batch.images, batch.labels
            own = _losses(_forward(model, images, autocast), labels)
            with restored_routing(model), recording(model) as records:
                set_routing(model, setting)
                here = _losses(_forward(model, images, autocast), labels)
            routings = {layer: found[0] for layer, found in records.items()}
            share = shares_per_image(routings, model.config, len(images)).cpu()
            tokens = tokens_per_image(routings[model.moe_layers[-1]], model.config, len(images)).cpu()
            row = rows[batch.number] = (share, tokens, *here, *own, labels, batch.indices)
            order = share.argsort(stable=True).tolist()
            for chosen, places, sign in ((fewest, order[:examples], 1), (most, order[::-1][:examples], -1)):
                found = _examples(model.config, routings, images, row, places)
                chosen += [((sign * e.share, batch.number, n), e) for n, e in enumerate(found)]
            fewest, most = _first(fewest, examples), _first(most, examples)
            on_batch(batch.progress)
    broken_of_all(loader)
    columns = rows_in_order(rows)
    if not columns:
        raise ValueError("the data has no images")
    least, best = (
        [example for _, example in _first([one for part in gather(own) for one in part], examples)]
        for own in (fewest, most)
    )
    return ImageCompute(*columns), least, best


_Ranked = tuple[tuple[float, int, int], Example]  # what it got, its batch, its place among the batch's: its rank


def _first(examples: list[_Ranked], count: int) -> list[_Ranked]:
    return sorted(examples, key=lambda ranked: ranked[0])[:count]


def quartiles(compute: ImageCompute) -> list[dict[str, float]]:
    """Accuracy and loss of the images by quarters of what they got, least first. Fewer than four images: as many."""
    parts = torch.tensor_split(compute.share.argsort(stable=True), min(4, len(compute.share)))
    return [
        {
            "images": len(part),
            "lowest_share": compute.share[part].min().item(),
            "mean_share": compute.share[part].mean().item(),
            "highest_share": compute.share[part].max().item(),
            "top1": compute.correct[part].float().mean().item(),
            "loss": compute.loss[part].mean().item(),
            "own_setting_top1": compute.own_correct[part].float().mean().item(),
            "own_setting_loss": compute.own_loss[part].mean().item(),
        }
        for part in parts
    ]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's coefficient of two (N,), equal values sharing their mean rank; 0 where one is constant."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    scale = centred.norm(dim=1).prod()
    return (centred.prod(0).sum() / scale).item() if scale > 0 else 0.0


def draw_compute_per_image(
    path: Path,
    model: VisionTransformer,
    loader: Loader,
    class_names: tuple[str, ...],
    *,
    capacity_factor: float = CAPACITY,
    autocast: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Draws the images that got least and most at this capacity, batch-priority; returns the numbers for the JSON."""
    from visionmoe.analysis import figures

    setting = RoutingSetting(most_selected_experts(model), capacity_factor, True)
    compute, fewest, most = record_compute(model, loader, setting, autocast=autocast, on_batch=on_batch)
    by_quarter = quartiles(compute)
    if current().is_first:
        figures.compute_per_image(path, fewest, most, by_quarter, compute.share.tolist(), class_names, setting)
    return {
        "setting": asdict(setting),
        "what": "share: kept routing requests of an image over those that it makes, mean over the sparse layers; "
        "images of a batch compete; own_setting: the same images at the model's own routing",
        "mean_share": compute.share.mean().item(),
        "lowest_share": compute.share.min().item(),
        "highest_share": compute.share.max().item(),
        "mean_tokens_in_last_layer": compute.tokens.float().mean().item(),
        "quartiles": by_quarter,
        "rank_correlation_of_share_with_loss": rank_correlation(compute.share, compute.loss),
        "rank_correlation_of_share_with_own_setting_loss": rank_correlation(compute.share, compute.own_loss),
        "fewest": [_named(example, class_names) for example in fewest],
        "most": [_named(example, class_names) for example in most],
    }


def _forward(model: VisionTransformer, images: Tensor, autocast: bool) -> Tensor:
    """Class probabilities (B, classes) on the CPU."""
    with autocast_context(model, autocast):
        out: ModelOutput = model(prepare(model, images))
    return out.predictions()[: len(images)].float().cpu()


def _losses(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """correct (B,) bool, loss (B,)."""
    chosen = predictions[torch.arange(len(labels)), labels]
    return predictions.argmax(1) == labels, -chosen.clamp_min(1e-30).log()


def _examples(
    config: ModelConfig, routings: Mapping[int, Routing], images: Tensor, row: tuple[Tensor, ...], places: list[int]
) -> list[Example]:
    share, tokens, correct, *_, labels, indices = row
    kept = {
        layer: to_grid(experts_per_token(routing, config, len(images)), config)[places].cpu().numpy() > 0
        for layer, routing in routings.items()
    }
    pictures = to_uint8(images[places]).permute(0, 2, 3, 1).cpu().numpy()  # (B, C, H, W) -> (B, H, W, C)
    return [
        Example(
            share=share[place].item(),
            tokens=int(tokens[place]),
            label=int(labels[place]),
            correct=bool(correct[place]),
            index=int(indices[place]),
            picture=pictures[number],
            kept={layer: mask[number] for layer, mask in kept.items()},
        )
        for number, place in enumerate(places)
    ]


def _named(example: Example, class_names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "index": example.index,
        "class": class_names[example.label],
        "share": example.share,
        "tokens_in_last_layer": example.tokens,
        "correct": example.correct,
    }


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]
