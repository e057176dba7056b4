"""What the peers have in common: the work, and how one says that it is not there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class MissingError(Exception):
    """A peer that cannot run here; the message says what to do."""


@dataclass(frozen=True)
class LayerWork:
    """One MoE layer without dropped requests: every peer gets these tensors and gives the same numbers.

    tokens (N, D); gate (E, D) float32; up (E, F, D), up_bias (E, F); down (E, D, F), down_bias (E, D). Routing:
    softmax of the gate's logits in float32, the best K probabilities as weights, not renormalised; GELU (tanh).
    """

    tokens: Tensor
    gate: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    num_selected_experts: int

    @property
    def num_experts(self) -> int:
        return len(self.gate)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.gate, self.up, self.up_bias, self.down, self.down_bias]

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Weights (N, K) and experts (N, K) of every token: the router that a user would write."""
        logits = torch.nn.functional.linear(self.tokens.float(), self.gate)
        return torch.softmax(logits, dim=-1).topk(self.num_selected_experts, dim=-1)


# name -> a call that returns the layer's output (N, D): a tensor, or what `as_tensor` of its module turns into one
LayerCalls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class ImageWork:
    """Dense ViT-B/16 on images (B, 3, 224, 224) in [-1, 1]."""

    images: Tensor
    dtype: torch.dtype
    threads: int
