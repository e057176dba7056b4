"""The rows that a routing becomes on the device: against a loop over the requests."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmoe.model.gpu.schedule import make_schedule
from visionmoe.model.routing import expert_choice_routing, top_k_routing


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(1, 5)),
    k=st.integers(1, 5),
    capacity=st.integers(1, 10),
    kind=st.sampled_from(["vanilla", "bpr", "expert_choice"]),
    skew=st.floats(0, 20),
    seed=st.integers(0, 2**31),
)
def test_every_kept_request_has_one_row(shape, k, capacity, kind, skew, seed):
    torch.manual_seed(seed)
    groups, size, experts = shape
    logits = torch.randn(shape)
    logits[..., 0] += skew
    probs = torch.softmax(logits, -1)
    if kind == "expert_choice":
        routing = expert_choice_routing(probs, capacity)
    else:
        routing = top_k_routing(probs, min(k, experts), capacity, kind == "bpr")
    schedule = make_schedule(routing)
    requests = routing.token_index.shape[1]
    most = min(groups * requests, experts * groups * capacity)
    assert schedule.token.shape == schedule.weights.shape == (most,)
    assert schedule.offsets.dtype == schedule.token.dtype == schedule.rows_of_token.dtype == torch.int32

    # (expert, group, place) -> (token, weight): the order that rows have
    wanted = {}
    for g in range(groups):
        for r in range(requests):
            place = int(routing.buffer_index[g, r])
            if place < capacity:
                key = (int(routing.expert_index[g, r]), g, place)
                assert key not in wanted
                token = g * size + int(routing.token_index[g, r])
                wanted[key] = (token, float(routing.combine_weights[g, r]))
    rows = [(key[0], *wanted[key]) for key in sorted(wanted)]
    table = torch.full((groups * size, experts), -1)
    for number, (expert, token, weight) in enumerate(rows):
        assert schedule.token[number] == token
        assert schedule.weights[number] == weight
        table[token, expert] = number
    assert schedule.rows_of_token.tolist() == table.tolist()
    loads = [sum(row[0] == e for row in rows) for e in range(experts)]
    assert schedule.offsets.tolist() == [sum(loads[:e]) for e in range(experts + 1)]
    assert schedule.weights[len(rows) :].abs().sum() == 0


def test_gradient_goes_to_the_kept_requests():
    probs = torch.softmax(torch.randn(1, 6, 2), -1).requires_grad_()
    routing = top_k_routing(probs, 2, 4, False)  # 12 requests, 8 places
    make_schedule(routing).weights.sum().backward()
    kept = torch.zeros(6, 2).index_put((routing.token_index[0], routing.expert_index[0]), routing.kept[0].float())
    assert probs.grad[0].tolist() == kept.tolist()


def test_compiles_to_one_graph():
    """One graph for other values, at most one more for all other sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(probs):
        return make_schedule(top_k_routing(probs, 2, probs.shape[1] * 2 // 3, True))

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for size in (12, 12, 15, 30, 9):
        probs = torch.softmax(torch.randn(2, size, 3), -1)
        for actual, expected in zip(compiled(probs), run(probs), strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count <= 2
