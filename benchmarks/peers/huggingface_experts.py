"""The experts implementations of Hugging Face transformers: eager, batched_mm, grouped_mm.

The experts are a module of the form that transformers' own models have, given to its decorator; `eager` is the loop
that its models carry as their forward.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from common import LayerCalls, LayerWork, MissingError
from torch import Tensor, nn

INSTALL = "pip install 'transformers>=5'"
GRADIENTS = True
MAX_GATHERED_BYTES = 4 << 30  # batched_mm gathers a weight matrix for every request


def layer_calls(work: LayerWork) -> LayerCalls:
    try:
        from transformers.integrations.moe import use_experts_implementation
    except ImportError as error:
        raise MissingError(f"not installed: {INSTALL} ({error})") from None
    decorated = use_experts_implementation(has_gate=False, has_bias=True)(_experts_class())

    def call_of(name: str) -> Any:
        experts = decorated(SimpleNamespace(_experts_implementation=name, work=work))

        def call() -> Tensor:
            weights, chosen = work.chosen()
            return experts(work.tokens, chosen, weights.to(work.tokens.dtype))

        return call

    names = ["eager", "grouped_mm"]
    requests = len(work.tokens) * work.num_selected_experts
    gathered = requests * work.up[0].numel() * work.up.element_size()
    if gathered <= MAX_GATHERED_BYTES:
        names.append("batched_mm")
    else:
        print(f"  transformers batched_mm left out: it would gather {gathered / 2**30:.1f} GiB of weights per product")
    return {f"transformers {name}": call_of(name) for name in names}


def _experts_class() -> type[nn.Module]:
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            work = config.work
            self.num_experts = work.num_experts
            # the work's own tensors, so that gradients arrive there
            self.up_proj, self.up_proj_bias = work.up, work.up_bias
            self.down_proj, self.down_proj_bias = work.down, work.down_bias
            self.act_fn = nn.GELU(approximate="tanh")

        def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(tokens)
            for expert in range(self.num_experts):
                token, rank = torch.where(chosen == expert)
                if len(token):
                    hidden = self.act_fn(F.linear(tokens[token], self.up_proj[expert], self.up_proj_bias[expert]))
                    rows = F.linear(hidden, self.down_proj[expert], self.down_proj_bias[expert])
                    out.index_add_(0, token, rows * weights[token, rank, None])
            return out

    return Experts
