"""The plan itself: every layout of the devices with what it needs, and which one to take."""

import contextlib
import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from visionmoe.config import ModelConfig
from visionmoe.distributed.layout import Layout
from visionmoe.plan.inference import widest_moment
from visionmoe.plan.memory import Memory, memory
from visionmoe.plan.optimizer import Held, held
from visionmoe.plan.process import Process, process
from visionmoe.plan.traffic import Seconds, Traffic, flops, memory_bytes, seconds, traffic
from visionmoe.plan.work import Rates, Work
from visionmoe.train.parallel import check

MOST_DEVICES = 4096


@dataclass(frozen=True)
class Candidate:
    """One layout. process: what a process on a CPU holds, None on a GPU; needed: bytes of a device that decide whether
    it fits. flops: of one device in one step; moved: bytes to and from its memory."""

    layout: Layout
    memory: Memory
    process: Process | None
    traffic: Traffic
    flops: float
    moved: int
    seconds: Seconds
    fits: bool

    @property
    def needed(self) -> int:
        return self.memory.peak if self.process is None else self.process.total

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "layout": str(self.layout),
            "memory": self.memory.as_dict(),
            "process": None if self.process is None else self.process.as_dict(),
            "needed": self.needed,
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
        check(work.config, chosen)
    sizes, operations = held(work), flops(work)
    found = [
        candidate(work, layout, sizes, operations, limit, rates)
        for layout in ([chosen] if chosen is not None else layouts(work.config, devices))
    ]
    fitting = [one for one in found if one.fits]
    if fitting:
        best = min(fitting, key=lambda one: (one.seconds.total, one.needed))
        return Plan(sizes, operations, found, best)
    return Plan(
        sizes, operations, found, None, _parts(work, devices, sizes, limit), fewest_devices(work, sizes, limit, devices)
    )


def layouts(config: ModelConfig, devices: int) -> list[Layout]:
    """All layouts of so many devices in which this model can be trained."""
    found = []
    for layout in Layout.every(devices):
        with contextlib.suppress(ValueError):
            check(config, layout)
            found.append(layout)
    return found


def candidate(work: Work, layout: Layout, sizes: Held, operations: int, limit: int, rates: Rates) -> Candidate:
    own, sent, share = memory(work, layout, sizes), traffic(work, layout, sizes), operations / layout.size
    activations = own.activations if work.training else widest_moment(work, layout)[1] * work.config.num_layers
    moved = memory_bytes(work, layout, sizes, own, activations)
    whole = None if work.gpu else process(work, layout, own, sizes)
    fits = (own.peak if whole is None else whole.total) <= limit
    return Candidate(layout, own, whole, sent, share, moved, seconds(share, moved, sent.total, rates), fits)


def needed(work: Work, layout: Layout, sizes: Held) -> int:
    """Bytes of one device: of its tensors, on a CPU of the process."""
    own = memory(work, layout, sizes)
    return own.peak if work.gpu else process(work, layout, own, sizes).total


def fewest_devices(work: Work, sizes: Held, limit: int, beyond: int) -> tuple[int, Layout] | None:
    """The smallest number of devices above `beyond`, at most MOST_DEVICES, over which the batch can be cut and with
    which some layout fits; and that layout."""
    for devices in range(beyond + 1, MOST_DEVICES + 1):
        if work.batch_size % (devices * work.accumulation):
            continue
        best = min(layouts(work.config, devices), key=lambda layout: needed(work, layout, sizes))
        if needed(work, best, sizes) <= limit:
            return devices, best
    return None


def _parts(work: Work, devices: int, sizes: Held, limit: int) -> int | None:
    """The smallest accumulation with which some layout of these devices fits."""
    if not work.training:
        return None
    most = work.batch_size // devices
    for parts in (n for n in range(work.accumulation + 1, most + 1) if most % n == 0):
        cut = dataclasses.replace(work, accumulation=parts)
        if any(needed(cut, layout, sizes) <= limit for layout in layouts(work.config, devices)):
            return parts
    return None
