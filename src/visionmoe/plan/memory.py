"""Bytes of one device, moment by moment: the peak of a training step or of a call of inference."""

from dataclasses import asdict, dataclass
from itertools import accumulate

from visionmoe.plan.inference import widest_moment
from visionmoe.plan.layout import Layout
from visionmoe.plan.operations import Operation, operations
from visionmoe.plan.optimizer import Held, held
from visionmoe.plan.work import Work

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. Of a step's whole course: gradients, when all are there, activations, when the forward
    pass has ended, and optimizer, its state. At the peak: what of these lives at that moment, and buffers, everything
    else. peak: of all. moment: where in the step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    at_peak: dict[str, int]
    moment: str

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def as_dict(self) -> dict:
        return asdict(self) | {"peak": self.peak}


def memory(work: Work, layout: Layout, sizes: Held | None = None) -> Memory:
    """sizes: `held(work)`, where the caller has it already."""
    sizes = sizes or held(work)
    dense, experts = sizes.dense // layout.dense_shards, sizes.experts // layout.expert_shards
    parameters = work.parameter_bytes * (dense + experts)
    if not work.training:
        moment, working = widest_moment(work, layout)
        working += _gathered(work, layout)
        at_peak = dict(parameters=parameters, gradients=0, optimizer=0, activations=0, buffers=working)
        return Memory(parameters, 0, 0, 0, at_peak, moment)
    state = sizes.dense_state // layout.dense_shards + sizes.expert_state // layout.expert_shards
    gradients = FLOAT * (dense + experts)
    steps = operations(work, layout)
    batch = _batch(work, layout)
    moments = [
        (saved, grads, buffers + batch + _gathered(work, layout), name)
        for saved, grads, buffers, name in _passes(work, layout, steps, gradients)
    ]
    moments.append((0, gradients, batch + sizes.working_bytes_per_value * (dense + experts), "optimizer"))
    saved, grads, buffers, name = max(moments, key=lambda moment: sum(moment[:3]))
    at_peak = dict(parameters=parameters, gradients=grads, optimizer=state, activations=saved, buffers=buffers)
    return Memory(parameters, gradients, state, sum(step.saved for step in steps), at_peak, name)


def _passes(work: Work, layout: Layout, steps: list[Operation], gradients: int) -> list[tuple[int, int, int, str]]:
    """(saved, gradients, other bytes, name) at every operation of the forward and the backward pass.

    Each part of an accumulated batch finds the gradients of the parts before it.
    """
    saved = list(accumulate(step.saved for step in steps))
    own = [FLOAT * (s.dense // layout.dense_shards + s.experts // layout.expert_shards) for s in steps]
    later = [total - so_far for total, so_far in zip([sum(own)] * len(own), [0, *accumulate(own)], strict=False)]
    there = gradients if work.accumulation > 1 else 0
    moments = []
    for number, step in enumerate(steps):
        # under autocast a weight's gradient is in bfloat16 first, and what accumulates is added to what is there
        cast = own[number] // 2 if work.compute_bytes < FLOAT else 0
        new = own[number] if there else 0
        moments.append((saved[number], there, step.made, f"forward {step.name}"))
        moments.append((saved[number], there or later[number], step.backward + cast + new, f"backward {step.name}"))
    return moments


def _batch(work: Work, layout: Layout) -> int:
    """The device's images in float32, labels and float targets, of all parts."""
    config, images = work.config, work.images(layout.devices) * work.accumulation
    height, width = config.image_hw
    return images * (FLOAT * config.in_channels * height * width + INDEX + FLOAT * (config.num_classes or 0))


def _gathered(work: Work, layout: Layout) -> int:
    """fully_shard: the whole parameters of the block at work and of the next, and in training the gradients of one."""
    if layout.fsdp == 1:
        return 0
    config = work.config
    dim, width = config.hidden_size, config.mlp_dim
    attention, mlp = 4 * dim * dim + 8 * dim, 2 * dim * width + width + dim
    dense = attention + mlp
    sparse = attention + config.moe.num_experts * (dim + mlp // layout.ep) if config.moe.layers else dense
    head = dim * (config.num_classes or 0)
    largest = sorted((dense, sparse, head))
    blocks = sparse + dense if config.moe.layers else 2 * dense
    return work.parameter_bytes * max(blocks, largest[-1]) + (FLOAT * largest[-1] if work.training else 0)
