"""Operations, and bytes moved in one step: between devices by kind, and to and from a device's memory."""

from dataclasses import dataclass

from visionmoe.distributed.layout import Layout
from visionmoe.model.flops import count_flops
from visionmoe.model.skeleton import skeleton
from visionmoe.model.vit import create_model
from visionmoe.plan.memory import Memory
from visionmoe.plan.optimizer import Held
from visionmoe.plan.work import Rates, Work, routed

FLOAT = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one step. gradients: their all-reduce. gather, scatter: FSDP's all-gather of
    parameters and reduce-scatter of gradients. tokens: the all-to-all of the experts' buffers."""

    gradients: int
    gather: int
    scatter: int
    tokens: int

    @property
    def total(self) -> int:
        return self.gradients + self.gather + self.scatter + self.tokens


@dataclass(frozen=True)
class Seconds:
    """compute: operations over the rate. memory: bytes over the memory's bandwidth. link: bytes over the links."""

    compute: float
    memory: float
    link: float

    @property
    def total(self) -> float:
        """Products and memory at the same time, the links after them: nothing of the communication is hidden."""
        return max(self.compute, self.memory) + self.link


def flops(work: Work) -> int:
    """Of the whole step over all devices: `count_flops` per image, three times in training (a backward pass makes two
    products of each product's size)."""
    once = count_flops(skeleton(create_model, work.config))
    return once * work.batch_size * (3 if work.training else 1)


def traffic(work: Work, layout: Layout, sizes: Held) -> Traffic:
    """Ring collectives: of n devices each sends (n - 1) / n of what is gathered, scattered or exchanged, and twice
    that of what is all-reduced."""
    sent = [
        _parameters(work, sizes.dense, layout.dense_shards, layout.size // layout.dense_shards),
        _parameters(work, sizes.experts // layout.ep, layout.fsdp, layout.size // layout.expert_shards),
    ]
    gradients, gather, scatter = (sum(kind) for kind in zip(*sent, strict=True))
    return Traffic(gradients, gather, scatter, _tokens(work, layout))


def _parameters(work: Work, values: int, shards: int, replicas: int) -> tuple[int, int, int]:
    """(all-reduce, all-gather, reduce-scatter) of so many values in shards, each shard on so many devices.

    Parameters are gathered for the forward pass and again for the backward pass, of every part of the batch;
    gradients are reduced once a step, within the shards and between the replicas.
    """
    whole = values * work.parameter_bytes
    gather = round(whole * _ring(shards)) * (2 * work.accumulation if work.training else 1)
    if not work.training:
        return 0, gather, 0
    scatter = round(FLOAT * values * _ring(shards))
    return round(2 * FLOAT * values / shards * _ring(replicas)), gather, scatter


def _tokens(work: Work, layout: Layout) -> int:
    """The buffers (E, G*C, D) there and back, and their gradients."""
    config = work.config
    if layout.ep == 1:
        return 0
    images = work.images(layout.size)
    places = sum(routed(config, layer, images).places for layer in config.moe.layers)
    once = round(work.compute_bytes * places * config.hidden_size * _ring(layout.ep))
    return once * (4 if work.training else 2) * work.accumulation


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def memory_bytes(work: Work, layout: Layout, sizes: Held, own: Memory, activations: int) -> int:
    """To and from a device's memory in one step: parameters read in each pass, activations written and read once a
    pass, and in the update parameters, gradients and state read and written. What stays in caches is not left out."""
    read = work.parameter_bytes * sizes.local(layout).parameters
    if not work.training:
        return read + 2 * activations
    passes = work.accumulation * (2 * read + own.gradients + 3 * activations)
    return passes + 2 * read + 2 * own.optimizer + 2 * own.gradients


def seconds(flops_per_device: float, moved: int, sent: int, rates: Rates) -> Seconds:
    return Seconds(flops_per_device / rates.flops, moved / rates.bandwidth, sent / rates.link)
