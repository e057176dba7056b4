"""A speed as a budget of operations: times of a few uniform settings, a line through them, and a check at the end.

Time per image is nearly a + b * operations when only the routing changes: a is attention, dense layers' overhead and
the router, b the experts. The line is fitted to settings from the present one to the lowest, measured in turns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from visionmoe.evaluate.adaptive import LayerSettings, layer_settings
from visionmoe.evaluate.allocation import level_of, setting_at
from visionmoe.evaluate.tune import flops_at, has_places, lowest_routing
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
TOLERANCE = 0.01  # a speed this share below the wanted one counts as met
Speeds = Callable[[list[LayerSettings], str], list[float]]  # settings, what for -> images per second, measured in turns


@dataclass(frozen=True)
class Speed:
    """In images per second: what was wanted, what the tuned model reached, the present setting beside it."""

    wanted: float
    reached: float
    present: float
    attempts: int

    @property
    def met(self) -> bool:
        return self.reached >= self.wanted * (1 - TOLERANCE)

    def tightened(self, model: VisionTransformer, budget: int, flops: int, batch_size: int) -> int:
        """A smaller budget, by the slope between the present setting and the one that was too slow."""
        most, least = (
            count_flops(model, batch_size=batch_size),
            flops_at(model, lowest_routing(model, batch_size), batch_size),
        )
        missing = 1 / self.reached - 1 / self.wanted  # seconds per image
        saved = 1 / self.present - 1 / self.reached
        slope = saved / (most - flops) if saved > 0 and most > flops else 0.0
        less = missing / slope if slope > 0 else 0.05 * (most - least)
        return int(max(least, min(budget, flops) - 1.2 * less))


def budget_for_speed(model: VisionTransformer, wanted: float, batch_size: int, speeds: Speeds) -> int:
    """Operations per image at which the model should run `wanted` images per second.

    ValueError, with the range, when that is slower than the present setting or faster than the lowest.
    """
    own = layer_settings(model)
    settings = [own]
    for fraction in FRACTIONS:
        settings.append({n: setting_at(s.num_selected_experts, fraction * level_of(s), s) for n, s in own.items()})
    settings = [setting for setting in settings if has_places(model, setting, batch_size)]
    settings.append(lowest_routing(model, batch_size))
    measured = speeds(settings, "budget")
    slowest, fastest = measured[0], measured[-1]
    if not slowest <= wanted <= fastest:
        raise ValueError(
            f"images_per_second must be between {slowest:.1f} (the present setting) and {fastest:.1f} (the lowest) "
            f"here at batch size {batch_size}, got {wanted:g}"
        )
    flops = np.array([flops_at(model, setting, batch_size) for setting in settings])
    slope, start = np.polyfit(flops, 1 / np.array(measured), 1)
    most, least = int(flops[0]), int(flops[-1])
    if slope <= 0:  # the experts cost nothing that can be measured
        return most
    return int(np.clip((1 / wanted - start) / slope, least, most))
