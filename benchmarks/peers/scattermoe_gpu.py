"""ScatterMoE's fused scatter-gather products (Triton), on a GPU alone."""

import torch
from common import LayerCalls, LayerWork, MissingError
from torch import nn

INSTALL = "pip install git+https://github.com/shawntan/scattermoe"
GRADIENTS = True


def layer_calls(work: LayerWork) -> LayerCalls:
    if work.tokens.device.type != "cuda":
        raise MissingError("runs on a GPU alone")
    try:
        from scattermoe.mlp import MLP
    except ImportError as error:
        raise MissingError(f"not installed: {INSTALL} ({error})") from None
    experts, width, dim = work.up.shape
    mlp = MLP(
        input_size=dim,
        hidden_size=width,
        activation=nn.GELU(approximate="tanh"),
        num_experts=experts,
        top_k=work.num_selected_experts,
        bias=False,
    ).to(work.tokens)
    with torch.no_grad():
        mlp.experts.weight.copy_(work.up)
        mlp.output_experts.weight.copy_(work.down)

    def call() -> torch.Tensor:
        weights, chosen = work.chosen()
        return mlp(work.tokens, weights.to(work.tokens.dtype), chosen)

    return {"ScatterMoE (no biases)": call}
