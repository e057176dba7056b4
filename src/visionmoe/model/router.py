"""The routers that hold parameters: logits, noise, losses, and the call of the pure routing functions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionmoe.config import MoEConfig, RoutingSetting
from visionmoe.model import routing
from visionmoe.model.noise import normal_like
from visionmoe.model.routing import Routing

CAST_TOKENS = 256  # that are cast to float32 at a time


class Router(nn.Module):
    """Noisy top-K router, optionally of an ensemble (arXiv 2106.05974 section 2.2, 2110.03360), or expert choice.

    All of it is computed in float32, whatever the dtype of the model. With M ensemble members the tokens of a group
    are ordered (token, member), member m has the experts m*E/M ... (m+1)*E/M-1 and its rows of `gate.weight` (E, D).
    first_token: number in the global batch of the first token that the next call gets (see `noise.normal_like`).
    """

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.first_token: Tensor | int = 0

    def reset_parameters(self) -> None:
        lecun_normal_(self.gate.weight, fan_in=self.gate.in_features)

    def forward(self, x: Tensor, setting: RoutingSetting) -> tuple[Routing, Tensor, dict[str, Tensor]]:
        """x: (G, S, D). Returns the routing, the auxiliary loss () and metrics; losses per group (and member)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self._logits(x)  # (G, M, S/M, E/M)
            noise_std = self.config.router_noise / logits.shape[-1] if self.training else 0.0
            noisy = logits
            if noise_std:
                noisy = logits + noise_std * normal_like(logits, x.shape[0] * x.shape[1], self.first_token)
            probs = torch.softmax(noisy, dim=-1)
            losses = self._losses(logits, noisy, probs, noise_std, setting.num_selected_experts)
            result = self._route(probs, setting)
            losses["auxiliary_loss"] = self._weighted(losses, logits)
        metrics = {name: loss.detach() for name, loss in losses.items()} | _health(result, probs)
        return result, losses["auxiliary_loss"].mean(), metrics

    def probabilities(self, x: Tensor) -> Tensor:
        """Noise-free probabilities of each member's own experts. (G, S, D) -> (G, M, S/M, E/M)."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.softmax(self._logits(x), dim=-1)

    def _logits(self, x: Tensor) -> Tensor:
        """(G, S, D) -> (G, M, S/M, E/M); without an ensemble M is 1."""
        groups, size, dim = x.shape
        members = self.config.ensemble_size
        if size % members:
            raise ValueError(f"group_size must be a multiple of ensemble_size {members}, got {size}")
        weight = self.gate.weight.float()
        if members == 1:
            return _product(x, weight)[:, None]
        x = x.float().view(groups, size // members, members, dim)
        return torch.einsum("gsmd,med->gmse", x, weight.view(members, -1, dim))

    def _losses(self, logits: Tensor, noisy: Tensor, probs: Tensor, noise_std: float, k: int) -> dict[str, Tensor]:
        """Each loss as (G,), or (G, M) with an ensemble."""
        if self.config.router == "expert_choice":
            return {}
        flat = [t.flatten(0, 1) for t in (logits, noisy, probs)]  # (G, M, S/M, E/M) -> (G*M, S/M, E/M)
        losses = {
            "importance_loss": routing.importance_loss(flat[0]) if noise_std else routing.importance_loss_of(flat[2]),
            "gshard_loss": routing.gshard_loss(flat[2]),
        }
        if noise_std:
            losses["load_loss"] = routing.load_loss(flat[0], flat[1], noise_std, k)
        return {name: loss.view(self._loss_shape(logits)) for name, loss in losses.items()}

    def _loss_shape(self, logits: Tensor) -> torch.Size:
        return logits.shape[:2] if self.config.ensemble_size > 1 else logits.shape[:1]

    def _weighted(self, losses: dict[str, Tensor], logits: Tensor) -> Tensor:
        """Sum of weight * loss, (G,) or (G, M); a weight of 0 leaves the loss and its NaN gradients, if any, out."""
        weights = {name: getattr(self.config, f"{name}_weight") for name in losses}
        start = logits.new_zeros(self._loss_shape(logits))
        return sum((losses[name] * weight for name, weight in weights.items() if weight > 0), start=start)

    def _route(self, probs: Tensor, setting: RoutingSetting) -> Routing:
        _, members, size, experts = probs.shape
        config = self.config
        expert_choice = config.router == "expert_choice"
        capacity = routing.compute_capacity(
            num_tokens=size * members * (1 if expert_choice else setting.num_selected_experts),
            num_experts=experts * members,
            capacity_factor=setting.capacity_factor,
            ceil_or_round=config.capacity_ceil_or_round,
            multiple_of=config.capacity_multiple_of,
        )
        if expert_choice:
            result = routing.expert_choice_routing(probs.squeeze(1), capacity)
        else:
            result = routing.top_k_routing(
                probs.flatten(0, 1), setting.num_selected_experts, capacity, setting.batch_priority
            )
            result = result if members == 1 else _merge_members(result, members)
        return routing.normalize_combine_weights(result) if config.normalize_combine_weights else result


def _merge_members(single: Routing, members: int) -> Routing:
    """Routings of single members (G*M groups of S/M tokens) as one of G groups, tokens ordered (token, member)."""
    k = single.token_index.shape[1] // single.num_tokens

    def merged(x: Tensor) -> Tensor:  # (G*M, S/M*K) -> (G, S/M, M, K) -> (G, S*K)
        return x.reshape(-1, members, single.num_tokens, k).transpose(1, 2).reshape(-1, members * single.num_tokens * k)

    member = torch.arange(members, device=single.kept.device).repeat(len(single.token_index) // members)[:, None]
    return Routing(
        token_index=merged(single.token_index * members + member),
        expert_index=merged(single.expert_index + member * single.num_experts),
        buffer_index=merged(single.buffer_index),
        combine_weights=merged(single.combine_weights),
        num_tokens=single.num_tokens * members,
        num_experts=single.num_experts * members,
        capacity=single.capacity,
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32, whatever the dtype of x. (G, S, D), (E, D) -> (G, S, E).

    In inference on a CPU other dtypes are cast part by part, so that the product finds the part in the cache.
    """
    whole = x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or x.dtype == torch.float32:
        return F.linear(x.float(), weight)
    parts = [F.linear(part.float(), weight) for part in x.flatten(0, 1).split(CAST_TOKENS)]
    return torch.cat(parts).view(*x.shape[:2], -1)


def _health(result: Routing, probs: Tensor) -> dict[str, Tensor]:
    """How the router is doing: load per expert (E,), dropped share (), mean entropy in nats ()."""
    entropy = torch.special.entr(probs.detach()).sum(dim=-1).mean()
    return {"expert_load": result.expert_load(), "dropped": result.dropped(), "entropy": entropy}


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Truncated normal of variance 1 / fan_in, flax's default for kernels."""
    std = math.sqrt(1 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
