"""Floating-point operations of a model, counted from its shapes."""

from visionmoe.config import ModelConfig
from visionmoe.model.soft import SoftRouter
from visionmoe.model.vit import VisionTransformer


def count_flops(model: VisionTransformer, image_size: int | tuple[int, int] | None = None) -> int:
    """Operations (2 per multiply-add) of the matrix products of one image's forward pass.

    Experts count what the routing in force pays for: min(K, K * capacity_factor) experts per token, or the slots.
    Rounding of the capacity in small groups is left out. image_size: pixels; None is the model's own.
    """
    config = model.config if image_size is None else model.config.replace(image_size=image_size)
    tokens, dim = config.num_tokens, config.hidden_size
    patch = config.patch_hw[0] * config.patch_hw[1] * config.in_channels
    multiply_adds: float = config.grid[0] * config.grid[1] * patch * dim
    copies = 1
    for layer in range(config.num_layers):
        sparse = layer in config.moe.layers
        if sparse and layer == min(config.moe.layers):
            copies = config.ensemble_size
        mlp = _moe(model, config, layer) if sparse else tokens * 2 * dim * config.mlp_dim
        multiply_adds += copies * (tokens * 4 * dim * dim + 2 * tokens * tokens * dim + mlp)
    return round(2 * (multiply_adds + copies * _head(config)))


def _moe(model: VisionTransformer, config: ModelConfig, layer: int) -> float:
    """Multiply-adds of one sparse layer for the tokens of one image (of one ensemble member)."""
    moe, tokens, dim = config.moe, config.num_tokens, config.hidden_size
    per_token = 2 * dim * config.mlp_dim
    if moe.router == "soft":
        router = model.moe_layer(layer).router
        assert isinstance(router, SoftRouter)
        slots = router.mu.shape[0] * router.mu.shape[1]
        return slots * per_token + 3 * tokens * slots * dim  # logits, dispatch, combine
    setting = moe.routing(layer)
    gate = tokens * dim * moe.num_experts / config.ensemble_size
    if moe.router == "expert_choice":
        return gate + tokens * min(setting.capacity_factor, moe.num_experts) * per_token
    return gate + tokens * setting.num_selected_experts * min(1.0, setting.capacity_factor) * per_token


def _head(config: ModelConfig) -> int:
    dim = config.hidden_size
    width = config.representation_size or dim
    pool = 0
    if config.pooling == "map":
        pool = dim * dim + config.num_tokens * 2 * dim * dim + 2 * config.num_tokens * dim + dim * dim
        pool += 2 * dim * config.mlp_dim
    return pool + (dim * width if config.representation_size else 0) + width * (config.num_classes or 0)
