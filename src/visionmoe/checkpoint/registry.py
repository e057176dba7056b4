"""The published V-MoE and E3 checkpoints by name.

Names and what they were trained on: the README of google-research/vmoe. Options: its files under vmoe/configs. Where
no file is public (the pretrained E3 model and "medium"), `load` takes representation_size from the checkpoint.
"""

import difflib
import math
from dataclasses import dataclass

from visionmoe.config import ModelConfig, MoEConfig

BASE_URL = "https://storage.googleapis.com/vmoe_checkpoints"


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One checkpoint of the public bucket.

    config: the reference's options, but with group_size "batch", so that a batch of any size can be classified (the
    reference routes groups of 8 images). listed: whether the reference's README names it; a recipe alone does not
    prove that weights were published.
    """

    name: str
    config: ModelConfig
    description: str
    listed: bool = True


def _s32(image_size: int, num_classes: int, capacity_factor: float, representation_size: int | None) -> ModelConfig:
    return ModelConfig(
        image_size=image_size,
        patch_size=32,
        num_classes=num_classes,
        hidden_size=512,
        num_layers=8,
        mlp_dim=2048,
        num_heads=8,
        representation_size=representation_size,
        head_bias_init=-math.log(num_classes),
        moe=MoEConfig(num_experts=8, layers=(5, 7), num_selected_experts=2, capacity_factor=capacity_factor),
    )


def _b16(image_size: int, num_classes: int, capacity_factor: float, head_bias_init: float) -> ModelConfig:
    return ModelConfig(
        image_size=image_size,
        patch_size=16,
        num_classes=num_classes,
        head_bias_init=head_bias_init,
        moe=MoEConfig(
            num_experts=8, layers=(1, 3, 5, 7, 9, 11), num_selected_experts=2, capacity_factor=capacity_factor
        ),
    )


def _e3(image_size: int, num_classes: int) -> ModelConfig:
    config = _s32(image_size, num_classes, capacity_factor=1.5, representation_size=512)
    return config.replace(num_selected_experts=1, ensemble_size=2, head_bias_init=-10.0)


_S32 = "V-MoE-S/32, 8 experts in blocks 5 and 7"
_B16 = "V-MoE-B/16, 8 experts in every second block"
_E3 = "E3-S/32, 2 members of 4 experts in blocks 5 and 7"
PUBLISHED = {
    checkpoint.name: checkpoint
    for checkpoint in (
        PublishedCheckpoint(
            "vmoe_s32_last2_ilsvrc2012_randaug_light1",
            # From scratch it was trained at capacity 1.05 and evaluated at 4.0.
            _s32(224, 1000, capacity_factor=4.0, representation_size=512),
            f"{_S32}, ImageNet-1k, 300 epochs, 224 px: 73.1 % top-1",
        ),
        PublishedCheckpoint(
            "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012",
            _s32(384, 1000, capacity_factor=1.5, representation_size=None),
            f"{_S32}, fine-tuned on ImageNet-1k at 384 px: 75.9 % top-1",
        ),
        PublishedCheckpoint(
            "vmoe_s32_last2_ilsvrc2012_randaug_medium",
            _s32(224, 1000, capacity_factor=4.0, representation_size=512),
            f"{_S32}, ImageNet-1k, 1000 epochs, 224 px",
        ),
        PublishedCheckpoint(
            "vmoe_b16_imagenet21k_randaug_strong",
            _b16(224, 21_843, capacity_factor=1.05, head_bias_init=-10.0),
            f"{_B16}, ImageNet-21k, 224 px",
        ),
        PublishedCheckpoint(
            "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012",
            _b16(384, 1000, capacity_factor=1.5, head_bias_init=-math.log(1000)),
            f"{_B16}, fine-tuned on ImageNet-1k at 384 px: 85.6 % top-1",
        ),
        PublishedCheckpoint(
            "vmoe_b16_imagenet21k_randaug_strong_ft_cifar10",
            _b16(128, 10, capacity_factor=1.5, head_bias_init=-math.log(10)),
            f"{_B16}, fine-tuned on CIFAR-10 at 128 px: 98.7 % top-1",
            listed=False,
        ),
        PublishedCheckpoint("eee_s32_last2_ilsvrc2012", _e3(224, 1000), f"{_E3}, ImageNet-1k, 300 epochs, 224 px"),
        PublishedCheckpoint(
            "eee_s32_last2_ilsvrc2012_ft_cifar100",
            _e3(128, 100),
            f"{_E3}, fine-tuned on CIFAR-100 at 128 px: 81.3 % top-1",
        ),
    )
}


def published(name: str) -> PublishedCheckpoint:
    """The checkpoint of this name; ValueError with the nearest names."""
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PUBLISHED)}"
        raise ValueError(f"no published checkpoint {name!r}; {hint}")
    return PUBLISHED[name]
