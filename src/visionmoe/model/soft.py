"""Soft MoE (arXiv 2308.00951): every expert slot holds a weighted mean of all tokens of a group."""

import torch
from torch import Tensor, nn

from visionmoe.config import MoEConfig
from visionmoe.model.noise import normal_like
from visionmoe.model.routing import compute_capacity


class SoftRouter(nn.Module):
    """Dispatch and combine weights from the likeness of tokens and learned slots.

    Parameters: mu (E, P, D), the slots, and `scale` (). Computed in float32 whatever the dtype of the model.
    first_token: as the Router's.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        self.config = config
        slots = slots_per_expert(config, num_tokens)
        self.mu = nn.Parameter(torch.empty(config.num_experts, slots, hidden_size))
        self.scale = nn.Parameter(torch.empty(()))
        self.first_token: Tensor | int = 0

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mu, std=self.mu[0].numel() ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x: (G, S, D). Returns dispatch (softmax over tokens) and combine (over slots), (G, S, E, P), and metrics."""
        with torch.autocast(x.device.type, enabled=False):
            slots = _unit(self.mu.float()) * self.scale.float()
            logits = torch.einsum("gsd,epd->gsep", _unit(x.float()), slots)
            if self.training and self.config.router_noise:
                noise = normal_like(logits, x.shape[0] * x.shape[1], self.first_token)
                logits = logits + self.config.router_noise * noise
            dispatch = torch.softmax(logits, dim=1)
            combine = torch.softmax(logits.flatten(2), dim=-1).view_as(logits)
        metrics = {
            "combine_weights_min_mean": combine.amin(dim=(2, 3)).mean(),
            "combine_weights_max_mean": combine.amax(dim=(2, 3)).mean(),
            "dispatch_weights_min_mean": dispatch.amin(dim=1).mean(),
            "dispatch_weights_max_mean": dispatch.amax(dim=1).mean(),
        }
        return dispatch, combine, {k: v.detach() for k, v in metrics.items()}


def slots_per_expert(config: MoEConfig, num_tokens: int) -> int:
    """P, as given or from the capacity of a group; num_tokens: of one image, the group unless a size is set."""
    group = num_tokens if isinstance(config.group_size, str) else config.group_size
    rounding = config.capacity_ceil_or_round, config.capacity_multiple_of
    return config.num_slots or compute_capacity(group, config.num_experts, config.capacity_factor, *rounding)


def _unit(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)
