"""The best routing of every layer for a budget of operations.

The same weights can spend the same operations in many ways: one K and capacity for all sparse layers, or more in the
layers that need it and less in the others. The method, all of it on calibration images, batch-priority order on:

1. The budget is turned into a sum of levels (experts per token paid for, `allocation`). Uniform settings, one (K, C)
   in all layers that spends it, are evaluated for every K; the one of the lowest loss is the base.
2. Sensitivity: for every layer, every K and some levels, the loss with only that layer moved away from the base.
3. If losses added up over layers, the best levels would be those that a dynamic program finds on these curves
   (a multiple-choice knapsack). They are evaluated, and also the middle between them and the base, because losses add
   up only nearly.
4. Local search with real evaluations: levels move from one layer to another, the most promising moves first, in ever
   smaller amounts, and are kept when the loss falls. The number of evaluations is bounded.
5. On other calibration images, the check fold, the result must have a lower loss than the best uniform setting, by
   more than two standard errors of the difference per image, and be at least as accurate; otherwise the uniform setting
   is kept. So what is luck on the calibration images does not pass.

The loss is the one at the best temperature (`calibrated`): it follows the accuracy, and also moves when no image
changes sides.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from visionmoe.evaluate.adaptive import (
    Evaluate,
    LayerSettings,
    apply_routing,
    check_sweep,
    layer_settings,
    restored_routing,
)
from visionmoe.evaluate.allocation import (
    FRACTIONS,
    LayerCurve,
    allocate,
    choices_of_k,
    damped,
    level_of,
    levels_of,
    setting_at,
    swaps,
)
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer

AMOUNTS = (0.2, 0.1, 0.05)  # what the local search moves, as shares of the layers' mean level


@dataclass(frozen=True)
class Candidate:
    """A setting that was evaluated on the calibration images. stage: what it was tried for."""

    routing: LayerSettings
    flops: int
    calibrated_loss: float
    top1: float
    stage: str


@dataclass(frozen=True)
class Tuned:
    """The result. chosen is `best` or, where that failed the check, `uniform`.

    uniform: the best setting with one (K, C) for all layers; best: the best of all. check: calibrated_loss and top1 of
    both on the check fold, by their names. reason: one line. tried: all candidates in order. curves: of step 2, for
    another budget near this one.
    """

    chosen: Candidate
    kept: Literal["tuned", "uniform"]
    reason: str
    uniform: Candidate
    best: Candidate
    check: dict[str, dict[str, float]]
    tried: list[Candidate]
    curves: dict[int, LayerCurve] = field(repr=False)


def check_tunable(model: VisionTransformer) -> None:
    """ValueError for a model without layers whose (K, capacity) can be chosen."""
    check_sweep(model)
    if model.config.moe.router != "top_k":
        raise ValueError(f"tuning needs a model with top-K routing, its router is {model.config.moe.router!r}")


def check_budget(model: VisionTransformer, budget: int, batch_size: int | None = None) -> None:
    """ValueError, with the range, for operations per image that tuning cannot reach."""
    most = count_flops(model, batch_size=batch_size)
    least = flops_at(model, lowest_routing(model, batch_size), batch_size)
    if not least <= budget <= most:
        raise ValueError(
            f"the budget must be between {least / most:.3f} (the lowest setting) and 1 (the present one) of "
            f"{most / 1e6:.2f} MFLOP per image, got {budget / most:.3f}"
        )


def flops_at(model: VisionTransformer, routing: LayerSettings, batch_size: int | None = None) -> int:
    """Operations per image with these settings; the model keeps its own."""
    with restored_routing(model):
        apply_routing(model, routing)
        return count_flops(model, batch_size=batch_size)


def has_places(model: VisionTransformer, routing: LayerSettings, batch_size: int | None = None) -> bool:
    """Whether the capacity of every layer is at least one place; in small groups it can round to none."""
    try:
        return flops_at(model, routing, batch_size) > 0
    except ValueError:
        return False


def lowest_routing(model: VisionTransformer, batch_size: int | None = None) -> LayerSettings:
    """The cheapest setting that is tried: K = 1 and LOWEST of the present level in every layer.

    Where that rounds to no place, the least of FRACTIONS that has places.
    """
    own = layer_settings(model)
    for fraction in FRACTIONS:
        routing = {layer: setting_at(1, fraction * level_of(setting), setting) for layer, setting in own.items()}
        if has_places(model, routing, batch_size):
            return routing
    return own


def uniform_routing(model: VisionTransformer, k: int, level: float) -> LayerSettings:
    """One K and one level in every sparse layer."""
    return {layer: setting_at(k, level, own) for layer, own in layer_settings(model).items()}


def most_evaluations(model: VisionTransformer) -> int:
    """Upper bound of the evaluations on the calibration images, steps 1 to 4."""
    own = layer_settings(model)
    ks = choices_of_k(max(setting.num_selected_experts for setting in own.values()))
    points = sum(len(levels_of(s, k)) for s in own.values() for k in choices_of_k(s.num_selected_experts))
    return len(ks) + points + 2 + _search_evaluations(len(own))


def tune(
    model: VisionTransformer,
    budget: int,
    calibrate: Evaluate,
    check: Evaluate,
    *,
    batch_size: int | None = None,
    curves: dict[int, LayerCurve] | None = None,
) -> Tuned:
    """Finds the best setting of at most `budget` operations per image; see the module's text. Routing is restored.

    calibrate, check: `CalibratedEvaluator`s of two sets of images; check, which keeps the images' losses, sees the two
    finalists only. batch_size: images of a call, see `count_flops`. curves: of an earlier result for a budget nearby.
    ValueError when the model cannot be tuned or the budget cannot be reached (the message gives the range).
    """
    check_tunable(model)
    own = layer_settings(model)
    check_budget(model, budget, batch_size)
    search = Search(model, calibrate, own, budget, batch_size)
    with restored_routing(model):
        uniform = search.uniform()
        if len(own) > 1:  # else the uniform settings are all that there are
            curves = curves or search.sensitivity(uniform)
            search.plan(curves, uniform)
        best = min((c for c in search.tried if c.flops <= budget), key=lambda c: c.calibrated_loss)
        finalists = {"uniform": uniform, "tuned": best}
        checked = {name: _checked(model, check, candidate) for name, candidate in finalists.items()}
    kept, reason = _verdict(best is uniform, checked["tuned"], checked["uniform"])
    check_fold = {name: {key: r[key] for key in ("calibrated_loss", "top1")} for name, r in checked.items()}
    return Tuned(finalists[kept], kept, reason, uniform, best, check_fold, tried=search.tried, curves=curves or {})


class Search:
    """Evaluations of settings on the calibration images, each setting once."""

    def __init__(
        self, model: VisionTransformer, evaluate: Evaluate, own: LayerSettings, budget: int, batch_size: int | None
    ) -> None:
        self.model, self.evaluate, self.own = model, evaluate, own
        self.budget, self.batch_size = budget, batch_size
        self.tried: list[Candidate] = []
        self.total = 0.0  # the sum of levels that the budget pays for

    def try_out(self, routing: LayerSettings, stage: str) -> Candidate:
        """Evaluates, unless it has been."""
        for candidate in self.tried:
            if candidate.routing == routing:
                return candidate
        apply_routing(self.model, routing)
        result = self.evaluate(self.model)
        flops = count_flops(self.model, batch_size=self.batch_size)
        loss = result["calibrated_loss"]
        loss = loss if math.isfinite(loss) else math.inf  # worse than all others
        self.tried.append(Candidate(dict(routing), flops, loss, result["top1"], stage))
        return self.tried[-1]

    def uniform(self) -> Candidate:
        """Step 1: the best uniform setting of the budget."""
        largest = max(setting.num_selected_experts for setting in self.own.values())
        candidates = []
        for k in choices_of_k(largest):
            level = self._fitted(functools.partial(uniform_routing, self.model, k), 0.0, float(largest))
            self.total = level * len(self.own)  # in the end of the largest K, which can spend the most
            routing = uniform_routing(self.model, k, min(level, k))  # a K may fit with places for all its requests
            if 0 < self._cost(routing) <= self.budget:
                candidates.append(self.try_out(routing, "uniform"))
        if not candidates:
            raise ValueError(
                f"no setting with one K and capacity for all layers is within {self.budget / 1e6:.2f} MFLOP per image: "
                "the groups have too few tokens for so few places"
            )
        best = min(candidates, key=lambda c: c.calibrated_loss)
        if not math.isfinite(best.calibrated_loss):
            raise ValueError("the loss on the calibration images is not finite at any setting for all layers")
        return best

    def sensitivity(self, base: Candidate) -> dict[int, LayerCurve]:
        """Step 2: curves of the loss by one layer's level, the others at the base."""
        curves = {}
        for layer, own in self.own.items():
            by_k = {}
            for k in choices_of_k(own.num_selected_experts):
                points = []
                for level in levels_of(own, k):
                    routing = {**base.routing, layer: setting_at(k, level, own)}
                    if self._cost(routing) > 0:
                        points.append((level, self.try_out(routing, "sensitivity").calibrated_loss))
                points = [point for point in points if math.isfinite(point[1])]
                if points:
                    by_k[k] = tuple(points)
            if not by_k:
                raise ValueError(f"no setting of block {layer} has a finite loss on the calibration images")
            curves[layer] = LayerCurve(by_k)
        return curves

    def plan(self, curves: Mapping[int, LayerCurve], base: Candidate) -> None:
        """Steps 3 and 4."""
        start = [min(level_of(base.routing[layer]), curve.highest) for layer, curve in curves.items()]
        total = max(sum(start), self.total) * (1 - 1e-5)
        planned = allocate(curves, max(total, sum(curve.lowest for curve in curves.values())))
        middle = damped(planned, start, 0.5)
        best, levels = base, dict(zip(curves, start, strict=True))
        for proposal in (planned, middle):
            routing = self._at(curves, proposal)
            if not 0 < self._cost(routing) <= self.budget:
                continue
            candidate = self.try_out(routing, "plan")
            if candidate.calibrated_loss < best.calibrated_loss:
                best, levels = candidate, proposal
        self._improve(curves, best, levels)

    def _improve(self, curves: Mapping[int, LayerCurve], best: Candidate, levels: dict[int, float]) -> None:
        """Step 4."""
        last = len(self.tried) + _search_evaluations(len(levels))
        for amount in (share * sum(levels.values()) / len(levels) for share in AMOUNTS):
            improved = True
            while improved:
                improved = False
                for changed in list(swaps(curves, levels, amount))[: 2 * len(levels)]:
                    if len(self.tried) >= last:
                        return
                    routing = self._at(curves, changed)
                    if not 0 < self._cost(routing) <= self.budget:
                        continue
                    candidate = self.try_out(routing, "search")
                    if candidate.calibrated_loss < best.calibrated_loss:
                        best, levels, improved = candidate, changed, True
                        break

    def _at(self, curves: Mapping[int, LayerCurve], levels: Mapping[int, float]) -> LayerSettings:
        """The settings of these levels, each with its best K; less where rounding would pass the budget."""

        def scaled(scale: float) -> LayerSettings:
            return {
                layer: setting_at(curves[layer].best(level)[0], level * scale, self.own[layer])
                for layer, level in levels.items()
            }

        return scaled(self._fitted(scaled, 0.0, 1.0))

    def _fitted(self, routing_of: Callable[[float], LayerSettings], low: float, high: float) -> float:
        """The largest x of [low, high] whose routing is within the budget; operations grow with x."""
        if self._cost(routing_of(high)) <= self.budget:
            return high
        for _ in range(40):
            middle = (low + high) / 2
            if middle > 0 and self._cost(routing_of(middle)) > self.budget:
                high = middle
            else:
                low = middle
        return low

    def _cost(self, routing: LayerSettings) -> int:
        """Operations per image; 0 where a layer's capacity rounds to no place, which is not possible."""
        if not has_places(self.model, routing, self.batch_size):
            return 0
        return flops_at(self.model, routing, self.batch_size)


def _search_evaluations(layers: int) -> int:
    return 8 + 4 * layers


def _checked(model: VisionTransformer, check: Evaluate, candidate: Candidate) -> dict[str, Any]:
    apply_routing(model, candidate.routing)
    return check(model)


def _verdict(
    same: bool, tuned: Mapping[str, Any], uniform: Mapping[str, Any]
) -> tuple[Literal["tuned", "uniform"], str]:
    if same:
        return "uniform", "no setting by layer had a lower loss than the uniform one on the calibration images"
    gains = np.array(uniform["image_losses"], float) - np.array(tuned["image_losses"], float)
    error = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else math.inf
    said = (
        f"on the check images the loss is {abs(gains.mean()):.4f} +- {error:.4f} "
        f"{'lower' if gains.mean() >= 0 else 'higher'} than with the uniform setting, "
        f"top-1 {tuned['top1']:.2%} against {uniform['top1']:.2%}"
    )
    if gains.mean() > 2 * error and tuned["top1"] >= uniform["top1"]:
        return "tuned", said
    return "uniform", f"{said}: not surely better, so the uniform setting is kept"
