"""Records what the routers of a model do with given images."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionmoe.config import ModelConfig, RoutingSetting
from visionmoe.evaluate.adaptive import restored_routing, set_routing
from visionmoe.evaluate.forward import autocast_context, evaluation_mode, prepare
from visionmoe.model.router import Router
from visionmoe.model.routing import Routing
from visionmoe.model.vit import VisionTransformer


@dataclass(frozen=True)
class Requests:
    """What the tokens of a batch asked of one sparse layer; numpy, one entry per request, (R,).

    image: number in the batch. token: place in the image, the class token included. rank: 0 for the first choice, 1 for
    the second, ...; with expert choice, where tokens have no choices, 0. weight: that of the routing, see
    `with_probabilities`. kept: bool.
    """

    image: np.ndarray
    token: np.ndarray
    expert: np.ndarray
    rank: np.ndarray
    weight: np.ndarray
    kept: np.ndarray


@contextlib.contextmanager
def recording(model: VisionTransformer) -> Iterator[dict[int, list[Routing]]]:
    """Yields a dict that fills with the `Routing` of every forward call, by block number, while the body runs.

    ValueError for a model whose layers do not route (dense, or Soft MoE, which mixes instead).
    """
    records: dict[int, list[Routing]] = {layer: [] for layer in model.moe_layers}
    with _hooks(model, lambda layer, router, x, routing: records[layer].append(routing)):
        yield records


@contextlib.contextmanager
def recording_probabilities(model: VisionTransformer) -> Iterator[dict[int, list[Tensor]]]:
    """As `recording`, but of every token's probabilities over its experts, one (G, S, E/M) per call.

    The probabilities are computed anew from the router's input: a forward pass without this pays nothing for it.
    """
    records: dict[int, list[Tensor]] = {layer: [] for layer in model.moe_layers}

    def record(layer: int, router: Router, x: Tensor, routing: Routing) -> None:
        records[layer].append(router.probabilities(x).transpose(1, 2).flatten(1, 2))  # (G, M, S/M, E/M) -> (G, S, E/M)

    with _hooks(model, record):
        yield records


@contextlib.contextmanager
def _hooks(model: VisionTransformer, record: Any) -> Iterator[None]:
    """Calls record(layer, router, its input, its Routing) after every forward call of a router."""
    if not model.moe_layers or model.config.moe.router == "soft":
        raise ValueError("the model has no layers that route tokens to experts")

    def hook_of(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            record(layer, module, inputs[0], output[0])

        return hook

    routers = {layer: model.get_submodule(f"blocks.{layer}.mlp.router") for layer in model.moe_layers}
    handles = [router.register_forward_hook(hook_of(layer)) for layer, router in routers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_routing(model: VisionTransformer, images: Tensor, *, autocast: bool = False) -> dict[int, Routing]:
    """The routing of every sparse layer, by block number, for images (B, C, H, W) as one batch, without noise."""
    if images.shape[-2:] != model.config.image_hw:
        raise ValueError(f"images must be {model.config.image_hw} pixels, as the model, got {tuple(images.shape[-2:])}")
    with evaluation_mode(model), recording(model) as records, autocast_context(model, autocast):
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
    model: VisionTransformer,
    images: Tensor,
    settings: Sequence[RoutingSetting],
    *,
    autocast: bool = False,
    on_setting: Callable[[], None] = lambda: None,
) -> dict[int, list[Tensor]]:
    """Which patches at least one expert processes, by block number, one (B, rows, columns) bool per setting.

    All images are one batch, so they compete for the experts' places where the routing groups span images.
    The model's own routing is restored afterwards. on_setting: called after each of them.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in model.moe_layers}
    with restored_routing(model):
        for setting in settings:
            set_routing(model, setting)
            for layer, routing in record_routing(model, images, autocast=autocast).items():
                counts = experts_per_token(routing, model.config, len(images))
                kept[layer].append(to_grid(counts, model.config).cpu() > 0)
            on_setting()
    return kept


def experts_by_class(
    model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor, Tensor]], num_classes: int
) -> dict[int, Tensor]:
    """Share of each class's requests that go to each expert, by block number, (classes, E) with rows that sum to 1.

    Counts what the tokens ask for, before anything is dropped. Classes without images have rows of zeros.
    """
    experts = model.config.moe.num_experts
    totals = {layer: np.zeros((num_classes, experts), np.int64) for layer in model.moe_layers}
    for images, labels, _ in batches:
        for layer, routing in record_routing(model, images).items():
            by_image = count_by_image(requests_of(routing, model.config, len(images)), len(images), experts)
            np.add.at(totals[layer], labels.numpy(), by_image.sum(1))
    return {layer: torch.from_numpy(total / np.maximum(total.sum(1, keepdims=True), 1)).float()
            for layer, total in totals.items()}  # fmt: skip


def entropy_bits(probabilities: Tensor, config: ModelConfig, num_images: int) -> Tensor:
    """Entropy of every token's probabilities in bits, (B, T, M), from the (G, S, E/M) of `recording_probabilities`."""
    entropy = torch.special.entr(probabilities).sum(-1) / np.log(2)
    return entropy.view(-1, config.num_tokens, config.ensemble_size)[:num_images]


def with_probabilities(routing: Routing, probabilities: Tensor) -> Routing:
    """The same requests, with the router's probabilities (G, S, E/M) of their experts as weights.

    Normalised combine weights are 1 and 0 where one request of a token's two is dropped, whatever the router thinks.
    """
    groups, requests = routing.token_index.shape
    group = torch.arange(groups, device=probabilities.device)[:, None].expand(groups, requests)
    weights = probabilities[group, routing.token_index, routing.expert_index % probabilities.shape[-1]]
    return dataclasses.replace(routing, combine_weights=weights)


def requests_of(routing: Routing, config: ModelConfig, num_images: int) -> Requests:
    """The requests of the first `num_images` images; those that only fill the last group are left out.

    Their weights are the routing's: see `with_probabilities`.
    """
    groups, requests = routing.token_index.shape
    top_k = config.moe.router == "top_k"
    choices = requests // routing.num_tokens if top_k else 1
    group = torch.arange(groups)[:, None]
    place = (group * routing.num_tokens + routing.token_index.cpu()) // config.ensemble_size  # among all (B*T,)
    image = place // config.num_tokens
    real = image < num_images
    rank = (torch.arange(requests) % choices).expand(groups, -1)
    columns = (image, place % config.num_tokens, routing.expert_index.cpu(), rank,
               routing.combine_weights.float().cpu(), routing.kept.cpu())  # fmt: skip
    return Requests(*(column[real].numpy() for column in columns))


def count_by_image(requests: Requests, num_images: int, num_experts: int) -> np.ndarray:
    """How often each image asks for each expert: int64 (B, 2, E), first choices and later ones apart."""
    cell = (requests.image * 2 + (requests.rank > 0)) * num_experts + requests.expert
    return np.bincount(cell, minlength=num_images * 2 * num_experts).reshape(num_images, 2, num_experts)
