"""The experts as two operators of torch, forward and backward, for autograd, torch.compile and FLOP counters.

Saved for the backward pass: the tokens (N, D), the values before GELU (P, F), the combine weights and the schedule. A
dense MLP saves its input, the values before GELU and those behind it, D + 2F per token. With K = 2 there are at most
P = 2N rows, so D + 2F per token here: the factor is 1.0, where saving both would make it 1.9. What is recomputed is
GELU alone, inside a product that reads the values anyway, and the weights in the products' dtype.

The combine weight multiplies the hidden row, not the result: its product with the gradient then is the gradient of
W2 as it stands, and the results of the experts are neither saved nor computed again.

Nothing here imports Triton before an operator runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionmoe.model.experts import Experts
from visionmoe.model.gpu.schedule import make_schedule
from visionmoe.model.routing import Routing


def run_triton(tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Weighted sum of each token's kept experts; 0 for a token with none. (N, D) -> (N, D), N = G*S."""
    parameters = (experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias)
    offsets, token, weights, table = make_schedule(routing)
    inputs = (tokens, weights, *parameters)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    tanh = experts.approximate == "tanh"
    return experts_forward(tokens, weights, *parameters, offsets, token, table, tanh, save)[0]


@torch.library.custom_op("visionmoe::experts_forward", mutates_args=())
def experts_forward(
    tokens: Tensor,
    weights: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    token: Tensor,
    table: Tensor,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Output (N, D), and the values before GELU (P, F), or (0, F) unless `save`.

    tokens (N, D); weight1 (E, F, D), bias1 (E, F), weight2 (E, D, F), bias2 (E, D); the rest as in
    `schedule.Schedule`. Computed in the dtype of `tokens` with float32 sums.
    """
    from visionmoe.model.gpu import launch

    tokens = tokens.contiguous()
    rows = launch.Rows(*(x.contiguous() for x in (offsets, token, weights, table)))
    if not len(token):
        return torch.zeros_like(tokens), tokens.new_empty(0, weight1.shape[1])
    hidden, before = launch.first(tokens, rows, _cast(weight1, tokens), bias1.contiguous(), tanh, save)
    out = launch.second(hidden, rows, _cast(weight2, tokens), bias2.contiguous(), out_features_last=False)
    return launch.combine(out, rows), before


@experts_forward.register_fake
def _(
    tokens: Tensor, weights: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    offsets: Tensor, token: Tensor, table: Tensor, tanh: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return tokens.new_empty(tokens.shape), tokens.new_empty(token.shape[0] if save else 0, weight1.shape[1])


@torch.library.custom_op("visionmoe::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    token: Tensor,
    table: Tensor,
    before: Tensor,
    tanh: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the first six inputs of `experts_forward`; empty ones where not `wanted`. grad (N, D)."""
    from visionmoe.model.gpu import launch

    parameters = (weight1, bias1, weight2, bias2)
    if not len(token):
        return [torch.zeros_like(x) for x in (tokens, weights, *parameters)]
    grad, tokens = grad.contiguous(), tokens.contiguous()
    rows = launch.Rows(*(x.contiguous() for x in (offsets, token, weights, table)))
    made = launch.first_backward(grad, rows, _cast(weight2, tokens), bias2.contiguous(), before.contiguous(), tanh)

    def tokens_gradient() -> Tensor:
        values = launch.second(made.grad_before, rows, _cast(weight1, tokens), None, out_features_last=True)
        return launch.combine(values, rows)

    makers = (
        tokens_gradient,
        lambda: made.grad_weights,
        lambda: launch.weight_gradient(made.grad_before, tokens, rows, "b", weight1.dtype),
        lambda: launch.sum_units(made.bias1_sums, rows, bias1.dtype),
        lambda: launch.weight_gradient(grad, made.hidden, rows, "a", weight2.dtype),
        lambda: launch.sum_units(made.bias2_sums, rows, bias2.dtype),
    )
    return [make() if want else grad.new_empty(0) for make, want in zip(makers, wanted, strict=True)]


@experts_backward.register_fake
def _(
    grad: Tensor, tokens: Tensor, weights: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    offsets: Tensor, token: Tensor, table: Tensor, before: Tensor, tanh: bool, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (tokens, weights, weight1, bias1, weight2, bias2)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else grad.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, tanh, save = inputs
    assert save, "experts_forward was called without `save`, so it has no backward pass"
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.tanh = tanh


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = [bool(want) for want in ctx.needs_input_grad[:6]]
    grads = experts_backward(grad, *ctx.saved_tensors, ctx.tanh, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None, None, None


experts_forward.register_autograd(_backward, setup_context=_setup_context)


def _cast(weight: Tensor, tokens: Tensor) -> Tensor:
    """The weights in the dtype of the products, contiguous; themselves where they are so already."""
    return weight.to(tokens.dtype).contiguous()


def _product_flops(token_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Of one product over all P rows: what the routing setting pays for."""
    return 2 * token_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.visionmoe.experts_forward)
def _forward_flops(
    tokens: Any, weights: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, offsets: Any, token: Any, *rest: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    return 2 * _product_flops(token, weight1)


@register_flop_formula(torch.ops.visionmoe.experts_backward)
def _backward_flops(
    grad: Any, tokens: Any, weights: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, offsets: Any, token: Any,
    table: Any, before: Any, tanh: bool, wanted: Sequence[bool], *rest: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    products = 1 + wanted[0] + wanted[2] + wanted[4]  # before GELU, tokens, weight1, weight2
    return products * _product_flops(token, weight1)
