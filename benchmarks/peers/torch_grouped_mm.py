"""torch.nn.functional.grouped_mm as torchtitan uses it: sort by expert, offsets, two grouped products, scatter-add."""

import torch
import torch.nn.functional as F
from common import LayerCalls, LayerWork, MissingError

INSTALL = "pip install 'torch>=2.10'"
GRADIENTS = True


def layer_calls(work: LayerWork) -> LayerCalls:
    if not hasattr(F, "grouped_mm"):
        raise MissingError(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm: {INSTALL}")

    def call() -> torch.Tensor:
        weights, experts = work.chosen()
        chosen = experts.view(-1)
        order = torch.argsort(chosen, stable=True)
        token = order // work.num_selected_experts
        counts = torch.bincount(chosen, minlength=work.num_experts)
        offsets = counts.cumsum(0).to(torch.int32)
        expert = chosen[order]
        rows = work.tokens[token]
        hidden = F.grouped_mm(rows, work.up.transpose(1, 2), offs=offsets) + work.up_bias[expert]
        out = F.grouped_mm(F.gelu(hidden, approximate="tanh"), work.down.transpose(1, 2), offs=offsets)
        out = (out + work.down_bias[expert]) * weights.view(-1)[order, None].to(out.dtype)
        return torch.zeros_like(work.tokens).index_add(0, token, out)

    return {"torch grouped_mm (as in torchtitan)": call}
