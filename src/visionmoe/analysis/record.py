"""Records what the routers of a model do with given images."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.config import ModelConfig, RoutingSetting
from visionmoe.evaluate.adaptive import restored_routing, set_routing
from visionmoe.evaluate.classify import evaluation_mode, prepare
from visionmoe.model.routing import Routing
from visionmoe.model.vit import VisionTransformer


@contextlib.contextmanager
def recording(model: VisionTransformer) -> Iterator[dict[int, list[Routing]]]:
    """Yields a dict that fills with the `Routing` of every forward call, by block number, while the body runs.

    ValueError for a model whose layers do not route (dense, or Soft MoE, which mixes instead).
    """
    if not model.moe_layers or model.config.moe.router == "soft":
        raise ValueError("the model has no layers that route tokens to experts")
    records: dict[int, list[Routing]] = {layer: [] for layer in model.moe_layers}

    def hook_of(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            records[layer].append(output[0])

        return hook

    routers = {layer: model.get_submodule(f"blocks.{layer}.mlp.router") for layer in model.moe_layers}
    handles = [router.register_forward_hook(hook_of(layer)) for layer, router in routers.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def record_routing(model: VisionTransformer, images: Tensor) -> dict[int, Routing]:
    """The routing of every sparse layer, by block number, for images (B, C, H, W) as one batch, without noise."""
    if images.shape[-2:] != model.config.image_hw:
        raise ValueError(f"images must be {model.config.image_hw} pixels, as the model, got {tuple(images.shape[-2:])}")
    with evaluation_mode(model), recording(model) as records:
        model(prepare(model, images))
    return {layer: routings[0] for layer, routings in records.items()}


def experts_per_token(routing: Routing, config: ModelConfig, num_images: int) -> Tensor:
    """How many experts process each token, (B, T); the sum over the members of an ensemble."""
    members, tokens = config.ensemble_size, config.num_tokens
    counts = routing.tokens_kept().view(-1, tokens, members).sum(-1)  # (G, S) -> (B, T, M) -> (B, T)
    return counts[:num_images]


def to_grid(per_token: Tensor, config: ModelConfig) -> Tensor:
    """Values of tokens on the grid of patches, the class token left out. (B, T) -> (B, rows, columns)."""
    rows, columns = config.grid
    return per_token[:, -rows * columns :].view(-1, rows, columns)


def kept_patches(
    model: VisionTransformer, images: Tensor, settings: Sequence[RoutingSetting]
) -> dict[int, list[Tensor]]:
    """Which patches at least one expert processes, by block number, one (B, rows, columns) bool per setting.

    All images are one batch, so they compete for the experts' places where the routing groups span images.
    The model's own routing is restored afterwards.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in model.moe_layers}
    with restored_routing(model):
        for setting in settings:
            set_routing(model, setting)
            for layer, routing in record_routing(model, images).items():
                counts = experts_per_token(routing, model.config, len(images))
                kept[layer].append(to_grid(counts, model.config).cpu() > 0)
    return kept


def experts_by_class(
    model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor, Tensor]], num_classes: int
) -> dict[int, Tensor]:
    """Share of each class's requests that go to each expert, by block number, (classes, E) with rows that sum to 1.

    Counts what the tokens ask for, before anything is dropped. Classes without images have rows of zeros.
    """
    config = model.config
    shape = (num_classes, config.moe.num_experts)
    totals = {layer: torch.zeros(shape, dtype=torch.int64) for layer in model.moe_layers}
    for images, labels, _ in batches:
        for layer, routing in record_routing(model, images).items():
            image = _image_of_request(routing, config)
            real = image < len(images)  # not those that only fill the last group
            pair = labels[image[real]] * config.moe.num_experts + routing.expert_index.cpu()[real]
            totals[layer] += torch.bincount(pair, minlength=totals[layer].numel()).view(shape)
    return {layer: total / total.sum(1, keepdim=True).clamp_min(1) for layer, total in totals.items()}


def _image_of_request(routing: Routing, config: ModelConfig) -> Tensor:
    """Number in the batch of the image that each request (G, R) comes from."""
    group = torch.arange(len(routing.token_index))[:, None]
    return (group * routing.num_tokens + routing.token_index.cpu()) // (config.num_tokens * config.ensemble_size)
