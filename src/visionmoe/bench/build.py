"""Models with random weights, made fast and of balanced routing, and what they need of memory."""

import gc
from dataclasses import dataclass

import torch
from torch import nn

from visionmoe.allocation import give_back_freed_memory
from visionmoe.bench.measure import DTYPES, LeftOutError
from visionmoe.bench.run import available_bytes
from visionmoe.config import ModelConfig
from visionmoe.model.layers import Mlp
from visionmoe.model.router import Router
from visionmoe.model.vit import VisionTransformer, create_model
from visionmoe.variants import get_config, moe_layers

ADAM_BYTES = 16  # per parameter in training: itself, gradient, two moments, all float32


@dataclass(frozen=True)
class ModelSize:
    """name: "s32", "b16", ... as in the names of models. batch, train_batch: images of a call. seconds: for one
    comparison of forward passes. quick: a small model in its place, see `config_of`."""

    name: str
    batch: int
    train_batch: int
    seconds: float = 15.0
    quick: bool = False

    @property
    def text(self) -> str:
        return size_text(self.name, quick=self.quick)


def size_text(name: str, *, quick: bool = False) -> str:
    """ "b16" -> "B/16"; says that a model of `quick` is none of the paper's."""
    return f"{name[:-2].upper()}/{name[-2:]}{' (small)' if quick else ''}"


def config_of(size: str, variant: str, *, quick: bool = False) -> ModelConfig:
    """variant: "dense", or placement and experts as in "every2 e8". quick: two blocks, 64 pixels, D 64."""
    config = get_config(f"vit_{size}")
    if quick:
        config = config.replace(image_size=64, num_layers=2, hidden_size=64, mlp_dim=256, num_heads=2, num_classes=10)
    if variant == "dense":
        return config
    placement, _, experts = variant.partition(" e")
    return config.replace(num_experts=int(experts), layers=moe_layers(placement, config.num_layers))


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> VisionTransformer:
    """A model in evaluation mode whose tokens choose among the experts evenly.

    Weights are normal(0.02), biases 0; the experts of a layer start alike, so that billions of parameters are made in
    seconds. Routers of random models would prefer some experts: here the gates are 0 and the training noise chooses,
    until `settle_gates`.
    """
    with torch.device("meta"):
        model = create_model(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, generator)
    return balanced(model)


def _fill(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if name.endswith("router.gate.weight") or name.endswith("bias"):
        parameter.zero_()
    elif parameter.ndim == 1:  # scales of norms
        parameter.fill_(1.0)
    elif ".experts." in name:
        parameter[0].normal_(std=0.02, generator=generator)
        parameter[1:] = parameter[:1]
    else:
        parameter.normal_(std=0.02, generator=generator)


def balanced(model: VisionTransformer) -> VisionTransformer:
    """Evaluation mode but for the routers, whose noise chooses."""
    model.eval()
    for module in model.modules():
        if isinstance(module, Router):
            module.train()
    return model


@torch.no_grad()
def settle_gates(model: VisionTransformer, images: torch.Tensor) -> VisionTransformer:
    """Evaluation mode without any noise, as in service, with gates that still choose the experts evenly.

    Each gate gets random rows, at right angles to the mean token that it sees for `images` (B, C, H, W), and mixed so
    that its logits of these tokens are uncorrelated and of variance 1: the experts are alike.
    """
    generator = torch.Generator().manual_seed(1)

    def settle(router: Router, inputs: tuple[torch.Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2).float()
        mean = tokens.mean(dim=0)
        rows = torch.randn(router.gate.weight.shape, generator=generator).to(tokens)
        rows -= torch.outer(rows @ mean, mean) / mean.square().sum()
        logits = tokens @ rows.t()
        factor = torch.linalg.cholesky(logits.t() @ logits / len(logits))
        router.gate.weight.copy_(torch.linalg.solve_triangular(factor, rows, upper=False))

    hooks = [m.register_forward_pre_hook(settle) for m in model.modules() if isinstance(m, Router)]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return model


def widened(config: ModelConfig, flops: int, dense_flops: int) -> dict[int, int]:
    """Block -> width of its MLP, for a dense model of `flops` operations an image in the sparse model's places.

    dense_flops: of the same model with MLPs of the common width. An MLP of width F costs 4 T D F.
    """
    layers = config.moe.layers
    more = (flops - dense_flops) / (4 * config.num_tokens * config.hidden_size * len(layers))
    return {layer: config.mlp_dim + round(more) for layer in layers}


def widen(model: VisionTransformer, widths: dict[int, int]) -> VisionTransformer:
    """Gives blocks MLPs of other widths, of the dtype that the model has."""
    like = next(model.parameters())
    for layer, width in widths.items():
        mlp = Mlp(model.config.hidden_size, width, approximate=model.config.gelu_approximate)
        nn.init.normal_(mlp.fc1.weight, std=0.02)
        nn.init.normal_(mlp.fc2.weight, std=0.02)
        model.blocks[layer].mlp = mlp.to(like)
    return model.eval()


def num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(config).parameters())


def needed_bytes(config: ModelConfig, dtype: str, batch: int, *, training: bool) -> int:
    """Estimate. Inference: the parameters and as much again for packed copies. Training: parameters, gradients and
    Adam's moments in float32, and per token and block about 16 D + 3 K F activations that the backward pass needs."""
    parameters = num_parameters(config)
    if not training:
        return 2 * parameters * DTYPES[dtype].itemsize
    k = config.moe.num_selected_experts if config.moe.layers else 1
    width = 16 * config.hidden_size + 3 * k * config.mlp_dim
    return ADAM_BYTES * parameters + 4 * batch * config.num_tokens * config.num_layers * width


def check_memory(needed: int, device: torch.device) -> None:
    """LeftOutError where the estimate passes nine tenths of the memory that is free."""
    gc.collect()  # models of cases before
    give_back_freed_memory()
    free = available_bytes(device)
    if free is not None and needed > 0.9 * free:
        raise LeftOutError(f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")
