"""The dense MLP that layers are compared with: plain, with oneDNN's packed weights, and per expert."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmoe.model.packed import available, linear, pack
from visionmoe.model.segments import ROWS

Call = Callable[[], Any]


def can_pack(device: torch.device) -> bool:
    """Whether oneDNN's linear layer with packed weights and GELU inside it is there."""
    return device.type == "cpu" and available()


def mlp_parameters(hidden_size: int, mlp_dim: int, like: Tensor) -> list[Tensor]:
    """Weights and biases of an MLP, D -> F -> D, of fixed random values, with the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((mlp_dim, hidden_size), (mlp_dim,), (hidden_size, mlp_dim), (hidden_size,))
    return [(0.02 * torch.randn(shape, generator=generator)).to(like) for shape in shapes]


def mlp(rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """F.linear, GELU (tanh), F.linear. (N, D) -> (N, D)."""
    weight1, bias1, weight2, bias2 = parameters
    return F.linear(F.gelu(F.linear(rows, weight1, bias1), approximate="tanh"), weight2, bias2)


def packed(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The same with the weights in oneDNN's own layout, for `packed_mlp`."""
    return [pack(p.detach()) if p.ndim == 2 else p.detach() for p in parameters]


def packed_mlp(rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """oneDNN's linear layers with packed weights, GELU inside the first. (N, D) -> (N, D)."""
    weight1, bias1, weight2, bias2 = parameters
    return linear(linear(rows, weight1, bias1, "tanh"), weight2, bias2)


def per_expert(hidden_size: int, counts: Sequence[int], parameters: Sequence[Sequence[Tensor]]) -> Call:
    """A call that makes every expert's two products on contiguous rows of its own, and nothing else.

    counts: rows of each expert, which are filled up to a multiple of ROWS as the layer does. parameters: of each
    expert. With packed weights where oneDNN has them: the fastest way to make these products.
    """
    like = parameters[0][0]
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(-(-n // ROWS) * ROWS, hidden_size, generator=generator).to(like) for n in counts if n]
    used = [own for n, own in zip(counts, parameters, strict=True) if n]
    run = packed_mlp if can_pack(like.device) else mlp
    weights = [packed(own) for own in used] if run is packed_mlp else used

    @torch.no_grad()
    def call() -> None:
        for own, weight in zip(rows, weights, strict=True):
            run(own, weight)

    return call
