"""The Vision Transformer and its sparse form, V-MoE (arXiv 2010.11929, 2106.05974), with timm's names."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.config import ModelConfig
from visionmoe.model.hub import HubModel
from visionmoe.model.layers import Attention, AttentionPool, Block, Mlp
from visionmoe.model.moe import MoE, SoftMoE
from visionmoe.model.position import PatchEmbed, sincos2d
from visionmoe.model.pretrained import Preprocessing
from visionmoe.model.router import lecun_normal_


@dataclass(frozen=True)
class ModelOutput:
    """logits (B*M, classes), or features when the model has no head; auxiliary_loss (), to be added to the main loss;
    metrics by "blocks.i.name", detached: importance_loss, gshard_loss, load_loss (G,) or (G, M), expert_load (E,),
    dropped (), entropy ()."""

    logits: Tensor
    auxiliary_loss: Tensor
    metrics: dict[str, Tensor]
    ensemble_size: int = 1

    def predictions(self) -> Tensor:
        """Class probabilities (B, classes): softmax, averaged over the members of an ensemble (arXiv 2110.03360)."""
        probs = torch.softmax(self.logits.float(), dim=-1)
        return probs.view(-1, self.ensemble_size, probs.shape[-1]).mean(dim=1)


class VisionTransformer(nn.Module, HubModel):
    """ViT or V-MoE as `config` says. Images (B, C, H, W), float in [-1, 1].

    class_names: of the head's outputs, None where they are not known. preprocessing: of images in evaluation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.class_names: tuple[str, ...] | None = None
        self.preprocessing = Preprocessing.of(config)
        dim = config.hidden_size
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_hw, dim)
        if config.pooling == "token":
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, dim))
        self.dropout = nn.Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        if config.pooling == "map":
            self.attn_pool = AttentionPool(config)
        width = config.representation_size or dim
        self.pre_logits = nn.Linear(dim, width) if config.representation_size else nn.Identity()
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        self.reset_parameters()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks with a sparse layer, counted from 0."""
        return tuple(sorted(self.config.moe.layers))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's; marks attention parameters with `num_heads`, which Adafactor needs and their shapes hide."""
        for name, param in super().named_parameters(*args, **kwargs):
            if ".attn." in name or "attn_pool." in name:
                param.num_heads = self.config.num_heads  # type: ignore[attr-defined]
            yield name, param

    def moe_layer(self, layer: int) -> MoE | SoftMoE:
        """The sparse layer of block number `layer`."""
        sparse = self.blocks[layer].mlp
        assert isinstance(sparse, MoE | SoftMoE)
        return sparse

    @torch.no_grad()
    def reset_parameters(
        self, around: Callable[..., AbstractContextManager] = lambda *args: contextlib.nullcontext()
    ) -> None:
        """Initialises all parameters as the reference does: Xavier-uniform encoder, zero head.

        around: context of one module's turn, called with the module and, where only its own parameters are set and not
        those of its children, False (`visionmoe.model.skeleton.whole`).
        """
        for module in self.modules():
            if isinstance(module, PatchEmbed | Attention | Mlp | AttentionPool | MoE | SoftMoE | nn.LayerNorm):
                with around(module):
                    module.reset_parameters()
        with around(self, False):
            if self.config.pooling == "token":
                nn.init.zeros_(self.cls_token)
            if self.config.pos_embed == "learned":
                nn.init.normal_(self.pos_embed, std=0.02)
        if isinstance(self.pre_logits, nn.Linear):
            with around(self.pre_logits):
                lecun_normal_(self.pre_logits.weight, fan_in=self.pre_logits.in_features)
                nn.init.zeros_(self.pre_logits.bias)
        if isinstance(self.head, nn.Linear):
            with around(self.head):
                nn.init.zeros_(self.head.weight)
                nn.init.constant_(self.head.bias, self.config.head_bias_init)

    def forward(self, images: Tensor) -> ModelOutput:
        tokens, auxiliary_loss, metrics = self._encode(images)
        return ModelOutput(self.forward_head(tokens), auxiliary_loss, metrics, self.config.ensemble_size)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm. (B, C, H, W) -> (B*M, T, D)."""
        return self._encode(images)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and head. (B, T, D) -> (B, classes), or the features before the head with `pre_logits`."""
        if self.config.pooling == "token":
            x = x[:, 0]
        elif self.config.pooling == "gap":
            x = x.mean(dim=1)
        else:
            x = self.attn_pool(x)
        if self.config.representation_size:
            x = torch.tanh(self.pre_logits(x))
        return x if pre_logits else self.head(x)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = self.dropout(self._embed(images))
        auxiliary_loss = torch.zeros((), device=x.device)
        metrics: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            if i == min(self.config.moe.layers, default=None) and self.config.ensemble_size > 1:
                x = x.repeat_interleave(self.config.ensemble_size, dim=0)
            x, loss, layer_metrics = self._run_block(block, x)
            if loss is not None:
                auxiliary_loss = auxiliary_loss + loss
            metrics |= {f"blocks.{i}.{name}": value for name, value in layer_metrics.items()}
        return self.norm(x), auxiliary_loss, metrics

    def _run_block(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        return block(x)

    def _embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D), class token first, positions added."""
        x, grid = self.patch_embed(images)
        config = self.config
        if config.pos_embed == "sincos2d":
            x = x + sincos2d(grid, config.hidden_size, x.device).to(x.dtype)
        if config.pooling == "token":
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if config.pos_embed == "learned":
            if x.shape[1] != self.pos_embed.shape[1]:
                raise ValueError(
                    f"images must be {config.image_hw[0]} x {config.image_hw[1]} pixels for this model's learned "
                    f"positions, got {images.shape[-2]} x {images.shape[-1]}; load it with image_size=... instead"
                )
            x = x + self.pos_embed
        return x

    def set_routing(
        self,
        num_selected_experts: int | None = None,
        capacity_factor: float | None = None,
        batch_priority: bool | None = None,
        layers: list[int] | tuple[int, ...] | None = None,
    ) -> None:
        """Changes how tokens are routed, on trained weights, at any time; None leaves a value as it is.

        layers: numbers of blocks with a sparse layer, None: all of them. The change is part of `config` and saved
        with the model. ValueError for a dense or Soft MoE model or a value that does not fit.
        """
        given: dict[str, Any] = {"num_selected_experts": num_selected_experts, "capacity_factor": capacity_factor,
                 "batch_priority": batch_priority}  # fmt: skip
        given = {k: v for k, v in given.items() if v is not None}
        moe = self.config.moe
        if not moe.layers or moe.router == "soft":
            raise ValueError(f"set_routing needs a model with sparse layers, got {self.config.moe.router!r} routing "
                             f"in layers {self.moe_layers}")  # fmt: skip
        wrong = set(layers or ()) - set(moe.layers)
        if wrong:
            raise ValueError(f"layers must be among {self.moe_layers}, got {sorted(wrong)}")
        chosen = self.moe_layers if layers is None else layers
        per_layer = dict(moe.layer_routing)
        for layer in chosen:
            if layers is not None or layer in per_layer:
                per_layer[layer] = dataclasses.replace(moe.routing(layer), **given)
        common = given if layers is None else {}
        moe = dataclasses.replace(moe, **common, layer_routing=per_layer)
        self.config = dataclasses.replace(self.config, moe=moe)
        for layer in self.moe_layers:
            sparse = self.moe_layer(layer)
            assert isinstance(sparse, MoE)
            sparse.setting = moe.routing(layer)


def create_model(config: ModelConfig | str, **overrides: Any) -> VisionTransformer:
    """Builds a model from a config or a name such as "vmoe_b16_e8_every2" (`visionmoe.list_models`).

    overrides: any option of `ModelConfig` or `MoEConfig`, e.g. num_classes, image_size, capacity_factor.
    Weights are random; `visionmoe.load` reads trained ones.
    """
    from visionmoe.variants import get_config

    config = get_config(config) if isinstance(config, str) else config
    return VisionTransformer(config.replace(**overrides))
