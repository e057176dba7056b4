"""What a benchmark measures: calls in turns, the ratios of neighbours in time, and the rows that come out."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from visionmoe.evaluate.timing import take_turns

Section = Literal["ceilings", "layer", "share", "adaptive", "models", "growth", "memory"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LeftOutError(Exception):
    """A case that this machine cannot measure; the message says why."""


@dataclass(frozen=True)
class Target:
    """The figure that a row should reach: at most `limit`, or at least."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One figure. unit: of `value`: "ratio", "share", "images/s", "ms", "MiB", "GFLOP/s" or "GB/s".

    ms, reference_ms: medians of what was timed and of what it is compared with. flops, bytes: of one call, for the
    floor; bytes are those that must cross the memory once: parameters, inputs, outputs. rounds: counted calls of each.
    """

    what: str
    value: float
    unit: str
    dtype: str
    ms: float | None = None
    reference_ms: float | None = None
    target: Target | None = None
    flops: float = 0.0
    bytes: float = 0.0
    rounds: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Rows that are measured in turns with each other, so together or not at all.

    settings: what they depend on besides the machine and the versions: with the section and the name they are the key
    by which a finished case is recognised.
    """

    section: Section
    name: str
    settings: Mapping[str, Any]
    measure: Callable[[], list[Row]]


@dataclass(frozen=True)
class Effort:
    """Counted rounds of a comparison, and the seconds after which it gets no more of them."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Setup:
    """Where and how thoroughly. quick: small shapes and few rounds, without targets."""

    device: torch.device
    quick: bool = False

    def target(self, limit: float, *, at_least: bool = False) -> Target | None:
        """Targets are stated for the full sizes on a CPU."""
        return None if self.quick or self.device.type != "cpu" else Target(limit, at_least)

    def effort(self, rounds: int, seconds: float) -> Effort:
        return Effort(min(rounds, 3), seconds / 10) if self.quick else Effort(rounds, seconds)


class Times:
    """Seconds of named calls that ran in turns, round by round."""

    def __init__(self, each: Mapping[str, tuple[float, ...]]) -> None:
        self.each = dict(each)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.each.values())))

    def ms(self, name: str) -> float:
        """Median, in milliseconds."""
        return 1e3 * statistics.median(self.each[name])

    def ratio(self, name: str, reference: str) -> float:
        """Median of the rounds' ratios: what slows the machine for a while slows both neighbours."""
        return self.median(lambda now: now[name] / now[reference])

    def median(self, of_round: Callable[[dict[str, float]], float]) -> float:
        """Median over the rounds of what `of_round` makes of one round's seconds by name."""
        rounds = zip(*self.each.values(), strict=True)
        return statistics.median(of_round(dict(zip(self.each, now, strict=True))) for now in rounds)


def in_turns(calls: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device) -> Times:
    """Times every call once a round, after one uncounted round; waits for the device after each."""
    runs = [_waiting(call, device) for call in calls.values()]
    timing = take_turns(runs, rounds=effort.rounds, max_seconds=effort.seconds)
    return Times(dict(zip(calls, timing.each, strict=True)))


def _waiting(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
