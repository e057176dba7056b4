"""Experts on contiguous segments: gather, MLP, weighted scatter, expert by expert while the rows are in the cache.

An autograd function of its own, because the plain graph (one slice of the stacked weights per expert) would add and
copy whole stacks of gradients. Here every expert's gradient is written once, in its place.

On a CPU in bfloat16, oneDNN builds a kernel for every new number of rows, which takes longer than to run it. Rows
are therefore filled up to a multiple of ROWS; what the fillers yield is cut off.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmoe.model.cpu_training import gelu, left_factor
from visionmoe.model.packed import linear
from visionmoe.model.routing import Routing

ROWS = 16


class Kept(NamedTuple):
    """Kept requests in the order of a Routing (G groups of S tokens).

    request: (R,) which of the G*R requests; token: (R,) below G*S; expert: (R,); place: (R,) counts the requests of an
    expert from 0, group by group; counts: E ints, requests per expert.
    """

    request: Tensor
    token: Tensor
    expert: Tensor
    place: Tensor
    counts: list[int]

    @classmethod
    def of(cls, routing: Routing) -> "Kept":
        """Waits for the device: the host must know the counts."""
        groups = len(routing.token_index)
        request = routing.kept.view(-1).nonzero().squeeze(1)
        expert, place = (
            index.reshape(-1).index_select(0, request) for index in (routing.expert_index, routing.buffer_index)
        )
        token = flat_tokens(routing) if groups > 1 else routing.token_index
        token = token.view(-1).index_select(0, request)
        run = expert * groups + request // routing.token_index.shape[1] if groups > 1 else expert  # of (E, G)
        counts = torch.bincount(run, minlength=routing.num_experts * groups).view(-1, groups)  # (E, G)
        if groups > 1:  # buffers are filled from place 0 on
            place = place + (counts.cumsum(1) - counts).view(-1).index_select(0, run)
        return cls(request, token, expert, place, counts.sum(dim=1).tolist())

    def positions(self, sizes: Sequence[int]) -> Tensor:
        """(R,) the row of each request where expert e has sizes[e] rows, one expert's behind the other's."""
        starts = torch.tensor([0, *itertools.accumulate(sizes[:-1])], device=self.expert.device)
        return starts.index_select(0, self.expert) + self.place


def flat_tokens(routing: Routing) -> Tensor:
    """Each request's token in the whole batch. (G, R) -> (G, R) with values below G*S."""
    group = torch.arange(len(routing.token_index), device=routing.token_index.device)[:, None]
    return routing.token_index + group * routing.num_tokens


class Segments(NamedTuple):
    """Kept requests sorted by expert: token (R,), which of the tokens; counts, requests per expert."""

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
    approximate: the form of GELU, "tanh" or "none". `inference.infer_segments` is the same without a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        segments: Segments,
        approximate: str,
        *parameters: Tensor,
    ) -> Tensor:
        out = torch.zeros_like(tokens)
        saved: list[Tensor] = []
        for expert, requests, token in segments.runs():
            weight1, bias1, weight2, bias2 = (parameter[expert].to(tokens.dtype) for parameter in parameters)
            before = linear(tokens.index_select(0, _filled(token, tokens)), weight1, bias1)
            hidden = gelu(before, approximate)
            result = linear(hidden, weight2, bias2)[: len(token)]
            out.index_add_(0, token, result * weights[requests, None].to(result.dtype))
            saved += [before, hidden, result, weight1, weight2]
        ctx.segments, ctx.approximate = segments, approximate
        ctx.save_for_backward(tokens, weights, *parameters, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, *rest = ctx.saved_tensors
        parameters, saved = rest[:4], rest[4:]
        wanted = ctx.needs_input_grad[4:]
        grads = [
            _empty_gradient(p, ctx.segments.counts) if w else None for p, w in zip(parameters, wanted, strict=True)
        ]
        grad_tokens, grad_weights = torch.zeros_like(tokens), torch.zeros_like(weights)
        for i, (expert, requests, token) in enumerate(ctx.segments.runs()):
            before, hidden, result, weight1, weight2 = saved[5 * i : 5 * i + 5]
            filled, count = _filled(token, tokens), len(token)
            grad_out = grad.index_select(0, filled)
            grad_out[count:] = 0
            grad_weights[requests] = (grad_out[:count] * result).sum(dim=1, dtype=weights.dtype)
            grad_out[:count] *= weights[requests, None].to(grad_out.dtype)
            grad_before = torch.ops.aten.gelu_backward(grad_out @ weight2, before, approximate=ctx.approximate)
            _store(grads[2:], expert, grad_out, hidden)
            if grads[0] is not None or grads[1] is not None:
                _store(grads[:2], expert, grad_before, tokens.index_select(0, filled))
            grad_tokens.index_add_(0, token, (grad_before @ weight1)[:count])
        return grad_tokens, grad_weights, None, None, *grads


def _filled(token: Tensor, tokens: Tensor) -> Tensor:
    """Token indices (R,), with token 0 behind them up to a multiple of ROWS where oneDNN makes the products."""
    fills = tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16
    return F.pad(token, (0, -len(token) % ROWS)) if fills else token


def _empty_gradient(parameter: Tensor, counts: list[int]) -> Tensor:
    """Memory for a stacked gradient, zero for the experts that have no requests."""
    grad = torch.empty_like(parameter)
    for expert, count in enumerate(counts):
        if not count:
            grad[expert].zero_()
    return grad


def _store(grads: list[Tensor | None], expert: int, grad_out: Tensor, rows: Tensor) -> None:
    """Writes the gradients of one expert's linear layer, out = rows @ weight.T + bias, in their places."""
    weight, bias = grads
    if weight is not None:
        left = left_factor(grad_out)
        if weight.dtype == rows.dtype:
            torch.mm(left, rows, out=weight[expert])
        else:
            weight[expert] = left @ rows
    if bias is not None:
        bias[expert] = grad_out.sum(dim=0)
