"""Both ways to run the experts against the dense definition, forward and backward."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionmoe.model import packed
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


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 70) | st.integers(250, 700),
    num_experts=st.integers(1, 5),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    capacity=st.integers(1, 60) | st.integers(250, 400),
    approximate=st.sampled_from(["tanh", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    packed_size=st.sampled_from([1, packed.PACKED_SIZE]),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_segments_with_filled_rows_and_fused_gelu_equal_plain(
    size, num_experts, dims, capacity, approximate, dtype, packed_size, wide, seed
):
    """float32 and bfloat16 fill rows up and, without gradients, fuse GELU into the product: the same numbers.

    wide: weights are float32 whatever the tokens are, as under autocast.
    """
    torch.manual_seed(seed)
    low = make_experts(num_experts, *dims, torch.float32 if wide else dtype)
    low.approximate = approximate
    tokens = torch.randn(size, dims[0]).to(dtype)
    logits = torch.randn(1, size, num_experts, dtype=torch.float64)

    def make_routing(probs):
        return top_k_routing(probs, min(2, num_experts), capacity, True)

    exact = copy.deepcopy(low).double()
    expected, expected_gradients = gradients(run_plain, tokens.double(), logits, exact, make_routing)
    out, grads = gradients(run_segments, tokens, logits, low, make_routing)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PACKED_SIZE", packed_size)
        fused = run_segments(tokens, make_routing(torch.softmax(logits, -1)), low)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    least = max(1.0, size**0.5 / 4)  # a bias's gradient sums `size` rounded terms, which may cancel
    assert [g.dtype for g in grads[2:]] == [p.dtype for p in low.parameters()]
    for got, wanted in zip([out, fused, *grads], [expected, expected, *expected_gradients], strict=True):
        scale = wanted.abs().max().clamp_min(least)
        torch.testing.assert_close(got.double() / scale, wanted / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_change_before_the_backward_pass_are_noticed(dtype):
    """Also where the forward pass has kept its own copies of them in bfloat16."""
    experts = make_experts(2, 4, 5, torch.float32)
    routing = top_k_routing(torch.softmax(torch.randn(1, 6, 2), -1), 1, 8, False)
    out = run_segments(torch.randn(6, 4).to(dtype), routing, experts)
    with torch.no_grad():
        experts.fc2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_filled_rows_that_overflow_do_not_leak():
    """Rows are filled up with token 0, of which expert 1 would make infinity: no other token may see it."""
    experts = make_experts(2, 4, 4, torch.bfloat16)
    with torch.no_grad():
        for parameter, value in zip(experts.parameters(), (1.0, 0.0, 2e37, 0.0), strict=True):
            parameter[1] = value  # weight 1, bias 1, weight 2, bias 2
    tokens = torch.zeros(3, 4, dtype=torch.bfloat16)
    tokens[0] = 100.0  # 4 * 100 = 400 in the hidden layer, 4 * 400 * 2e37 = 3.2e40 behind it
    tokens.requires_grad_()
    routing = top_k_routing(torch.softmax(torch.tensor([[[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]]]), -1), 1, 4, False)
    assert torch.isinf(experts(tokens.expand(2, -1, -1))[1, 0]).all()
    out = run_segments(tokens, routing, experts)
    out.sum().backward()
    with torch.no_grad():
        fused = run_segments(tokens, routing, experts)
    for result in (out, fused, tokens.grad, experts.fc1.weight.grad, experts.fc2.weight.grad):
        assert torch.isfinite(result).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["in place", "one value", "through .data", "one expert's .data", "new memory", "optimizer"]
)
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products of oneDNN here")
def test_packed_weights_follow_the_parameters(change):
    """What oneDNN has laid out once is laid out again when a parameter changes, however it changes."""
    experts = make_experts(2, 8, 16, torch.bfloat16)
    tokens = torch.randn(6, 8, dtype=torch.bfloat16)
    routing = top_k_routing(torch.softmax(torch.randn(1, 6, 2), -1), 2, 8, False)
    before = run_segments(tokens, routing, experts)
    weight = experts.fc1.weight
    assert experts.fc1.packed.of(weight, tokens, 6)[0].is_mkldnn
    if change == "in place":
        weight.mul_(-2)
    elif change == "one value":
        weight[1, 3, 5] = 9.0
    elif change == "one expert's .data":
        weight.data[1].mul_(-2)
    elif change == "through .data":
        weight.data.mul_(-2)
    elif change == "new memory":
        weight.data = weight.data * -2
    else:
        weight.grad = 3 * weight  # w - 1 * 3 w = -2 w
        torch.optim.SGD([weight], lr=1.0).step()
    after = run_segments(tokens, routing, experts)
    fresh = run_segments(tokens, routing, copy.deepcopy(experts))
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [62, 300])
def test_large_float32_products_fuse_gelu(capacity):
    """62 rows, for which weights are packed, are filled up to 64, and 300 to 304, with plain weights."""
    experts = make_experts(2, 512, 4096, torch.float32)
    for parameter in experts.parameters():
        parameter.mul_(0.05)
    tokens = torch.randn(320, 512)
    routing = top_k_routing(torch.softmax(torch.randn(1, 320, 2), -1), 2, capacity, True)
    with FlopCounterMode(display=False) as counter:
        out = run_segments(tokens, routing, experts)
    # torch's counter sees the experts: 2 experts x rows x 2 products x 512 x 4096 multiply-adds
    assert counter.get_total_flops() == 2 * (2 * {62: 64, 300: 304}[capacity] * 2 * 512 * 4096)
    assert bool(experts.fc2.packed._packed) == (capacity == 62)
    torch.testing.assert_close(out, run_plain(tokens, routing, experts), rtol=1e-4, atol=1e-4)
