"""The named models in timm's registry: `import visionmoe.timm`, then `timm.create_model("vmoe_s32_e8_last2")`.

The models behave as timm's: `model(images)` is the logits. The sparse layers' losses, which training adds to its own,
are in `model.last_output.auxiliary_loss` after every forward pass. Published checkpoints are tags, as timm has them:
`timm.create_model("vmoe_b16_e8_every2.imagenet21k_randaug_strong_ft_ilsvrc2012", pretrained=True)`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionmoe.checkpoint.load import load
from visionmoe.checkpoint.registry import BASE_URL, PUBLISHED
from visionmoe.config import ModelConfig
from visionmoe.model.vit import ModelOutput, VisionTransformer
from visionmoe.variants import get_config, list_models

_POOLING = {"token": "token", "avg": "gap", "map": "map"}  # timm's word -> ours
# Named model -> (tag, published checkpoint); the first tag is what pretrained=True takes.
_TAGS = {
    "vmoe_s32_e8_last2": "vmoe_s32_last2_",
    "vmoe_b16_e8_every2": "vmoe_b16_",
    "eee_s32_e8_m2_last2": "eee_s32_last2_",
}


class TimmVisionTransformer(VisionTransformer):
    """A VisionTransformer with the methods and attributes that timm's users expect of a model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.grad_checkpointing = False
        self._last_output: ModelOutput | None = None

    @property
    def num_classes(self) -> int:
        return self.config.num_classes or 0

    @property
    def num_features(self) -> int:
        """Width of `forward_features`."""
        return self.config.hidden_size

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """Width before the classifier."""
        return self.config.representation_size or self.config.hidden_size

    @property
    def global_pool(self) -> str:
        return next(theirs for theirs, ours in _POOLING.items() if ours == self.config.pooling)

    @property
    def last_output(self) -> ModelOutput:
        """All that the last forward pass gave: auxiliary_loss, metrics, logits. RuntimeError before the first."""
        if self._last_output is None:
            raise RuntimeError("last_output is there after a forward pass")
        return self._last_output

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> logits (B, classes); of an ensemble, the logarithms of the members' mean probabilities."""
        output = super().forward(images)
        self._last_output = output
        members = output.ensemble_size
        if members == 1 or not self.num_classes:
            return output.logits
        log_probs = torch.log_softmax(output.logits.float(), dim=-1).view(-1, members, self.num_classes)
        return torch.logsumexp(log_probs, dim=1) - torch.tensor(float(members)).log()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head (zeros, as for a new model) with so many classes, 0: none. The pooling cannot change."""
        if global_pool not in (None, self.global_pool):
            raise ValueError(
                f"global_pool of this model is {self.global_pool!r} and cannot change, got {global_pool!r}"
            )
        self.config, self.class_names = self.config.replace(num_classes=num_classes or None), None
        old = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=old.device, dtype=old.dtype)
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, self.config.head_bias_init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "attn_pool.latent"} & {name for name, _ in self.named_parameters()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks compute their activations again in the backward pass."""
        self.grad_checkpointing = enable

    def _run_block(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the last output, whose tensors belong to a graph."""
        return {**self.__dict__, "_last_output": None}


def _create(
    name: str,
    *,
    pretrained: bool,
    pretrained_cfg: Any,
    pretrained_cfg_overlay: Any,
    cache_dir: Any,
    **options: Any,
) -> TimmVisionTransformer:
    """options: num_classes (0: no head), img_size, in_chans, global_pool, and those of ModelConfig and MoEConfig."""
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)
    ours = _our_options(name, options)
    if pretrained:
        model = _pretrained(name, cfg, cache_dir, ours)
    else:
        model = TimmVisionTransformer(get_config(name).replace(**ours))
    channels, (height, width) = model.config.in_channels, model.config.image_hw
    stated = cfg.to_dict()
    mean, std = ((float(stated[key][0]),) * channels for key in ("mean", "std"))
    stated |= {"input_size": (channels, height, width), "num_classes": model.num_classes, "mean": mean, "std": std}
    model.pretrained_cfg = model.default_cfg = stated
    return model


def _our_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """timm's words to ours; what is not known is a ValueError of `ModelConfig.replace`."""
    for rate in ("drop_rate", "drop_path_rate"):  # timm's training script always gives drop_rate
        if options.pop(rate, 0) not in (0, None):
            raise ValueError(f"{rate} must be 0: {name} has dropout_rate, attention_dropout_rate, expert_dropout_rate")
    ours = dict(options)
    for theirs, own in (("img_size", "image_size"), ("in_chans", "in_channels")):
        if theirs in ours:
            ours[own] = ours.pop(theirs)
    if isinstance(ours.get("image_size"), list):
        ours["image_size"] = tuple(ours["image_size"])
    if "num_classes" in ours:
        ours["num_classes"] = ours["num_classes"] or None
    if "global_pool" in ours:
        pool = ours.pop("global_pool")
        if pool not in _POOLING:
            raise ValueError(f"global_pool must be one of {', '.join(_POOLING)}, got {pool!r}")
        ours["pooling"] = _POOLING[pool]
    return ours


def _pretrained(name: str, cfg: Any, cache_dir: Any, options: dict[str, Any]) -> TimmVisionTransformer:
    """The published checkpoint that the tag names; a changed number of classes gives a new head."""
    if not cfg.url:
        raise ValueError(f"no checkpoint of {name} is published; pretrained=True is for {', '.join(_TAGS)}")
    loaded = load(cfg.url.rpartition("/")[2], cache_dir=cache_dir, **options)
    with torch.device("meta"):
        model = TimmVisionTransformer(loaded.config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model


def _published_cfgs() -> dict[str, Any]:
    """A pretrained_cfg for every named model, and one for every tag of a published checkpoint."""
    cfgs: dict[str, Any] = {}
    for name in list_models():
        prefix = _TAGS.get(name)
        tags = [p for p in PUBLISHED.values() if prefix and p.name.startswith(prefix) and p.listed]
        if not tags:
            cfgs[name] = _cfg(get_config(name))
        for published in tags:
            key = f"{name}.{published.name.removeprefix(prefix or '')}"
            cfgs[key] = {**_cfg(published.config), "url": f"{BASE_URL}/{published.name}"}
    return cfgs


def _cfg(config: ModelConfig) -> dict[str, Any]:
    half = (0.5,) * config.in_channels
    return {
        "input_size": (config.in_channels, *config.image_hw),
        "fixed_input_size": True,
        "mean": half,
        "std": half,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": config.num_classes or 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2106.05974",
    }


def _entrypoint(name: str) -> Callable[..., TimmVisionTransformer]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> TimmVisionTransformer:
        return _create(
            name,
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **options,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The named model {name}; options as `visionmoe.create_model` takes them, or in timm's words."
    return create


default_cfgs = generate_default_cfgs(_published_cfgs())
__all__ = ["TimmVisionTransformer"]
for _name in list_models():
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name)))
