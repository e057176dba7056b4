"""A model spread over the processes of a job, by torch's own engines: DDP, FSDP2 and DTensor."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from visionmoe.config import ModelConfig
from visionmoe.distributed.exchange import PARTS, ExpertExchange
from visionmoe.distributed.layout import Layout, Meshes
from visionmoe.distributed.tensors import local
from visionmoe.distributed.world import World
from visionmoe.model.experts import Experts
from visionmoe.model.router import Router
from visionmoe.model.soft import SoftRouter
from visionmoe.model.vit import ModelOutput, VisionTransformer

Forward = Callable[[Tensor], ModelOutput]


class Parallel:
    """How a training step talks to the other processes. In one process it does not.

    First `spread` the parameters, then make the optimizer and freeze what it does not train, then `wrap` the model. The
    loss of each process counts alike: after the last part's backward pass and `reduce_gradients`, every gradient is
    that of the mean loss over all processes.
    """

    def __init__(self, layout: Layout | None = None, world: World | None = None) -> None:
        self.layout, self.world = layout or Layout(), world or World()
        self.shares_noise = False  # whether all processes and parts draw router noise from one stream
        self._model: VisionTransformer | None = None
        self._ddp: DistributedDataParallel | None = None
        self._meshes: Meshes | None = None
        self._reductions: list[tuple[Tensor, Any]] = []
        self._last = True

    def spread(self, model: VisionTransformer, device: torch.device) -> None:
        """Parameters that are equal on all processes become parts: each process keeps its own. Collective.

        ValueError where the layout does not fit the model.
        """
        self._model = model
        self.shares_noise = not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        if self.world.size == 1:
            return
        check(model.config, self.layout)
        self._meshes = self.layout.meshes(device)
        experts = [module for module in model.modules() if isinstance(module, Experts)] if self.layout.ep > 1 else []
        for module in experts:
            split_experts(module, self._meshes)
        if self.layout.fsdp > 1:
            self._shard(model, experts, self._meshes)

    def wrap(self, model: VisionTransformer, device: torch.device) -> Forward:
        """The model to be called in training: within DDP, which averages the gradients of whole parameters."""
        if self._meshes is None:
            return model
        split = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        whole = [p for name, p in model.named_parameters() if name not in split and p.requires_grad]
        if self.layout.fsdp > 1:
            self._average(whole, dist.group.WORLD)
            return model
        self._average(split.values(), self._meshes.whole["dp"].get_group() if self.layout.dp > 1 else None)
        if not whole:
            return model
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(split))
        device_ids = [device] if device.type == "cuda" else None
        self._ddp = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
        return self._ddp

    def place(self, first_image: int) -> None:
        """Tells the routers the number, in the global batch, of the first image that comes next."""
        assert self._model is not None
        first_token = first_image * self._model.config.num_tokens * self._model.config.ensemble_size
        device = next(self._model.parameters()).device
        number = torch.full((), first_token, dtype=torch.int64, device=device)  # a kernel, no copy from the host
        for module in self._model.modules():
            if isinstance(module, Router | SoftRouter):
                module.first_token = number

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a batch: gradients are exchanged in the last one."""
        self._last = last
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
        with self._ddp.no_sync() if self._ddp is not None and not last else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around forward passes without backward passes: afterwards FSDP holds no gathered parameters, which it would
        use again although their parts have changed."""
        try:
            yield
        finally:
            if isinstance(self._model, FSDPModule):
                self._model.reshard()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """After the last part: waits for the gradients that neither DDP nor FSDP has averaged."""
        for grad, work in self._reductions:
            if work is not None:
                work.wait()
            grad.div_(self.world.size)
        self._reductions = []

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes. Collective."""
        if self.world.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total.div_(self.world.size)

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere. Collective."""
        if self.world.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def next_row(self, x: Tensor) -> Tensor:
        """The row that follows this process's slice `x` of a batch: the first of the next process's. Collective."""
        if self.world.size == 1:
            return x[:1]
        firsts = [torch.empty_like(x[:1]) for _ in range(self.world.size)]
        dist.all_gather(firsts, x[:1].contiguous())
        return firsts[(self.world.rank + 1) % self.world.size]

    def _shard(self, model: VisionTransformer, experts: Sequence[Experts], meshes: Meshes) -> None:
        """FSDP2: each block is a unit of its own, and so are split experts, whose shards lie in other groups."""
        axes = ("replicate", "shard") if self.layout.dp > 1 else ("shard",)
        own_axes = ("dp", "fsdp") if self.layout.dp > 1 else ("fsdp",)
        for module in experts:
            fully_shard(module, mesh=meshes.whole[own_axes], shard_placement_fn=lambda parameter: Shard(1))
            assert isinstance(module, FSDPModule)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_gradient_divide_factor(float(self.world.size))  # sums over the tokens of all ep processes
        scalars = {p for p in model.parameters() if p.dim() == 0}  # FSDP takes none: every process keeps them
        for module in (*model.blocks, model):
            fully_shard(module, mesh=meshes.dense[axes], ignored_params=scalars)
        register_fsdp_forward_method(model, "forward_features")

    def _average(self, parameters: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
        """Lets gradients that neither DDP nor FSDP averages be summed over a group as soon as they are there."""

        def reduce(parameter: Tensor) -> None:
            if self._last:
                assert parameter.grad is not None
                grad = local(parameter.grad)
                work = None if group is None else dist.all_reduce(grad, group=group, async_op=True)
                self._reductions.append((grad, work))

        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(reduce)


def split_experts(experts: Experts, meshes: Meshes) -> None:
    """Every process of the "ep" axis keeps its share of the experts."""
    mesh = meshes.whole["ep"]
    for linear in (experts.fc1, experts.fc2):
        for name, parameter in list(linear.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(linear, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    experts.exchange = ExpertExchange(mesh.get_group(), PARTS.get(mesh.device_type, 1))


def check(config: ModelConfig, layout: Layout) -> None:
    """ValueError where the layout does not fit the model."""
    experts = config.moe.num_experts if config.moe.layers else 0
    layout.check(num_experts=experts, widths=(config.hidden_size, config.mlp_dim))
