"""Routing arithmetic: numbers derived by hand, the reference's tables, and a slow plain version on random shapes."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmoe.config import MoEConfig
from visionmoe.model import routing
from visionmoe.model.router import Router

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6))


def plain_top_k(probs, k, capacity, batch_priority):
    """The definition in loops: (G, S, E) -> dispatch (G, S, E, C) and combine."""
    groups, tokens, experts = probs.shape
    dispatch = np.zeros((groups, tokens, experts, capacity), bool)
    combine = np.zeros(dispatch.shape, np.float32)
    for g in range(groups):
        choices = [sorted(range(experts), key=lambda e: (-probs[g, s, e], e))[:k] for s in range(tokens)]
        order = list(range(tokens))
        if batch_priority:
            order.sort(key=lambda s: -probs[g, s].max())
        taken = [0] * experts
        for rank in range(k):
            for s in order:
                expert = choices[s][rank]
                if taken[expert] < capacity:
                    dispatch[g, s, expert, taken[expert]] = True
                    combine[g, s, expert, taken[expert]] = probs[g, s, expert]
                taken[expert] += 1
    return dispatch, combine


@st.composite
def cases(draw):
    groups, tokens, experts = draw(SHAPES)
    seed, levels = draw(st.integers(0, 2**31)), draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    logits = np.random.default_rng(seed).integers(0, levels, (groups, tokens, experts)) / levels
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float32), -1)
    return probs, draw(st.integers(1, experts)), draw(st.integers(1, 8)), draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(cases())
def test_top_k_equals_plain_loops(case):
    probs, k, capacity, batch_priority = case
    dispatch, combine = routing.top_k_routing(probs, k, capacity, batch_priority).to_dense()
    expected_dispatch, expected_combine = plain_top_k(probs.numpy(), k, capacity, batch_priority)
    np.testing.assert_array_equal(dispatch.numpy(), expected_dispatch)
    np.testing.assert_array_equal(combine.numpy(), expected_combine)


def test_batch_priority_keeps_the_most_certain_tokens():
    # Three tokens want expert 0 with probabilities .6 .9 .7; two places. Vanilla keeps tokens 0, 1; BPR 1, then 2.
    first = torch.tensor([0.6, 0.9, 0.7])
    probs = torch.stack([first, 1 - first], dim=-1)[None]
    vanilla = routing.top_k_routing(probs, 1, capacity=2, batch_priority=False)
    bpr = routing.top_k_routing(probs, 1, capacity=2, batch_priority=True)
    assert vanilla.buffer_index.tolist() == [[0, 1, 2]]
    assert bpr.buffer_index.tolist() == [[2, 0, 1]]
    assert bpr.kept.tolist() == [[False, True, True]]
    assert bpr.dropped() == pytest.approx(1 / 3)
    assert bpr.tokens_kept().tolist() == [[0, 1, 1]]
    assert bpr.expert_load().tolist() == [1, 0]


def test_second_choices_wait_for_all_first_choices():
    # Token 0 chooses (0, 1), token 1 chooses (1, 0): expert 0 holds token 0 then token 1, expert 1 token 1 then 0.
    probs = torch.tensor([[[0.7, 0.3], [0.4, 0.6]]])
    result = routing.top_k_routing(probs, 2, capacity=1, batch_priority=False)
    assert result.expert_index.tolist() == [[0, 1, 1, 0]]
    assert result.buffer_index.tolist() == [[0, 1, 0, 1]]


def test_k_larger_than_experts_is_an_error():
    with pytest.raises(ValueError, match="num_selected_experts must be between 1 and 3, got 4"):
        routing.top_k_routing(torch.ones(1, 2, 3), 4, 1, False)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(1, 20), st.integers(0, 2**31))
def test_expert_choice_takes_the_best_tokens(shape, capacity, seed):
    probs = torch.softmax(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), -1)
    result = routing.expert_choice_routing(probs, capacity)
    dispatch, combine = result.to_dense()
    for g in range(shape[0]):
        for e in range(shape[2]):
            best = np.argsort(-probs[g, :, e].numpy(), kind="stable")[:capacity]
            assert dispatch[g, :, e].any(-1).nonzero().flatten().tolist() == sorted(best.tolist())
            torch.testing.assert_close(combine[g, best, e].sum(-1), probs[g, best, e])
    assert result.kept.all()


def test_against_reference_routing_table(conformance):
    table = np.load(conformance / "units" / "routing.npz")
    cases = {name.split("/")[0] for name in table.files}
    assert cases
    for case in cases:
        _, tokens, experts, k, factor, priority = table[f"{case}/params"]
        capacity = routing.compute_capacity(int(tokens * k), int(experts), factor)
        result = routing.top_k_routing(torch.from_numpy(table[f"{case}/gates"]), int(k), capacity, bool(priority))
        dispatch, combine = result.to_dense()
        np.testing.assert_array_equal(dispatch.numpy(), table[f"{case}/dispatch_weights"])
        np.testing.assert_array_equal(combine.numpy(), table[f"{case}/combine_weights"])


def test_against_reference_capacity_table(conformance):
    table = np.load(conformance / "units" / "capacity.npz")
    columns = table["columns"].tolist()
    for row in table["rows"]:
        case = dict(zip(columns, row, strict=True))
        rounding = "ceil" if case["ceil"] else "round"
        tokens, experts, multiple_of = (int(case[name]) for name in ("num_tokens", "num_experts", "multiple_of"))
        actual = routing.compute_capacity(tokens, experts, case["capacity_factor"], rounding, multiple_of)
        assert actual == case["capacity"], case


def test_capacity_by_hand():
    # 1576 tokens, K=2, 8 experts, factor 1.05: 3152 * 1.05 / 8 = 413.7, ceil 414, next multiple of 4 is 416.
    assert routing.compute_capacity(3152, 8, 1.05) == 416
    assert routing.compute_capacity(3152, 8, 1.05, multiple_of=None) == 414
    assert routing.compute_capacity(3152, 8, 1.05, "round", multiple_of=0) == 414
    assert routing.compute_capacity(10, 4, 1.0, "round", multiple_of=None) == 2  # 2.5 rounds to the even number
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        routing.compute_capacity(4, 8, 0.1, "round")
    with pytest.raises(ValueError, match="'ceil' or 'round', got 'floor'"):
        routing.compute_capacity(4, 8, 0.1, "floor")


def test_rounded_capacity_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="visionmoe"):
        routing.compute_capacity(17, 4, 0.531)  # 2.26 -> 3 -> 4 places: factor 0.94
    assert "capacity_factor 0.531 was asked" in caplog.text
    assert "0.941" in caplog.text


def test_against_reference_auxiliary_losses(conformance):
    table = np.load(conformance / "units" / "auxiliary_losses.npz")
    cases = {name.split("/")[0] for name in table.files}
    assert cases
    for case in cases:
        logits = torch.from_numpy(table[f"{case}/logits"])[None].requires_grad_()
        noisy = torch.from_numpy(table[f"{case}/logits_noisy"])[None]  # a constant in the table's gradients
        experts, k = logits.shape[-1], int(table[f"{case}/k"])
        importance = routing.importance_loss(logits)
        load = routing.load_loss(logits, noisy, 1 / experts, k)
        gshard = routing.gshard_loss(torch.softmax(noisy, -1))
        gradients = {
            "importance_loss": torch.autograd.grad(importance.sum(), logits)[0],
            "load_loss": torch.autograd.grad(load.sum(), logits)[0],
        }
        for name, value in {"importance_loss": importance, "load_loss": load, "gshard_loss": gshard}.items():
            assert value.item() == pytest.approx(float(table[f"{case}/{name}"]), rel=2e-5), (case, name)
        for name, gradient in gradients.items():
            expected = table[f"{case}/{name}_grad_logits"]
            np.testing.assert_allclose(gradient[0].numpy(), expected, atol=2e-5 * np.abs(expected).max())


def test_losses_of_perfect_balance_are_zero():
    logits = torch.zeros(2, 8, 4)
    assert routing.importance_loss(logits).tolist() == [0, 0]
    assert routing.load_loss(logits, logits, 0.25, 4).tolist() == [0, 0]
    # Uniform probabilities, all top-1 votes on expert 0 (ties by position): 4^2 * mean(1*1/4, 0, 0, 0) = 1.
    assert routing.gshard_loss(torch.full((1, 8, 4), 0.25)).tolist() == [1.0]


def test_load_loss_has_gradient_through_the_threshold():
    logits = torch.randn(1, 6, 4, dtype=torch.float64)
    noisy = (logits + 0.1 * torch.randn_like(logits)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: routing.load_loss(logits, x, 0.25, 2), noisy)


@pytest.mark.parametrize("size", [1, 256, 700])
def test_routers_compute_in_float32_from_any_dtype(size):
    """bfloat16 tokens are exact in float32 and float64; without gradients they are cast in parts of 256."""
    router = Router(MoEConfig(num_experts=5, layers=(0,)), 12)
    router.reset_parameters()
    x = torch.randn(2, size, 12).bfloat16()
    expected = torch.softmax(x.double() @ router.gate.weight.double().t(), -1)[:, None]
    with torch.no_grad():
        parts = router.probabilities(x)
    for probs in (parts, router.probabilities(x)):
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-6)
