"""The path over torch's grouped product: against the plain path in float64, forward and backward, on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionmoe.model.gpu.grouped import run_grouped
from visionmoe.model.routing import expert_choice_routing, top_k_routing

pytestmark = pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has no grouped product")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5)),
    dims=st.tuples(st.sampled_from([8, 16, 40]), st.sampled_from([8, 24, 64])),
    k=st.integers(1, 3),
    capacity=st.integers(1, 20),
    kind=st.sampled_from(["vanilla", "bpr", "expert_choice"]),
    approximate=st.sampled_from(["tanh", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    skew=st.floats(0, 20),
    seed=st.integers(0, 2**31),
)
def test_random_shapes_equal_plain(plain, shape, dims, k, capacity, kind, approximate, dtype, skew, seed):
    """Dropped requests and experts with nothing: what the product leaves in unused rows reaches nobody."""
    torch.manual_seed(seed)
    tokens = torch.randn(shape[0] * shape[1], dims[0]).to(dtype)
    logits = torch.randn(shape)
    logits[..., 0] += skew

    def make_routing(probs):
        if kind == "expert_choice":
            return expert_choice_routing(probs, capacity)
        return top_k_routing(probs, min(k, shape[2]), capacity, kind == "bpr")

    experts = plain.experts(shape[2], *dims, dtype, approximate)
    errors = plain.largest_errors(run_grouped, tokens, logits, experts, make_routing)
    # bfloat16 rounds to 2^-9 of a term: product, bias, GELU, product, bias, weight, up to five sums; twice backward
    assert max(errors) <= (1e-5 if dtype == torch.float32 else 20 * 2.0**-9), errors


def test_operations_are_counted():
    from visionmoe.model.experts import Experts

    experts = Experts(3, 8, 16)
    experts.reset_parameters(split_rngs=True)
    tokens = torch.randn(10, 8, requires_grad=True)
    routing = top_k_routing(torch.softmax(torch.randn(1, 10, 3), -1), 2, 6, False)
    with FlopCounterMode(display=False) as counter:
        out = run_grouped(tokens, routing, experts)
    rows = 18  # min(10 * 2, 3 * 6)
    biases = 2 * rows * 3 * (8 + 16)
    assert counter.get_total_flops() == 2 * 2 * rows * 8 * 16 + biases
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * rows * 8 * 16 + biases  # the one-hot rows need no gradient
