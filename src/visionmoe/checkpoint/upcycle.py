"""Sparse upcycling (arXiv 2212.05055): a V-MoE whose experts start as copies of a dense ViT's MLPs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.checkpoint.dense_sources import Config, open_dense
from visionmoe.checkpoint.sources import Source
from visionmoe.config import ModelConfig, MoEConfig, check_names
from visionmoe.model.router import lecun_normal_
from visionmoe.model.vit import VisionTransformer
from visionmoe.variants import PLACEMENTS, moe_layers

_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True)
class Upcycling:
    """How a dense ViT becomes sparse.

    layers: blocks that get experts, counted from 0; None: by `placement`, "every2" (blocks 1, 3, 5, ...), "last2" or
    "last5" of those. noise: standard deviation of Gaussian noise on the experts' weights and biases, relative to that
    of each tensor; 0: exact copies, which the routers alone then make different. router_std: of the new routers' normal
    weights, None: LeCun normal, as for a new model. normalize_weights: the weights of a token's kept experts sum to
    1 (`MoEConfig.normalize_combine_weights`), so that the sparse model starts as the dense one. seed: of the noise and
    the routers.
    """

    layers: tuple[int, ...] | None = None
    placement: str = "every2"
    num_experts: int = 8
    num_selected_experts: int = 2
    capacity_factor: float = 2.0
    noise: float = 0.0
    router_std: float | None = None
    normalize_weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        if self.layers is not None and not self.layers:
            raise ValueError("layers must name at least one block")
        for name in ("noise", "router_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")

    def sparse(self, dense: ModelConfig) -> ModelConfig:
        """The config of the sparse model; ValueError for layers, experts or capacities that cannot be."""
        layers = moe_layers(self.placement, dense.num_layers) if self.layers is None else tuple(sorted({*self.layers}))
        if not layers:
            raise ValueError(f"placement {self.placement} finds no block among {dense.num_layers}: give layers")
        moe = MoEConfig(
            num_experts=self.num_experts,
            layers=layers,
            num_selected_experts=self.num_selected_experts,
            capacity_factor=self.capacity_factor,
            normalize_combine_weights=self.normalize_weights,
        )
        return dense.replace(moe=moe)


@dataclass(frozen=True)
class Difference:
    """How far the sparse model is from the dense one: largest absolute difference of the outputs, and the mean share
    of requests that found no place."""

    capacity_factor: float
    max_abs_difference: float
    dropped: float


def upcycle(
    model_or_path: nn.Module | str | os.PathLike,
    *,
    config: Config = None,
    timm_model: str | None = None,
    **options: Any,
) -> VisionTransformer:
    """Returns a V-MoE (float32, evaluation mode) with a dense ViT's parameters; routers are new.

    model_or_path, config, timm_model: see `dense_sources.open_dense`. options: the fields of `Upcycling`.
    With `normalize_weights` and without noise its outputs are the dense model's, as long as every token gets a place.
    """
    check_names("upcycle", options, [f.name for f in fields(Upcycling)])
    return upcycled(open_dense(model_or_path, config, timm_model=timm_model), Upcycling(**options))


@torch.no_grad()
def upcycled(source: Source, upcycling: Upcycling) -> VisionTransformer:
    """As `upcycle`. Every parameter is read straight into its place, so that only the new model is in memory, and all
    of them at once, because a compressed file is read from its beginning each time."""
    config = upcycling.sparse(source.config)
    state = _empty_state(config)
    sparse = [f"blocks.{layer}.mlp." for layer in config.moe.layers]
    dense = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(sparse))}
    first = {f"{prefix}{part}": state[f"{prefix}experts.{part}"][0] for prefix in sparse for part in _MLP}
    source.fill(dense | first)
    generator = torch.Generator().manual_seed(upcycling.seed)
    for prefix in sparse:
        for part in _MLP:
            _copy_to_all(state[f"{prefix}experts.{part}"], upcycling.noise, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(upcycling.seed)
        for prefix in sparse:
            _new_router(state[f"{prefix}router.gate.weight"], upcycling.router_std)
    model = _model(config, state)
    model.class_names, model.preprocessing = source.class_names, source.preprocessing
    return model


@torch.no_grad()
def dense_outputs(source: Source, images: Tensor) -> Tensor:
    """What the dense model gives, by the source's own implementation where it is at hand. (B, C, H, W) -> (B, N)."""
    original = getattr(source, "original", None)
    if original is not None:
        return original(images)
    state = _empty_state(source.config)
    source.fill(state)
    return _model(source.config, state)(images).logits


@torch.no_grad()
def differences(model: VisionTransformer, images: Tensor, expected: Tensor) -> list[Difference]:
    """Compares at the capacity at which nothing can be dropped, and at the model's own; in evaluation mode."""
    own = model.config.moe.routing()
    found = []
    for factor in (model.config.moe.num_experts / own.num_selected_experts, own.capacity_factor):
        model.set_routing(capacity_factor=factor)
        output = model(images)
        shares = [value.item() for name, value in output.metrics.items() if name.endswith(".dropped")]
        distance = (output.logits - expected).abs().max().item()
        found.append(Difference(factor, distance, sum(shares) / len(shares)))
    model.set_routing(capacity_factor=own.capacity_factor)
    return found


def _copy_to_all(experts: Tensor, noise: float, generator: torch.Generator) -> None:
    """Expert 0 to all (E, ...), then noise of a relative standard deviation."""
    spread = experts[0].std(correction=0) * noise
    experts[1:] = experts[:1]
    if noise:
        for expert in experts:
            expert += torch.randn(expert.shape, generator=generator) * spread


def _new_router(weight: Tensor, std: float | None) -> None:
    if std is None:
        lecun_normal_(weight, fan_in=weight.shape[1])
    else:
        nn.init.normal_(weight, std=std)


def _empty_state(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = VisionTransformer(config)
    return {name: torch.empty(t.shape, dtype=torch.float32) for name, t in model.state_dict().items()}


def _model(config: ModelConfig, state: Mapping[str, Tensor]) -> VisionTransformer:
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.load_state_dict(state, assign=True)
    return model.eval()
