"""The reference's optimizers as one torch Optimizer: clip, scale, decay, follow the schedule.

An update is p <- p - rate(step) * (scaled gradient + weight_decay * p): the decay is decoupled, and multiplied by
the scheduled rate (REFERENCE of google-research/vmoe). Patterns are regular expressions that are searched in the
parameters' names ("blocks.3.mlp.experts.fc1.weight"); the first one that matches counts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visionmoe.config import check_names
from visionmoe.distributed.tensors import global_norm, local
from visionmoe.train.scaling import Scaling, create_scaling
from visionmoe.train.schedules import Schedule, create_schedule, rate_schedule

__all__ = ["ScheduledOptimizer", "create_optimizer", "create_schedule", "global_norm"]

Factors = Sequence[tuple[str, float]]
Patterns = str | Sequence[str]


def create_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    name: str,
    total_steps: int,
    learning_rate: float | Mapping[str, Any],
    weight_decay: float | Factors | None = None,
    gradient_clip: Mapping[str, float] | None = None,
    learning_rate_factors: Factors | None = None,
    gradient_scale: Factors | None = None,
    frozen_pattern: Patterns | None = None,
    trainable_pattern: Patterns | None = None,
    **options: Any,
) -> "ScheduledOptimizer":
    """Returns the optimizer that a reference config describes, over (name, parameter) pairs.

    name: "adam" (alias "adamw"; options b1, b2, eps, eps_root, mu_dtype), "sgd" (momentum, nesterov, accumulator_dtype)
        or "big_vision_adafactor" (alias "adafactor"; decay_rate, decay_rate_max, decay_offset, eps,
        min_dim_size_to_factor, momentum, momentum_dtype).
    learning_rate: a number, or the options of `create_schedule`.
    weight_decay: a number, or (pattern, value) pairs; parameters that no pattern matches are not decayed.
    gradient_clip: {"global_norm": n} or {"absolute_value": n}.
    learning_rate_factors, gradient_scale: (pattern, factor) pairs, 1 for parameters that no pattern matches. The
        gradient's factor comes before clipping and moments, the rate's after everything.
    frozen_pattern, trainable_pattern: which parameters (not) to update. Gradients of frozen ones count for the norm.
    Raises ValueError for unknown options, patterns that match nothing, and impossible values.
    """
    named = [(n, p) for n, p in named_parameters if p.requires_grad]
    if not named:
        raise ValueError("there are no parameters to optimize")
    names = [n for n, _ in named]
    decay = _by_pattern("weight_decay", weight_decay or 0.0, 0.0, names)
    factor = _by_pattern("learning_rate_factors", learning_rate_factors or 1.0, 1.0, names)
    scale = _by_pattern("gradient_scale", gradient_scale or 1.0, 1.0, names)
    frozen = _frozen(frozen_pattern, trainable_pattern, names)
    groups: dict[tuple, list[tuple[str, Tensor]]] = {}
    for n, p in named:
        groups.setdefault((decay(n), factor(n), scale(n), frozen(n)), []).append((n, p))
    fields = ("weight_decay", "rate_factor", "gradient_scale", "frozen")
    return ScheduledOptimizer(
        [{"params": pairs, **dict(zip(fields, key, strict=True))} for key, pairs in groups.items()],
        scaling=create_scaling(name, dict(named), options),
        schedule=rate_schedule(learning_rate, total_steps),
        **_clipping(gradient_clip),
    )


class ScheduledOptimizer(torch.optim.Optimizer):
    """Clips, scales, decays and follows a schedule; `create_optimizer` makes one.

    Attributes: num_updates (made so far; saved in the state), last_rate, and last_grad_norm (0-dim tensor; before
    clipping), both of the latest step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        scaling: Scaling,
        schedule: Schedule,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.scaling = scaling
        self.schedule = schedule
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.last_grad_norm = torch.zeros(())
        super().__init__(groups, {"num_updates": 0, "lr": schedule(0)})

    @property
    def num_updates(self) -> int:
        return self.param_groups[0]["num_updates"]

    @property
    def last_rate(self) -> float:
        """The scheduled rate of the latest step (before the factors by name)."""
        return self.schedule(max(0, self.num_updates - 1))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_norm: Tensor | None = None) -> Any:
        """One update from the parameters' .grad, which clipping may change in place. Collective with DTensors.

        grad_norm: the gradients' global norm (), where the caller has it already.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.last_grad_norm = global_norm(grads) if grad_norm is None else grad_norm
        self._clip(grads)
        step = self.num_updates
        rate = self.schedule(step)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and not group["frozen"]:
                self.scaling.update(
                    params,
                    [p.grad for p in params],
                    [self.state[p] for p in params],
                    step=step,
                    rate=rate * group["rate_factor"],
                    weight_decay=group["weight_decay"],
                )
            group["num_updates"] = step + 1
            group["lr"] = self.schedule(step + 1) * group["rate_factor"]
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the type in which it was saved (torch casts to the parameter's)."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for key, param in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[param][name] = value.detach().clone().to(param.device)

    def _clip(self, grads: list[Tensor]) -> None:
        norm = self.last_grad_norm
        for group in self.param_groups:
            own = [local(p.grad) for p in group["params"] if p.grad is not None]
            if own and group["gradient_scale"] != 1.0:
                torch._foreach_mul_(own, group["gradient_scale"])
        if any(group["gradient_scale"] != 1.0 for group in self.param_groups):
            norm = global_norm(grads)
        grads = [local(grad) for grad in grads]
        if self.clip_norm is not None and grads:
            scale = torch.where(norm < self.clip_norm, torch.ones_like(norm), self.clip_norm / norm)
            torch._foreach_mul_(grads, scale)
        if self.clip_value is not None and grads:
            torch._foreach_clamp_min_(grads, -self.clip_value)
            torch._foreach_clamp_max_(grads, self.clip_value)


def _by_pattern(what: str, value: float | Factors, default: float, names: list[str]) -> Callable[[str], float]:
    """name -> number, from one number for all or (pattern, number) pairs."""
    if isinstance(value, (int, float)):
        number = _number(what, value)
        return lambda name: number
    if not isinstance(value, Sequence) or not all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
        raise ValueError(f"{what} must be a number or pairs (pattern, number), got {value!r}")
    pairs = [(_compile(what, pattern), _number(what, number)) for pattern, number in value]
    _must_match(what, [pattern for pattern, _ in pairs], names)
    return lambda name: next((number for pattern, number in pairs if pattern.search(name)), default)


def _frozen(frozen: Patterns | None, trainable: Patterns | None, names: list[str]) -> Callable[[str], bool]:
    if frozen and trainable:
        raise ValueError(f"give frozen_pattern or trainable_pattern, not both: got {frozen!r} and {trainable!r}")
    given = frozen or trainable
    if not given:
        return lambda name: False
    what = "frozen_pattern" if frozen else "trainable_pattern"
    patterns = [_compile(what, p) for p in ([given] if isinstance(given, str) else given)]
    for pattern in patterns:  # each of them: a parameter that is not frozen although it was asked for is not noticed
        _must_match(what, [pattern], names)
    is_frozen = bool(frozen)
    return lambda name: any(p.search(name) for p in patterns) == is_frozen


def _clipping(clip: Mapping[str, float] | None) -> dict[str, float | None]:
    given = {k: v for k, v in (clip or {}).items() if v is not None}
    check_names("gradient_clip", given, ("global_norm", "absolute_value"))
    if len(given) > 1:
        raise ValueError(f"gradient_clip takes global_norm or absolute_value, not both: got {given}")
    for name, value in given.items():
        if _number("gradient_clip", value) <= 0:
            raise ValueError(f"{name} of gradient_clip must be > 0, got {value}")
    return {"clip_norm": given.get("global_norm"), "clip_value": given.get("absolute_value")}


def _compile(what: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from None


def _must_match(what: str, patterns: list[re.Pattern[str]], names: list[str]) -> None:
    """At least one pattern of a list must match: a list that changes nothing is a mistake."""
    if not any(pattern.search(name) for pattern in patterns for name in names):
        given = ", ".join(repr(pattern.pattern) for pattern in patterns)
        raise ValueError(f"{what}: no parameter matches {given}; names are like {', '.join(names[:3])}")


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{what} must be finite and >= 0, got {value!r}")
    return float(value)
