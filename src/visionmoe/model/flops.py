"""Floating-point operations of a model, counted from its shapes and its routing setting."""

from visionmoe.config import ModelConfig
from visionmoe.model.routing import rounded_capacity
from visionmoe.model.soft import SoftRouter
from visionmoe.model.vit import VisionTransformer


def count_flops(
    model: VisionTransformer, image_size: int | tuple[int, int] | None = None, *, batch_size: int | None = None
) -> int:
    """Operations (2 per multiply-add) of the matrix products of one image's forward pass.

    Experts count what the routing in force pays for: the requests that its experts have places for, at most all that
    the tokens make. That is min(K, K * capacity_factor) experts per token but for the rounding of the capacity, which
    counts where the size of the routing groups is known. A forward pass on segments does less where experts that few
    tokens ask for leave places empty. It does more where the rows of an expert are filled up to a multiple of 16, by at
    most 15 rows per expert and layer: on a CPU in bfloat16, and in inference in float32 where an expert's product is
    large (from 256 rows on); in smaller ones with packed weights to a multiple of 4.

    image_size: pixels; None is the model's own. batch_size: images of a call, the size of the groups of a model with
    group_size "batch"; None: large, so that rounding does not matter.
    """
    config = model.config if image_size is None else model.config.replace(image_size=image_size)
    tokens, dim = config.num_tokens, config.hidden_size
    patch = config.patch_hw[0] * config.patch_hw[1] * config.in_channels
    multiply_adds: float = config.grid[0] * config.grid[1] * patch * dim
    for layer in range(config.num_layers):
        sparse = layer in config.moe.layers
        mlp = _moe(model, config, layer, batch_size) if sparse else tokens * 2 * dim * config.mlp_dim
        multiply_adds += config.copies(layer) * (tokens * 4 * dim * dim + 2 * tokens * tokens * dim + mlp)
    return round(2 * (multiply_adds + config.ensemble_size * _head(config) + _probe(config, batch_size)))


def _moe(model: VisionTransformer, config: ModelConfig, layer: int, batch_size: int | None) -> float:
    """Multiply-adds of one sparse layer for the tokens of one image (of one ensemble member)."""
    moe, tokens, dim = config.moe, config.num_tokens, config.hidden_size
    per_token = 2 * dim * config.mlp_dim
    group = _group_size(config, batch_size)
    if moe.router == "soft":
        router = model.moe_layer(layer).router
        assert isinstance(router, SoftRouter)
        slots = router.mu.shape[0] * router.mu.shape[1]  # of a group, which is an image unless it has a size
        groups = tokens / moe.group_size if isinstance(moe.group_size, int) else 1
        return groups * slots * per_token + 3 * tokens * slots * dim  # logits, dispatch, combine
    gate = tokens * dim * moe.num_experts / config.ensemble_size
    return gate + tokens * _experts_per_token(config, layer, group) * per_token


def _group_size(config: ModelConfig, batch_size: int | None) -> int | None:
    """Tokens of a routing group, copies of an ensemble included; None where it is not known."""
    size, of_image = config.moe.group_size, config.num_tokens * config.ensemble_size
    if isinstance(size, int):
        return size
    if size == "image":
        return of_image
    return None if batch_size is None else batch_size * of_image


def _experts_per_token(config: ModelConfig, layer: int, group: int | None) -> float:
    """Requests per token that the experts have places for, for groups of `group` tokens."""
    moe, setting = config.moe, config.moe.routing(layer)
    choosers = moe.num_experts if moe.router == "expert_choice" else setting.num_selected_experts
    k = 1 if moe.router == "expert_choice" else setting.num_selected_experts
    if group is None:
        return min(choosers, k * setting.capacity_factor)
    rounding = moe.capacity_ceil_or_round, moe.capacity_multiple_of
    capacity = rounded_capacity(group * k, moe.num_experts, setting.capacity_factor, *rounding)
    return min(choosers, moe.num_experts * capacity / group)


def _head(config: ModelConfig) -> int:
    dim = config.hidden_size
    width = config.representation_size or dim
    pool = 0
    if config.pooling == "map":
        pool = config.num_tokens * 2 * dim * dim + 2 * config.num_tokens * dim + dim * dim
        pool += 2 * dim * config.mlp_dim
    return pool + (dim * width if config.representation_size else 0) + width * (config.num_classes or 0)


def _probe(config: ModelConfig, batch_size: int | None) -> float:
    """The query of attention pooling is computed once a call, so it matters in small batches alone."""
    return config.hidden_size**2 / batch_size if config.pooling == "map" and batch_size else 0
