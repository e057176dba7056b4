"""The experts by torch's own grouped product, on the schedule of the Triton kernels, where those cannot run.

`torch.nn.functional.grouped_mm` leaves rows behind the last offset as the memory was, in both passes: they are set to
0 before and behind each product. Its products take no bias; the rows' biases are a product with their one-hot experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from visionmoe.model.experts import ExpertLinear, Experts
from visionmoe.model.gpu.schedule import make_schedule
from visionmoe.model.routing import Routing


def run_grouped(tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Weighted sum of each token's kept experts; 0 for a token with none. (N, D) -> (N, D), N = G*S.

    Needs D and F whose rows are multiples of 16 bytes.
    """
    offsets, token, weights, _ = make_schedule(routing)
    number = torch.arange(len(token), dtype=torch.int32, device=token.device)
    expert = torch.bucketize(number, offsets[1:], right=True)  # E for unused rows
    one_hot = (expert[:, None] == torch.arange(routing.num_experts, device=token.device)).to(tokens.dtype)
    hidden = F.gelu(
        _linear(tokens.index_select(0, token), experts.fc1, offsets, one_hot), approximate=experts.approximate
    )
    rows = _linear(hidden, experts.fc2, offsets, one_hot) * weights[:, None].to(tokens.dtype)
    return torch.zeros_like(tokens).index_add(0, token, rows)


def _linear(rows: Tensor, linear: ExpertLinear, offsets: Tensor, one_hot: Tensor) -> Tensor:
    """Each row times its own expert's weights, plus its bias; 0 for unused rows. (P, in) -> (P, out)."""
    used = (torch.arange(len(rows), device=rows.device) < offsets[-1])[:, None]
    weight = linear.weight.to(rows.dtype).transpose(1, 2)
    product = F.grouped_mm(torch.where(used, rows, 0.0), weight, offs=offsets[1:])
    return torch.where(used, product, 0.0) + one_hot @ linear.bias.to(rows.dtype)


def _grouped_flops(a_shape: Sequence[int], b_shape: Sequence[int], *rest: Any, **options: Any) -> int:
    """(P, K) by (E, K, N), or sums over rows, (M, P) by (P, N): unused rows count, as the routing setting pays them."""
    matrices = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
    return 2 * matrices * a_shape[-2] * a_shape[-1] * b_shape[-1]


_GROUPED: Any = getattr(torch.ops.aten, "_grouped_mm", None)
if _GROUPED is not None and _GROUPED not in flop_registry:
    register_flop_formula(_GROUPED)(_grouped_flops)  # so that torch's FlopCounterMode sees the experts
