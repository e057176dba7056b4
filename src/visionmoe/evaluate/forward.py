"""What every evaluation does around a forward pass: its mode and precision, and images made ready for the model."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]
"""images (B,C,H,W) in [-1, 1], labels (B,) int64, indices (B,) of the images in their source."""


class Loader(Protocol):
    """What evaluation needs of a loader; visionmoe.data.EvalLoader and a list of batches are such."""

    def __iter__(self) -> Iterator[Batch]: ...


def padded_batch(num_images: int, tokens_per_image: int, group_size: int) -> int:
    """The smallest number of images >= num_images whose tokens divide into groups of `group_size` tokens."""
    step = group_size // math.gcd(group_size, tokens_per_image)
    return -(-num_images // step) * step


def prepare(model: nn.Module, images: Tensor) -> Tensor:
    """Moves images to the model's device and dtype, and fills the last routing group with black images.

    Only models whose groups have a fixed number of tokens need the filling; its logits are to be cut off.
    """
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype, non_blocking=True)
    config: Any = getattr(model, "config", None)
    if config is None or not config.moe.layers or not isinstance(config.moe.group_size, int):
        return images
    height, width = images.shape[-2] // config.patch_hw[0], images.shape[-1] // config.patch_hw[1]
    tokens = (height * width + (config.pooling == "token")) * config.ensemble_size
    missing = padded_batch(len(images), tokens, config.moe.group_size) - len(images)
    return torch.cat([images, images.new_full((missing, *images.shape[1:]), -1.0)]) if missing else images


def autocast_context(model: nn.Module, enabled: bool) -> torch.autocast:
    """bfloat16 autocast on the model's device."""
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every model is in the mode in which it was."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
