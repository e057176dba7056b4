"""Learning-rate schedules: functions of the number of updates already made (the first update asks for 0)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from visionmoe.config import check_names

Schedule = Callable[[int], float]


def create_schedule(schedule: str, total_steps: int, **config: Any) -> Schedule:
    """Returns step -> rate.

    schedule: "constant" (value), "warmup_linear_decay" or "warmup_cosine_decay" (peak_value, end_value, warmup_steps),
    or "big_vision_rsqrt" (peak_value, timescale, warmup_steps, cooldown_steps; arXiv 2106.04560). All but the constant
    one are stretched over `decay_steps`, by default total_steps, warm-up and cool-down included.
    Raises ValueError for unknown schedules and options, missing options and impossible values.
    """
    if schedule not in _SCHEDULES:
        check_names("the schedule", [schedule], _SCHEDULES)
    build, required, optional = _SCHEDULES[schedule]
    if schedule != "constant":
        config = {"decay_steps": total_steps, **config}
        optional = (*optional, "decay_steps")
    check_names(f"schedule {schedule!r}", config, {*required, *optional})
    missing = sorted(set(required) - set(config))
    if missing:
        raise ValueError(f"schedule {schedule!r} needs {', '.join(missing)}")
    for name, number in config.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
            raise ValueError(f"{name} of schedule {schedule!r} must be a number >= 0, got {number!r}")
    return build(**config)


def rate_schedule(learning_rate: float | Mapping[str, Any], total_steps: int) -> Schedule:
    """A number (constant rate) or the options of `create_schedule`."""
    if isinstance(learning_rate, Mapping):
        if "schedule" not in learning_rate:
            raise ValueError(f"learning_rate needs the name of a schedule, got {dict(learning_rate)}")
        return create_schedule(total_steps=total_steps, **learning_rate)
    return create_schedule("constant", total_steps, value=learning_rate)


def _constant(value: float) -> Schedule:
    return lambda step: value


def _linear(peak_value: float, decay_steps: int, end_value: float = 0.0, warmup_steps: int = 0) -> Schedule:
    length = decay_steps - warmup_steps
    _check_fits(decay_steps, warmup_steps)
    return lambda step: (
        _warmup(step, warmup_steps, peak_value)
        if step < warmup_steps
        else end_value + (peak_value - end_value) * (1.0 - min(step - warmup_steps, length) / length)
    )


def _cosine(peak_value: float, decay_steps: int, end_value: float = 0.0, warmup_steps: int = 0) -> Schedule:
    length = decay_steps - warmup_steps
    _check_fits(decay_steps, warmup_steps)
    return lambda step: (
        _warmup(step, warmup_steps, peak_value)
        if step < warmup_steps
        else end_value
        + (peak_value - end_value) * 0.5 * (1.0 + math.cos(math.pi * min(step - warmup_steps, length) / length))
    )


def _rsqrt(
    peak_value: float, timescale: float, decay_steps: int, warmup_steps: int = 0, cooldown_steps: int = 0
) -> Schedule:
    _check_fits(decay_steps, warmup_steps + cooldown_steps, may_fill=True)
    if timescale <= 0:
        raise ValueError(f"timescale must be > 0, got {timescale}")
    start = decay_steps - cooldown_steps  # of the cool-down, which starts from the rate reached there

    def rate(step: int) -> float:
        if step < warmup_steps:
            return _warmup(step, warmup_steps, peak_value)
        cooling = cooldown_steps > 0 and step >= start
        main = peak_value / math.sqrt(1.0 + ((start if cooling else step) - warmup_steps) / timescale)
        return main * max(0.0, 1.0 - (step - start) / cooldown_steps) if cooling else main

    return rate


def _warmup(step: int, warmup_steps: int, peak_value: float) -> float:
    return peak_value * step / warmup_steps


def _check_fits(decay_steps: int, used: int, may_fill: bool = False) -> None:
    if decay_steps < used or (decay_steps == used and not may_fill):
        raise ValueError(
            f"warmup_steps (and cooldown_steps) must be less than the whole schedule, got {used} of {decay_steps} steps"
        )


_SCHEDULES: dict[str, tuple[Callable[..., Schedule], tuple[str, ...], tuple[str, ...]]] = {
    "constant": (_constant, ("value",), ()),
    "warmup_linear_decay": (_linear, ("peak_value",), ("end_value", "warmup_steps")),
    "warmup_cosine_decay": (_cosine, ("peak_value",), ("end_value", "warmup_steps")),
    "big_vision_rsqrt": (_rsqrt, ("peak_value", "timescale"), ("warmup_steps", "cooldown_steps")),
}
