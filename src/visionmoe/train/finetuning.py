"""What fine-tuning decides before its first step: the head, the rates of the blocks, and what stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from visionmoe.config import ModelConfig
from visionmoe.train.optim import ScheduledOptimizer

ROUTERS = r"\.router\."
"""Pattern of the routers' parameters, those of Soft MoE too."""


@dataclass(frozen=True)
class HeadDecision:
    """new: the head starts from zeros. reason: one line for the log."""

    new: bool
    reason: str


def decide_head(
    wanted_new: bool | None,
    stored: ModelConfig,
    final: ModelConfig,
    stored_names: Sequence[str] | None,
    class_names: Sequence[str],
) -> HeadDecision:
    """Whether a fine-tuned model starts with a new head.

    wanted_new: True or False as asked for; None keeps the head where it is one for the images' classes: equally many,
    of the same width, and with the same names in the same order, where the checkpoint knows names.
    Raises ValueError when a head must be kept that cannot be.
    """
    if wanted_new:
        return HeadDecision(True, "the head is new, as asked for")
    count = len(class_names)
    differs = ""
    if stored.num_classes != count:
        differs = f"the checkpoint has {stored.num_classes or 'no'} classes, the images have {count}"
    elif stored.representation_size != final.representation_size:
        differs = f"representation_size was {stored.representation_size} and is {final.representation_size}"
    if differs and wanted_new is False:
        raise ValueError(f"the head cannot be kept: {differs}")
    if differs:
        return HeadDecision(True, f"the head is new: {differs}")
    if stored_names is not None and tuple(stored_names) != tuple(class_names) and wanted_new is None:
        old, new = next(pair for pair in zip(stored_names, class_names, strict=True) if pair[0] != pair[1])
        return HeadDecision(True, f"the head is new: the checkpoint's classes have other names ({old!r}, not {new!r})")
    if wanted_new is False:
        return HeadDecision(False, "the head is kept, as asked for")
    names = "by name" if stored_names is not None else "by number; the checkpoint does not say their names"
    return HeadDecision(False, f"the head is kept: the checkpoint has the same {count} classes ({names})")


def layer_decay_factors(decay: float, num_layers: int) -> tuple[tuple[str, float], ...]:
    """[pattern, factor] pairs for `create_optimizer`: layer-wise decay of the rate (BEiT, arXiv 2106.08254).

    The factor is decay^(L + 1 - depth), L blocks: depth 0 for patch embedding, class token and positions, i + 1 for
    block i (its experts and its router like the rest of it), L + 1, factor 1, for all that comes after the blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must be > 0 and <= 1, got {decay}")
    blocks = tuple((rf"^blocks\.{i}\.", decay ** (num_layers - i)) for i in range(num_layers))
    return ((r"^(patch_embed\.|cls_token$|pos_embed$)", decay ** (num_layers + 1)), *blocks)


def freeze(optimizer: ScheduledOptimizer) -> None:
    """No gradients for the parameters that the optimizer does not update. ValueError where it updates none."""
    if all(group["frozen"] for group in optimizer.param_groups):
        raise ValueError("frozen_pattern or trainable_pattern leaves no parameter to train")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(not group["frozen"])
