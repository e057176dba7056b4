"""What a process holds on a CPU beside what its tensors hold. Measured, not computed: torch 2.14 with glibc 2.36, by
benchmarks/plan_memory.py. On a GPU it is not known.

HOLES: glibc asks its heap for more than an aligned block needs and gives the rest back, where small objects settle, so
that a freed block is too small for the next one of its own size (glibc's bugs 14581, 30723). Of what
is made and freed in every step, so much more is held for each byte that lives at the peak. What lives from step to
step, parameters and the optimizer's state, leaves no holes.
"""

from dataclasses import asdict, dataclass

from visionmoe.distributed.layout import Layout
from visionmoe.plan.memory import Memory
from visionmoe.plan.optimizer import Held
from visionmoe.plan.work import Work

HOLES = {"train": 0.3, "inference": 1.0}
GATHERED = 1.6  # holes that FSDP leaves, for each byte of the parameters that it gathers one block after the other
ONEDNN = {"float32": 13_000_000, "bfloat16": 95_000_000}  # machine code of its products, one per shape
IMPORTS = 730_000_000  # Python, torch and its libraries, before there is a model


@dataclass(frozen=True)
class Process:
    """Bytes: tensors, the holes of the heap between them, oneDNN's code, and the libraries."""

    tensors: int
    holes: int
    onednn: int
    imports: int

    @property
    def beside_imports(self) -> int:
        return self.tensors + self.holes + self.onednn

    @property
    def total(self) -> int:
        return self.beside_imports + self.imports

    def as_dict(self) -> dict:
        return asdict(self) | {"total": self.total}


def process(work: Work, layout: Layout, memory: Memory, sizes: Held) -> Process:
    """sizes: `held(work)`."""
    passing = sum(memory.at_peak[kind] for kind in ("gradients", "activations", "buffers"))
    holes = HOLES[work.mode] * passing
    if layout.fsdp > 1:
        holes += GATHERED * work.parameter_bytes * (sizes.dense + sizes.experts // layout.ep)
    return Process(memory.peak, round(holes), ONEDNN[work.precision], IMPORTS)
