"""Accuracy against compute of trained weights: K, capacity and the order of the tokens chosen at run time.

This is the experiment of arXiv 2106.05974, section 4 and figure 6: the same weights, evaluated with fewer experts per
token and smaller buffers, with vanilla and with batch-priority routing, in all sparse layers or in some.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visionmoe.config import RoutingSetting
from visionmoe.model.flops import count_flops
from visionmoe.model.moe import MoE
from visionmoe.model.vit import VisionTransformer

Evaluate = Callable[[VisionTransformer], dict[str, Any]]
LayerSettings = dict[int, RoutingSetting]  # block number -> its setting


@dataclass(frozen=True)
class SweepPoint:
    """What a model does at one routing setting.

    flops: per image, a multiply-add counts as two. dropped: share of all routing requests of all layers that found no
    place, mean over the layers. images_per_second: of the model alone, without reading and decoding images.
    """

    num_selected_experts: int
    capacity_factor: float
    batch_priority: bool
    top1: float
    loss: float
    flops: int
    dropped: float
    images_per_second: float


@dataclass(frozen=True)
class DensePoint:
    """What a dense model does on the same images: the line that sparse settings are compared with."""

    top1: float
    loss: float
    flops: int
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
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[SweepPoint]:
    """Evaluates `model` at every setting and restores its own setting afterwards, also when an evaluation fails.

    evaluate: for example a `ClassificationEvaluator`. layers: the blocks that change while the others keep their own
    setting; None: all sparse ones. batch_size: for the operations, see `count_flops`.
    Raises ValueError as `check_sweep`, before the first evaluation.
    """
    check_sweep(model, settings, layers, batch_size)
    points = []
    with restored_routing(model):
        for setting in settings:
            set_routing(model, setting, layers)
            points.append(_point(setting, evaluate(model), count_flops(model, batch_size=batch_size)))
            if on_point is not None:
                on_point(points[-1])
    return points


def check_sweep(
    model: VisionTransformer,
    settings: Sequence[RoutingSetting] = (),
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> None:
    """ValueError for a model without layers that route, layers that it does not have, or settings that do not fit.

    batch_size: images of a call; settings do not fit either where their capacity rounds to no place in its groups.
    """
    moe = model.config.moe
    if not moe.layers or moe.router == "soft":
        raise ValueError("the model has no sparse layers whose routing can be changed")
    unknown = sorted(set(layers or ()) - set(moe.layers))
    if unknown:
        raise ValueError(f"layers must be among the sparse ones {list(model.moe_layers)}, got {unknown}")
    for setting in settings:
        moe.check_routing(setting)
    with restored_routing(model):
        for setting in settings:
            set_routing(model, setting, layers)
            count_flops(model, batch_size=batch_size)


def pareto_frontier(points: Sequence[SweepPoint]) -> list[bool]:
    """For each point whether none other is at least as accurate for as few operations and better in one of the two."""
    return [
        not any(q.top1 >= p.top1 and q.flops <= p.flops and (q.top1, -q.flops) != (p.top1, -p.flops) for q in points)
        for p in points
    ]


@contextlib.contextmanager
def restored_routing(model: VisionTransformer) -> Iterator[None]:
    """Whatever the body does with `model.set_routing`, every layer has its present setting again afterwards."""
    before = model.config
    try:
        yield
    finally:
        model.config = before
        for layer in model.moe_layers:
            sparse = model.moe_layer(layer)
            if isinstance(sparse, MoE):
                sparse.setting = before.moe.routing(layer)


def set_routing(model: VisionTransformer, setting: RoutingSetting, layers: Sequence[int] | None = None) -> None:
    """Applies `setting` to `layers` (None: to all sparse layers)."""
    model.set_routing(
        num_selected_experts=setting.num_selected_experts,
        capacity_factor=setting.capacity_factor,
        batch_priority=setting.batch_priority,
        layers=None if layers is None else list(layers),
    )


def layer_settings(model: VisionTransformer) -> LayerSettings:
    """The setting in force of every sparse layer, by block number."""
    return {layer: model.config.moe.routing(layer) for layer in model.moe_layers}


def most_selected_experts(model: VisionTransformer) -> int:
    """The largest K of all sparse layers; the common one may be in force in none of them."""
    return max(setting.num_selected_experts for setting in layer_settings(model).values())


def apply_routing(model: VisionTransformer, settings: Mapping[int, RoutingSetting]) -> None:
    """Applies to each block its own setting, as `layer_settings` gives them."""
    if set(settings) == set(model.moe_layers) and len(set(settings.values())) == 1:
        set_routing(model, next(iter(settings.values())))
        return
    for layer, setting in settings.items():
        set_routing(model, setting, [layer])


def _point(setting: RoutingSetting, result: Mapping[str, Any], flops: int) -> SweepPoint:
    dropped = list(result["dropped"].values())
    return SweepPoint(
        num_selected_experts=setting.num_selected_experts,
        capacity_factor=setting.capacity_factor,
        batch_priority=setting.batch_priority,
        top1=result["top1"],
        loss=result["loss"],
        flops=flops,
        dropped=sum(dropped) / len(dropped) if dropped else 0.0,
        images_per_second=result["model_images_per_second"],
    )
