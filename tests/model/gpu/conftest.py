"""For the tests of the GPU path: which of them run here, and the plain way to compare with.

The kernels' own tests run on a CUDA device, or through Triton's interpreter, which must be chosen before Triton is
first imported: `test_interpreter.py` starts a process of its own for them. Elsewhere they are not collected.
"""

import copy
import dataclasses
import os
from dataclasses import dataclass

import pytest
import torch

from visionmoe.model.experts import Experts
from visionmoe.model.routing import Routing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["test_kernels.py"]


def run_plain(tokens: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
    """Every expert on every token, weighted by the dense combine weights. (N, D) -> (N, D)."""
    _, combine = routing.to_dense()
    weights = combine.sum(-1).flatten(0, 1)  # (G, S, E, C) -> (N, E)
    everywhere = experts(tokens.expand(routing.num_experts, -1, -1))  # (E, N, D)
    return torch.einsum("ne,end->nd", weights, everywhere)


def gradients(run, tokens, logits, experts, make_routing) -> list[torch.Tensor]:
    """The output, and the gradients of tokens, logits, W1, b1, W2, b2 for an output gradient between -1 and 1."""
    leaves = [tokens.detach().requires_grad_(), logits.detach().requires_grad_(), *experts.parameters()]
    out = run(leaves[0], make_routing(torch.softmax(leaves[1], -1)), experts)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view_as(out)
    grads = torch.autograd.grad(out, leaves, weight, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


@dataclass(frozen=True)
class Plain:
    """The plain path in float64 on the same numbers."""

    device: str

    def experts(self, num_experts: int, dim: int, width: int, dtype: torch.dtype, approximate: str = "tanh") -> Experts:
        """Outputs and gradients of about 1: weights of variance 1 / inputs, biases of 0.3."""
        experts = Experts(num_experts, dim, width, approximate=approximate).to(self.device)
        for linear in (experts.fc1, experts.fc2):
            torch.nn.init.normal_(linear.weight, std=linear.weight.shape[2] ** -0.5)
            torch.nn.init.normal_(linear.bias, std=0.3)
        return experts.to(dtype)

    def largest_errors(self, run, tokens, logits, experts, make_routing) -> list[float]:
        """Of `gradients`' seven tensors, relative to max(1, the largest value of each).

        Both route by float64 probabilities: float32 has ties where float64 has none. `run` gets float32 weights.
        """
        exact = copy.deepcopy(experts).double()

        def make_single(probs):
            routing = make_routing(probs)
            return dataclasses.replace(routing, combine_weights=routing.combine_weights.float())

        found = gradients(run, tokens, logits.double(), experts, make_single)
        expected = gradients(run_plain, tokens.double(), logits.double(), exact, make_routing)
        return [
            ((a.double() - b).abs().max() / b.abs().max().clamp_min(1.0)).item()
            for a, b in zip(found, expected, strict=True)
        ]


@pytest.fixture(scope="session")
def plain() -> Plain:
    """On the device where the kernels run: CUDA, or the CPU through the interpreter."""
    return Plain("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
