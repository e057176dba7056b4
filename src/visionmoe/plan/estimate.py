"""The plan itself: every layout of the devices with what it needs, and which one to take."""

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from visionmoe.plan.inference import widest_moment
from visionmoe.plan.layout import Layout, layouts
from visionmoe.plan.memory import Memory, memory
from visionmoe.plan.optimizer import Held, held
from visionmoe.plan.traffic import Seconds, Traffic, flops, memory_bytes, seconds, traffic
from visionmoe.plan.work import Rates, Work

MOST_DEVICES = 4096


@dataclass(frozen=True)
class Candidate:
    """One layout. flops: of one device in one step; moved: bytes to and from its memory."""

    layout: Layout
    memory: Memory
    traffic: Traffic
    flops: float
    moved: int
    seconds: Seconds
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "layout": str(self.layout),
            "memory": self.memory.as_dict(),
            "traffic": asdict(self.traffic) | {"total": self.traffic.total},
            "seconds": asdict(self.seconds) | {"total": self.seconds.total},
        }


@dataclass(frozen=True)
class Plan:
    """flops: of the whole step. recommended: the quickest that fits, None where none does; then accumulation is the
    number of parts and fewest the number of devices, either by itself, with which one would (None: not found)."""

    held: Held
    flops: int
    candidates: list[Candidate]
    recommended: Candidate | None
    accumulation: int | None = None
    fewest: tuple[int, Layout] | None = None


def plan(work: Work, devices: int, limit: int, rates: Rates, chosen: Layout | None = None) -> Plan:
    """limit: bytes of one device. chosen: the only layout to look at. ValueError where no layout is possible."""
    if chosen is not None:
        chosen.check(work.config)
    sizes, operations = held(work), flops(work)
    found = [
        candidate(work, layout, sizes, operations, limit, rates)
        for layout in ([chosen] if chosen is not None else layouts(work.config, devices))
    ]
    fitting = [one for one in found if one.fits]
    if fitting:
        best = min(fitting, key=lambda one: (one.seconds.total, one.memory.peak))
        return Plan(sizes, operations, found, best)
    return Plan(
        sizes, operations, found, None, _parts(work, devices, sizes, limit), fewest_devices(work, sizes, limit, devices)
    )


def candidate(work: Work, layout: Layout, sizes: Held, operations: int, limit: int, rates: Rates) -> Candidate:
    own, sent, share = memory(work, layout, sizes), traffic(work, layout, sizes), operations / layout.devices
    activations = own.activations if work.training else widest_moment(work, layout)[1] * work.config.num_layers
    moved = memory_bytes(work, layout, sizes, own, activations)
    return Candidate(layout, own, sent, share, moved, seconds(share, moved, sent.total, rates), fits=own.peak <= limit)


def fewest_devices(work: Work, sizes: Held, limit: int, beyond: int) -> tuple[int, Layout] | None:
    """The smallest number of devices above `beyond`, at most MOST_DEVICES, over which the batch can be cut and with
    which some layout fits; and that layout."""
    for devices in range(beyond + 1, MOST_DEVICES + 1):
        if work.batch_size % (devices * work.accumulation):
            continue
        best = min(layouts(work.config, devices), key=lambda layout: memory(work, layout, sizes).peak)
        if memory(work, best, sizes).peak <= limit:
            return devices, best
    return None


def _parts(work: Work, devices: int, sizes: Held, limit: int) -> int | None:
    """The smallest accumulation with which some layout of these devices fits."""
    if not work.training:
        return None
    most = work.batch_size // devices
    for parts in (n for n in range(work.accumulation + 1, most + 1) if most % n == 0):
        cut = dataclasses.replace(work, accumulation=parts)
        if any(memory(cut, layout, sizes).peak <= limit for layout in layouts(work.config, devices)):
            return parts
    return None
