"""Bytes of one device, moment by moment: the peak of a training step or of a call of inference."""

from dataclasses import asdict, dataclass
from itertools import pairwise

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
    dense, experts = own.dense / sizes.dense, own.experts / max(1, sizes.experts)
    if work.accumulation > 1 and layout.fsdp > 1:
        dense, experts = 1.0, 1 / layout.ep
    made = [(round(FLOAT * dense * s.dense), round(FLOAT * experts * s.experts)) for s in steps]
    always = [work.accumulation > 1 or (layout.size > 1 and layout.fsdp == 1)] * 2  # of dense parameters, of experts
    always[1] = work.accumulation > 1 or (always[0] and layout.ep == 1)
    whole = [sum(kind) for kind in zip(*made, strict=True)]
    there = sum(size for size, kept in zip(whole, always, strict=True) if kept)
    saved, later, moments = 0, list(whole), []
    for step, new in zip(steps, made, strict=True):
        saved += step.saved
        # under autocast a weight's gradient is in bfloat16 first, and what is there already gets the new one added
        cast = sum(new) // 2 if work.compute_bytes < FLOAT else 0
        added = sum(size for size, kept in zip(new, always, strict=True) if kept)
        grads = there + sum(size for size, kept in zip(later, always, strict=True) if not kept)
        moments.append((saved, there, step.made, f"forward {step.name}"))
        moments.append((saved, grads, step.backward + cast + added, f"backward {step.name}"))
        later = [size - one for size, one in zip(later, new, strict=True)]
    return moments


def _batch(work: Work, layout: Layout) -> int:
    """The device's images in float32, labels and float targets, of all parts."""
    config, images = work.config, work.images(layout.size) * work.accumulation
    height, width = config.image_hw
    return images * (FLOAT * config.in_channels * height * width + INDEX + FLOAT * (config.num_classes or 0))


def gathered(work: Work, layout: Layout) -> int:
    """fully_shard: the whole parameters of the block at work, of the next as they arrive, and of what is outside of
    blocks, which stay; in training the whole gradients of the block and of what is outside, too."""
    if layout.fsdp == 1:
        return 0
    config = work.config
    dim, width, experts = config.hidden_size, config.mlp_dim, config.moe.num_experts
    attention, mlp = 4 * dim * dim + 8 * dim, 2 * dim * width + width + dim
    blocks = [
        attention + (experts * (dim + mlp // layout.ep) if layer in config.moe.layers else mlp)
        for layer in range(config.num_layers)
    ]
    patch = config.patch_hw[0] * config.patch_hw[1] * config.in_channels
    outside = dim * (patch + config.num_tokens + (config.num_classes or 0))
    pairs = [now + following for now, following in pairwise(blocks)] or blocks
    return work.parameter_bytes * (max(pairs) + outside) + (FLOAT * (max(blocks) + outside) if work.training else 0)
