"""Bytes of one device, moment by moment: the peak of a training step or of a call of inference."""

from dataclasses import asdict, dataclass
from itertools import accumulate

from visionmoe.distributed.layout import Layout
from visionmoe.plan.inference import widest_moment
from visionmoe.plan.operations import Operation, operations
from visionmoe.plan.optimizer import Held, held
from visionmoe.plan.work import Work

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. Of a step's whole course: gradients, when all are there, activations, when the forward
    pass has ended, and optimizer, its state. At the peak: what of these lives at that moment (of parameters with their
    packed copies), and buffers, everything else. peak: of all. moment: where in the step."""

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
    """Of the device that has most. sizes: `held(work)`, where the caller has it already."""
    sizes = sizes or held(work)
    own = sizes.local(layout)
    parameters = work.parameter_bytes * own.parameters
    if not work.training:
        moment, working, packed = widest_moment(work, layout)
        working += gathered(work, layout)
        at_peak = dict(parameters=parameters + packed, gradients=0, optimizer=0, activations=0, buffers=working)
        return Memory(parameters, 0, 0, 0, at_peak, moment)
    gradients = FLOAT * own.parameters
    steps = operations(work, layout)
    batch = _batch(work, layout)
    moments = [
        (saved, grads, buffers + batch + gathered(work, layout), name)
        for saved, grads, buffers, name in _passes(work, layout, steps, sizes, own)
    ]
    moments.append((0, gradients, batch + sizes.working_bytes_per_value * own.parameters, "optimizer"))
    saved, grads, buffers, name = max(moments, key=lambda moment: sum(moment[:3]))
    state = own.dense_state + own.expert_state
    at_peak = dict(parameters=parameters, gradients=grads, optimizer=state, activations=saved, buffers=buffers)
    return Memory(parameters, gradients, state, sum(step.saved for step in steps), at_peak, name)


def _passes(
    work: Work, layout: Layout, steps: list[Operation], sizes: Held, own: Held
) -> list[tuple[int, int, int, str]]:
    """(saved, gradients, other bytes, name) at every operation of the forward and the backward pass.

    Each part of an accumulated batch finds the gradients of the parts before it; FSDP divides them behind the last
    part alone. DDP keeps those of whole parameters in its buckets all the time.
    """
    saved = list(accumulate(step.saved for step in steps))
    dense, experts = own.dense / sizes.dense, own.experts / max(1, sizes.experts)
    if work.accumulation > 1 and layout.fsdp > 1:
        dense, experts = 1.0, 1 / layout.ep
    made = [(round(FLOAT * dense * s.dense), round(FLOAT * experts * s.experts)) for s in steps]
    buckets = layout.size > 1 and layout.fsdp == 1
    moments = []
    for number, step in enumerate(steps):
        rest = made[number:]
        kept_dense = sum(d for d, _ in (made if buckets or work.accumulation > 1 else rest))
        kept_experts = sum(e for _, e in (made if work.accumulation > 1 else rest))
        before = (kept_dense if buckets or work.accumulation > 1 else 0) + (
            kept_experts if work.accumulation > 1 else 0
        )
        # under autocast a weight's gradient is in bfloat16 first, and what accumulates is added to what is there
        cast = sum(made[number]) // 2 if work.compute_bytes < FLOAT else 0
        new = sum(made[number]) if work.accumulation > 1 else made[number][0] if buckets else 0
        moments.append((saved[number], before, step.made, f"forward {step.name}"))
        moments.append((saved[number], kept_dense + kept_experts, step.backward + cast + new, f"backward {step.name}"))
    return moments


def _batch(work: Work, layout: Layout) -> int:
    """The device's images in float32, labels and float targets, of all parts."""
    config, images = work.config, work.images(layout.size) * work.accumulation
    height, width = config.image_hw
    return images * (FLOAT * config.in_channels * height * width + INDEX + FLOAT * (config.num_classes or 0))


def gathered(work: Work, layout: Layout) -> int:
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
