"""Experts on contiguous segments: gather, MLP, weighted scatter, expert by expert while the rows are in the cache.

An autograd function of its own, because the plain graph (one slice of the stacked weights per expert) would add and
copy whole stacks of gradients. Here every expert's gradient is written once, in its place.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segments(NamedTuple):
    """Kept requests sorted by expert: token (R,), their place among the tokens; counts (E,), requests per expert."""

    token: Tensor
    counts: list[int]

    def runs(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yields (expert, slice of the requests, their tokens) for the experts that have requests."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count), self.token[start : start + count]
            start += count


class SegmentExperts(torch.autograd.Function):
    """sum over kept requests of weight * MLP_expert(token): (tokens (N, D), weights (R,), ...) -> (N, D).

    weights are those of the kept requests in the order of `segments`. Computed in the dtype of `tokens`.
    approximate: the form of GELU, "tanh" or "none".
    keep: whether a backward pass may follow; what it needs is saved only then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        segments: Segments,
        approximate: str,
        keep: bool,
        *parameters: Tensor,
    ) -> Tensor:
        out = torch.zeros_like(tokens)
        saved: list[Tensor] = []
        for expert, requests, token in segments.runs():
            weight1, bias1, weight2, bias2 = _of_expert(parameters, expert, tokens.dtype)
            rows = tokens.index_select(0, token)
            before = F.linear(rows, weight1, bias1)
            hidden = F.gelu(before, approximate=approximate)
            result = F.linear(hidden, weight2, bias2)
            out.index_add_(0, token, result * weights[requests, None].to(result.dtype))
            if keep:
                saved += [before, hidden, result]
        if keep:
            ctx.segments, ctx.approximate = segments, approximate
            ctx.save_for_backward(tokens, weights, *parameters, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, *rest = ctx.saved_tensors
        parameters, saved = rest[:4], rest[4:]
        wanted = ctx.needs_input_grad[5:]
        grads = [torch.zeros_like(p) if w else None for p, w in zip(parameters, wanted, strict=True)]
        grad_tokens, grad_weights = torch.zeros_like(tokens), torch.zeros_like(weights)
        for i, (expert, requests, token) in enumerate(ctx.segments.runs()):
            before, hidden, result = saved[3 * i : 3 * i + 3]
            weight1, _, weight2, _ = _of_expert(parameters, expert, tokens.dtype)
            grad_out = grad.index_select(0, token)
            grad_weights[requests] = (grad_out * result).sum(dim=1, dtype=weights.dtype)
            grad_out *= weights[requests, None].to(grad_out.dtype)
            grad_before = torch.ops.aten.gelu_backward(grad_out @ weight2, before, approximate=ctx.approximate)
            _store(grads[2:], expert, grad_out, hidden)
            if grads[0] is not None or grads[1] is not None:
                _store(grads[:2], expert, grad_before, tokens.index_select(0, token))
            grad_tokens.index_add_(0, token, grad_before @ weight1)
        return grad_tokens, grad_weights, None, None, None, *grads


def _of_expert(parameters: Any, expert: int, dtype: torch.dtype) -> list[Tensor]:
    return [parameter[expert].to(dtype) for parameter in parameters]


def _store(grads: list[Tensor | None], expert: int, grad_out: Tensor, rows: Tensor) -> None:
    """Writes the gradients of one expert's linear layer, out = rows @ weight.T + bias, in their places."""
    weight, bias = grads
    if weight is not None and weight.dtype == rows.dtype:
        torch.mm(grad_out.t(), rows, out=weight[expert])
    elif weight is not None:
        weight[expert] = grad_out.t() @ rows
    if bias is not None:
        bias[expert] = grad_out.sum(dim=0)
