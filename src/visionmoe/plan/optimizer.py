"""What an optimizer holds between steps and during one, in bytes; from `visionmoe.train.scaling`."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from visionmoe.config import ModelConfig
from visionmoe.distributed.layout import Layout
from visionmoe.model.skeleton import skeleton
from visionmoe.model.vit import create_model
from visionmoe.plan.work import Work
from visionmoe.train.scaling import DTYPES, SGD, Adafactor, Adam, Scaling, create_scaling

FLOAT = 4


@dataclass(frozen=True)
class Share:
    """One parameter: its shape, whether it is an expert's, and the bytes of its state."""

    shape: tuple[int, ...]
    expert: bool
    state: int = 0

    def values(self, layout: Layout) -> int:
        """On the device that gets most of them. FSDP cuts the first axis, and beside ep the experts' second one; what
        it cannot cut evenly, it cuts into equal parts of which the last ones are missing."""
        if not self.shape:
            return 1
        if self.expert and layout.ep > 1:
            return math.prod(self.shape) // layout.expert_shards
        return -(-self.shape[0] // layout.dense_shards) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Held:
    """Values of the parameters, and bytes of the optimizer's state and of its temporary values, of the dense
    parameters and of the experts; of the whole model (`local`: of one device)."""

    dense: int
    experts: int
    dense_state: int = 0
    expert_state: int = 0
    working_bytes_per_value: int = 0
    shares: tuple[Share, ...] = ()

    def local(self, layout: Layout) -> "Held":
        """Of the device that has most."""
        sums = {"dense": 0, "experts": 0, "dense_state": 0, "expert_state": 0}
        for share in self.shares:
            values = share.values(layout)
            sums["experts" if share.expert else "dense"] += values
            sums["expert_state" if share.expert else "dense_state"] += share.state * values // math.prod(share.shape)
        return replace(
            self,
            dense=sums["dense"],
            experts=sums["experts"],
            dense_state=sums["dense_state"],
            expert_state=sums["expert_state"],
        )

    @property
    def parameters(self) -> int:
        return self.dense + self.experts


def held(work: Work) -> Held:
    """ValueError for an unknown optimizer, option or value."""
    named = parameters(work.config)
    scaling = create_scaling(work.optimizer, named, work.options) if work.training else None
    shares = tuple(
        Share(tuple(p.shape), ".experts." in name, 0 if scaling is None else _state(scaling, p))
        for name, p in named.items()
    )
    whole = Held(0, 0, working_bytes_per_value=0 if scaling is None else _working(scaling), shares=shares)
    return whole.local(Layout())


def parameters(config: ModelConfig) -> dict[str, torch.Tensor]:
    """All parameters by name, without memory."""
    return dict(skeleton(create_model, config).named_parameters())


def _state(scaling: Scaling, parameter: torch.Tensor) -> int:
    """Bytes of one parameter's state."""
    values = parameter.numel()
    if isinstance(scaling, Adam):
        return values * (_size(scaling.mu_dtype) + FLOAT)
    if isinstance(scaling, SGD):
        return values * _size(scaling.accumulator_dtype) if scaling.momentum else 0
    assert isinstance(scaling, Adafactor)
    plan = scaling.plans[parameter]
    momentum = values * _size(scaling.momentum_dtype) if scaling.momentum else 0
    if plan.row is None or plan.column is None:
        return momentum + FLOAT * values
    size = math.prod(plan.view)
    return momentum + FLOAT * (size // plan.view[plan.column] + size // plan.view[plan.row])


def _working(scaling: Any) -> int:
    """Bytes per value that an update holds beside the state: the lists that `Scaling.update` makes of all of them."""
    if isinstance(scaling, Adam):  # torch's fused kernel makes none; else new first moments, and roots
        return 0 if scaling.mu_dtype is None and scaling.eps_root == 0.0 else 2 * FLOAT
    if isinstance(scaling, SGD):  # the new trace; with nesterov the update, too
        return (FLOAT + (FLOAT if scaling.nesterov else 0)) if scaling.momentum else 0
    return 2 * FLOAT if scaling.momentum else FLOAT  # the scaled gradients, and their averages


def _size(dtype: str | None) -> int:
    return DTYPES[dtype].itemsize if dtype else FLOAT
