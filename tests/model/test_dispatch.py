"""Both ways to run the experts against the dense definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmoe.model.dispatch import run_buffers, run_segments
from visionmoe.model.experts import Experts
from visionmoe.model.routing import Routing, expert_choice_routing, normalize_combine_weights, top_k_routing


def run_plain(tokens, routing, experts):
    """Every expert on every token, weighted by the dense combine weights. (N, D) -> (N, D)."""
    _, combine = routing.to_dense()
    weights = combine.sum(-1).flatten(0, 1)  # (G, S, E, C) -> (N, E)
    everywhere = experts(tokens.expand(routing.num_experts, -1, -1))  # (E, N, D)
    return torch.einsum("ne,end->nd", weights, everywhere)


def gradients(run, tokens, logits, experts, make_routing):
    leaves = [tokens.detach().requires_grad_(), logits.detach().requires_grad_(), *experts.parameters()]
    routing = make_routing(torch.softmax(leaves[1], -1))
    out = run(leaves[0], routing, experts)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, materialize_grads=True)


def make_experts(num_experts, dim, width, dtype=torch.float64, approximate="tanh"):
    experts = Experts(num_experts, dim, width, approximate=approximate).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5)),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    k=st.integers(1, 5),
    capacity=st.integers(1, 10),
    kind=st.sampled_from(["vanilla", "bpr", "expert_choice", "normalised"]),
    approximate=st.sampled_from(["tanh", "none"]),
    skew=st.floats(0, 20),
    seed=st.integers(0, 2**31),
)
def test_segments_and_buffers_equal_plain(shape, dims, k, capacity, kind, approximate, skew, seed):
    """Random shapes: dropped requests, experts with nothing, one token, K = E, all tokens to one expert."""
    torch.manual_seed(seed)
    groups, size, num_experts = shape
    tokens = torch.randn(groups * size, dims[0], dtype=torch.float64)
    logits = torch.randn(shape, dtype=torch.float64)
    logits[..., 0] += skew

    def make_routing(probs):
        if kind == "expert_choice":
            return expert_choice_routing(probs, capacity)
        routing = top_k_routing(probs, min(k, num_experts), capacity, kind == "bpr")
        return normalize_combine_weights(routing) if kind == "normalised" else routing

    experts = make_experts(num_experts, *dims, approximate=approximate)
    expected, expected_gradients = gradients(run_plain, tokens, logits, experts, make_routing)
    for run in (run_segments, run_buffers):
        out, grads = gradients(run, tokens, logits, experts, make_routing)
        torch.testing.assert_close(out, expected)
        for gradient, wanted in zip(grads, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("run", [run_segments, run_buffers])
def test_token_without_a_place_gets_zero(run):
    probs = torch.full((1, 3, 1), 1.0)  # one expert, one place: tokens 1 and 2 are dropped
    experts = make_experts(1, 4, 5, torch.float32)
    out = run(torch.randn(3, 4), top_k_routing(probs, 1, 1, False), experts)
    assert out[0].abs().sum() > 0
    assert out[1:].tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("run", [run_segments, run_buffers])
def test_empty_places_do_not_leak(run):
    """An expert that yields infinities on an empty (zero) row does not reach any token, forward or backward."""
    experts = make_experts(2, 3, 3, torch.float32)
    tokens = torch.randn(4, 3, requires_grad=True)
    probs = torch.softmax(torch.tensor([[[5.0, 0.0]] * 4]), -1)
    out = run(tokens, top_k_routing(probs, 1, 8, False), experts)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(tokens.grad).all()
    assert experts.fc2.weight.grad[1].abs().sum() == 0


@pytest.mark.parametrize("run", [run_segments, run_buffers])
def test_memory_grows_with_requests_not_with_capacity_squared(run):
    """Saved and temporary tensors stay below a few times S*K*(D+F): nothing of size S*E*C is built."""
    size, num_experts, dim, width, k = 4096, 64, 8, 8, 2
    capacity = size * k // num_experts
    sizes = []
    experts = make_experts(num_experts, dim, width, torch.float32)
    probs = torch.softmax(torch.randn(1, size, num_experts), -1)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(t, "numel"))
            return out

    tokens = torch.randn(size, dim)
    with Watch():
        run(tokens, top_k_routing(probs, k, capacity, True), experts)
    assert max(sizes) <= max(size * num_experts, 2 * size * k * (dim + width))  # S*E*C would be 33 million
    assert max(sizes) < size * num_experts * capacity / 64


def test_routing_is_frozen():
    routing = top_k_routing(torch.ones(1, 1, 1), 1, 1, False)
    assert isinstance(routing, Routing)
    with pytest.raises(AttributeError):
        routing.capacity = 2
