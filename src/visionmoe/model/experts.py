"""The experts of one MoE layer: E MLPs of the same shape, their weights stacked on axis 0."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionmoe.distributed.exchange import ExpertExchange
from visionmoe.distributed.tensors import local
from visionmoe.model.packed import PackedWeights
from visionmoe.model.streaming import ExpertStream


class ExpertLinear(nn.Module):
    """E linear layers. weight (E, out, in): `weight[e]` is a `torch.nn.Linear`'s weight; bias (E, out)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.packed = PackedWeights()

    @torch.no_grad()
    def reset_parameters(self, split_rngs: bool) -> None:
        """Xavier-uniform weights, normal(1e-6) biases; the same for all experts unless `split_rngs`."""
        for weight, bias in zip(self.weight, self.bias, strict=True):
            nn.init.xavier_uniform_(weight)
            nn.init.normal_(bias, std=1e-6)
        if not split_rngs:
            self.weight.copy_(self.weight[:1].expand_as(self.weight))
            self.bias.copy_(self.bias[:1].expand_as(self.bias))


class Experts(nn.Module):
    """E two-layer MLPs with GELU (arXiv 2106.05974, section 2.2). `visionmoe.model.dispatch` runs them.

    approximate: "tanh" or "none", the forms of GELU as torch names them.
    exchange: set where the experts are split over processes; the parameters are then DTensors.
    stream: of the weights where these stay in a file (`visionmoe.checkpoint.streaming`), None where they do not.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        mlp_dim: int,
        dropout_rate: float = 0.0,
        *,
        approximate: str = "tanh",
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = ExpertLinear(num_experts, hidden_size, mlp_dim)
        self.fc2 = ExpertLinear(num_experts, mlp_dim, hidden_size)
        self.dropout = nn.Dropout(dropout_rate)
        self.exchange: ExpertExchange | None = None
        self.stream: ExpertStream | None = None

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """As torch's (`to`, `float`, ...); weights that have become others are in memory, and no longer streamed."""
        super()._apply(fn, recurse)
        if self.stream is not None and not self.stream.serves(self.fc1.weight, self.fc2.weight):
            self.stream = None
        return self

    def reset_parameters(self, split_rngs: bool) -> None:
        self.fc1.reset_parameters(split_rngs)
        self.fc2.reset_parameters(split_rngs)

    def forward(self, rows: Tensor) -> Tensor:
        """Every expert on its own N rows. (E, N, D) -> (E, N, D)."""
        if self.exchange is not None:
            return self.exchange(rows, self._run, equal=self.training)
        if self.stream is not None:
            return self._streamed(rows, self.stream)
        return self._run(rows, slice(None))

    def _run(self, rows: Tensor, own: slice) -> Tensor:
        """Some of the experts that this process holds. (e, N, D) -> (e, N, D)."""
        weight1, bias1, weight2, bias2 = (
            local(p)[own] for p in (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        )
        hidden = torch.matmul(rows, weight1.transpose(1, 2)) + bias1[:, None]
        hidden = self.dropout(F.gelu(hidden, approximate=self.approximate))
        return self.dropout(torch.matmul(hidden, weight2.transpose(1, 2)) + bias2[:, None])

    def _streamed(self, rows: Tensor, stream: ExpertStream) -> Tensor:
        out = torch.empty_like(rows)
        for expert, first, second in stream.run([rows.shape[1]] * len(rows), rows):
            hidden = torch.matmul(rows[expert], first.to(rows.dtype).t()) + self.fc1.bias[expert].to(rows.dtype)
            hidden = F.gelu(hidden, approximate=self.approximate)
            out[expert] = torch.matmul(hidden, second.to(rows.dtype).t()) + self.fc2.bias[expert].to(rows.dtype)
        return out
