"""Accuracy against compute of trained weights: K, capacity and the order of the tokens chosen at run time.

This is the experiment of arXiv 2106.05974, section 4 and figure 6: the same weights, evaluated with fewer experts per
token and smaller buffers, with vanilla and with batch-priority routing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from visionmoe.config import RoutingSetting
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer

Evaluate = Callable[[VisionTransformer], dict[str, Any]]


@dataclass(frozen=True)
class SweepPoint:
    """What a model does at one routing setting.

    flops: per image, a multiply-add counts as two. dropped: share of all routing requests of all layers that found no
    place, mean over the layers.
    """

    num_selected_experts: int
    capacity_factor: float
    batch_priority: bool
    top1: float
    loss: float
    flops: int
    dropped: float
    images_per_second: float


def routing_grid(
    num_selected_experts: Sequence[int],
    capacity_factors: Sequence[float],
    batch_priority: Sequence[bool] = (False, True),
) -> tuple[RoutingSetting, ...]:
    """All combinations, in the order of the arguments."""
    return tuple(
        RoutingSetting(k, capacity, priority)
        for k in num_selected_experts
        for priority in batch_priority
        for capacity in capacity_factors
    )


def sweep(
    model: VisionTransformer,
    evaluate: Evaluate,
    settings: Sequence[RoutingSetting],
    on_point: Callable[[SweepPoint], None] | None = None,
) -> list[SweepPoint]:
    """Evaluates `model` at every setting and restores its own setting afterwards, also when an evaluation fails.

    evaluate: for example a `ClassificationEvaluator`.
    Raises ValueError for a model without sparse layers or a setting that its experts do not allow, before the first
    evaluation.
    """
    config = model.config
    if not config.moe.layers or config.moe.router == "soft":
        raise ValueError("the model has no sparse layers whose routing can be changed")
    for setting in settings:
        config.moe.check_routing(setting)
    points = []
    with restored_routing(model):
        for setting in settings:
            points.append(_point(model, evaluate, setting))
            if on_point is not None:
                on_point(points[-1])
    return points


@contextlib.contextmanager
def restored_routing(model: VisionTransformer) -> Iterator[None]:
    """Whatever the body does with `model.set_routing`, every layer has its present setting again afterwards."""
    before = model.config.moe
    try:
        yield
    finally:
        set_routing(model, before.routing())
        for layer, setting in before.layer_routing.items():
            set_routing(model, setting, layers=(layer,))


def set_routing(model: VisionTransformer, setting: RoutingSetting, layers: tuple[int, ...] | None = None) -> None:
    """Applies `setting` to `layers` (None: to all sparse layers)."""
    model.set_routing(
        num_selected_experts=setting.num_selected_experts,
        capacity_factor=setting.capacity_factor,
        batch_priority=setting.batch_priority,
        layers=layers,
    )


def _point(model: VisionTransformer, evaluate: Evaluate, setting: RoutingSetting) -> SweepPoint:
    set_routing(model, setting)
    result = evaluate(model)
    dropped = list(result["dropped"].values())
    return SweepPoint(
        num_selected_experts=setting.num_selected_experts,
        capacity_factor=setting.capacity_factor,
        batch_priority=setting.batch_priority,
        top1=result["top1"],
        loss=result["loss"],
        flops=count_flops(model),
        dropped=sum(dropped) / len(dropped) if dropped else 0.0,
        images_per_second=result["images_per_second"],
    )
