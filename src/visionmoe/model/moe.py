"""MoE layers: in the place of an MLP of the encoder, (B, T, D) -> (B, T, D)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from visionmoe.config import MoEConfig, RoutingSetting
from visionmoe.model.dispatch import run_buffers, run_segments
from visionmoe.model.experts import Experts
from visionmoe.model.gpu.choice import Dispatch, choose_dispatch
from visionmoe.model.gpu.grouped import run_grouped
from visionmoe.model.gpu.ops import run_triton
from visionmoe.model.packed import autocast
from visionmoe.model.router import Router
from visionmoe.model.routing import Routing
from visionmoe.model.soft import SoftRouter

RUNNERS: dict[Dispatch, Callable[[Tensor, Routing, Experts], Tensor]] = {
    "segments": run_segments,
    "buffers": run_buffers,
    "grouped": run_grouped,
    "triton": run_triton,
}


class MoEOutput(NamedTuple):
    """tokens (B, T, D), auxiliary_loss (), metrics of the layer by name."""

    tokens: Tensor
    auxiliary_loss: Tensor
    metrics: dict[str, Tensor]


class MoE(nn.Module):
    """A sparse layer: router, dispatch, experts (arXiv 2106.05974, section 2).

    setting: the routing in force, changed by `VisionTransformer.set_routing`.
    dispatch: "segments", "buffers", "grouped", "triton" (see `visionmoe.model.dispatch`), or "auto": segments on a CPU,
    buffers there under torch.compile; on a GPU the Triton kernels, else torch's grouped product, else buffers, as
    `gpu.choice` finds them. Experts that drop out, or are split over processes, run on buffers, those that are
    streamed from a file on segments.
    """

    def __init__(
        self, config: MoEConfig, layer: int, hidden_size: int, mlp_dim: int, *, approximate: str = "tanh"
    ) -> None:
        super().__init__()
        self.config = config
        self.setting: RoutingSetting = config.routing(layer)
        self.dispatch: Literal["auto"] | Dispatch = "auto"
        self.router = Router(config, hidden_size)
        self.experts = Experts(
            config.num_experts, hidden_size, mlp_dim, config.expert_dropout_rate, approximate=approximate
        )

    def reset_parameters(self) -> None:
        self.router.reset_parameters()
        self.experts.reset_parameters(self.config.split_rngs)

    def forward(self, x: Tensor) -> MoEOutput:
        """x: (B, T, D), with an ensemble (B*M, T, D), copies of an image adjacent."""
        groups = to_groups(x, self.config)
        routing, auxiliary_loss, metrics = self.router(groups, self.setting)
        tokens = autocast(groups.flatten(0, 1))  # once, before the gather, not for every expert
        out = RUNNERS[self._way(tokens)](tokens, routing, self.experts)
        return MoEOutput(from_groups(out, x.shape[1], self.config.ensemble_size), auxiliary_loss, metrics)

    def _way(self, tokens: Tensor) -> Dispatch:
        if self.experts.stream is not None:
            return "segments"
        if self.experts.exchange is not None or (self.training and self.config.expert_dropout_rate):
            return "buffers"
        if self.dispatch == "auto":
            return choose_dispatch(tokens, self.experts.fc1.bias.shape[1])
        return self.dispatch


class SoftMoE(nn.Module):
    """A Soft MoE layer (arXiv 2308.00951): the slots of all experts are dense mixtures of a group's tokens."""

    def __init__(
        self, config: MoEConfig, num_tokens: int, hidden_size: int, mlp_dim: int, *, approximate: str = "tanh"
    ) -> None:
        super().__init__()
        self.config = config
        self.router = SoftRouter(config, hidden_size, num_tokens)
        self.experts = Experts(
            config.num_experts, hidden_size, mlp_dim, config.expert_dropout_rate, approximate=approximate
        )

    def reset_parameters(self) -> None:
        self.router.reset_parameters()
        self.experts.reset_parameters(self.config.split_rngs)

    def forward(self, x: Tensor) -> MoEOutput:
        """x: (B, T, D)."""
        groups = to_groups(x, self.config)
        dispatch, combine, metrics = self.router(groups)
        tokens = autocast(groups)
        slots = torch.einsum("gsep,gsd->egpd", dispatch.to(tokens.dtype), tokens)
        out = self.experts(slots.flatten(1, 2))  # (E, G, P, D) -> (E, G*P, D)
        out = torch.einsum("gsep,egpd->gsd", combine.to(out.dtype), out.view_as(slots))
        zero = torch.zeros((), device=x.device)
        return MoEOutput(out.reshape(x.shape), zero, metrics | {"auxiliary_loss": zero})


def to_groups(x: Tensor, config: MoEConfig) -> Tensor:
    """Cuts all tokens of the batch into groups that are routed by themselves. (B*M, T, D) -> (G, S, D).

    With an ensemble, a group is ordered (image, token, member). ValueError when the group size does not divide.
    """
    images, tokens, dim = x.shape
    members = config.ensemble_size
    if members > 1:  # (B*M, T, D) -> (B, M, T, D) -> (B, T, M, D)
        x = x.view(images // members, members, tokens, dim).transpose(1, 2)
    total = images * tokens
    if config.group_size == "image" or (config.group_size == "batch" and config.router == "soft"):
        size = tokens * members
    elif config.group_size == "batch":
        size = total
    else:
        size = int(config.group_size)
    if total % size:
        raise ValueError(
            f"group_size must divide the number of tokens of a batch, got group_size={size} and {images} x {tokens} "
            f'= {total} tokens; group_size="batch" works for every batch'
        )
    return x.reshape(total // size, size, dim)


def from_groups(x: Tensor, tokens: int, members: int) -> Tensor:
    """The inverse of `to_groups`, from (G*S, D) to (B*M, T, D)."""
    if members > 1:
        x = x.view(-1, tokens, members, x.shape[-1]).transpose(1, 2)
    return x.reshape(-1, tokens, x.shape[-1])
