"""The Triton kernels against the plain path in float64, forward and backward, on a GPU or through the interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import visionmoe as vm
from visionmoe.model.gpu.configs import INTERPRETED
from visionmoe.model.gpu.ops import experts_backward, experts_forward, run_triton
from visionmoe.model.gpu.schedule import make_schedule
from visionmoe.model.moe import MoE
from visionmoe.model.routing import expert_choice_routing, normalize_combine_weights, top_k_routing

# Each result passes at most five roundings on its way (values before GELU, hidden row, its gradient, row, result).
# Each changes its term by at most one unit in the last place: half a unit where hardware rounds, a whole one where the
# interpreter cuts off. The terms' signs are independent, so the errors add up as the terms do.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5 * 2.0**-10, torch.bfloat16: 5 * 2.0**-7}


@settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 24), st.integers(1, 4)),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    k=st.integers(1, 3),
    capacity=st.integers(1, 24),
    kind=st.sampled_from(["vanilla", "bpr", "expert_choice", "normalised"]),
    approximate=st.sampled_from(["tanh", "none"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    skew=st.floats(0, 20),
    seed=st.integers(0, 2**31),
)
def test_random_shapes_equal_plain(plain, shape, dims, k, capacity, kind, approximate, dtype, skew, seed):
    """Dropped requests, experts with nothing, one token, K = E, all tokens to one expert, no multiple of any block."""
    torch.manual_seed(seed)
    tokens = torch.randn(shape[0] * shape[1], dims[0], device=plain.device).to(dtype)
    logits = torch.randn(shape, device=plain.device)
    logits[..., 0] += skew

    def make_routing(probs):
        if kind == "expert_choice":
            return expert_choice_routing(probs, capacity)
        routing = top_k_routing(probs, min(k, shape[2]), capacity, kind == "bpr")
        return normalize_combine_weights(routing) if kind == "normalised" else routing

    experts = plain.experts(shape[2], *dims, dtype, approximate)
    errors = plain.largest_errors(run_triton, tokens, logits, experts, make_routing)
    assert max(errors) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("k", "approximate"), [(1, "tanh"), (2, "none"), (3, "tanh")])
def test_many_tiles_equal_plain(plain, dtype, k, approximate):
    """Two groups, three experts with some tiles of rows each, several tiles of D and F, some requests dropped."""
    torch.manual_seed(k)
    tokens = torch.randn(2 * 40, 48, device=plain.device).to(dtype)
    logits = torch.randn(2, 40, 3, device=plain.device)
    experts = plain.experts(3, 48, 72, dtype, approximate)

    def make_routing(probs):
        routing = top_k_routing(probs, k, 10 * k, True)
        assert 0 < routing.dropped() < 0.5  # 2 * 40 * k requests, 2 * 3 * 10 * k places
        return routing

    errors = plain.largest_errors(run_triton, tokens, logits, experts, make_routing)
    assert max(errors) <= TOLERANCE[dtype], errors


def make_case(plain, dtype=torch.float32):
    torch.manual_seed(0)
    experts = plain.experts(3, 32, 48, dtype)
    tokens = torch.randn(40, 32, device=plain.device, dtype=dtype)
    routing = top_k_routing(torch.softmax(torch.randn(1, 40, 3, device=plain.device), -1), 2, 20, False)
    return tokens, routing, experts


def test_token_without_a_place_gets_zero(plain):
    experts = plain.experts(1, 4, 5, torch.float32)
    probs = torch.full((1, 3, 1), 1.0, device=plain.device)  # one expert, one place: tokens 1 and 2 are dropped
    out = run_triton(torch.randn(3, 4, device=plain.device), top_k_routing(probs, 1, 1, False), experts)
    assert out[0].abs().sum() > 0
    assert out[1:].tolist() == [[0.0] * 4] * 2


def test_no_tokens(plain):
    tokens = torch.randn(0, 4, device=plain.device, requires_grad=True)
    routing = top_k_routing(torch.ones(1, 0, 2, device=plain.device), 1, 4, False)
    experts = plain.experts(2, 4, 5, torch.float32)
    run_triton(tokens, routing, experts).sum().backward()
    assert tokens.grad.shape == (0, 4)
    assert experts.fc1.weight.grad.abs().sum() == 0


def test_equal_inputs_give_equal_bits(plain):
    tokens, routing, experts = make_case(plain)
    results = []
    for _ in range(2):
        leaf = tokens.clone().requires_grad_()
        out = run_triton(leaf, routing, experts)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *experts.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_experts_get_no_gradient_and_others_the_same(plain):
    tokens, routing, experts = make_case(plain)
    leaf = tokens.requires_grad_()
    (wanted,) = torch.autograd.grad(run_triton(leaf, routing, experts).square().sum(), [leaf])
    experts.requires_grad_(False)
    experts.fc2.bias.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        run_triton(leaf, routing, experts).square().sum().backward()
    assert torch.equal(leaf.grad, wanted)
    assert experts.fc1.weight.grad is experts.fc2.weight.grad is experts.fc1.bias.grad is None
    assert experts.fc2.bias.grad.abs().sum() > 0
    # 60 rows, min(40 * 2, 3 * 20): two products forward, two backward, none for the weights
    assert counter.get_total_flops() == 4 * 2 * 60 * 32 * 48


def test_float32_parameters_with_bfloat16_tokens(plain):
    """As under autocast: products in bfloat16, gradients of the weights in float32 and not rounded in between."""
    tokens, routing, experts = make_case(plain)
    out = run_triton(tokens.bfloat16(), routing, experts)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    gradient = experts.fc1.weight.grad
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_saves_no_more_than_a_dense_layer(plain):
    """A dense MLP of the same size saves, per token, its input D, the values before GELU F and those behind it F."""
    dim, width, size = 32, 128, 100
    experts = plain.experts(8, dim, width, torch.float32)
    tokens = torch.randn(size, dim, device=plain.device, requires_grad=True)
    probs = torch.softmax(torch.randn(1, size, 8, device=plain.device), -1)
    routing = top_k_routing(probs, 2, 26, True)  # K = 2, capacity 1.04
    parameters = {p.data_ptr() for p in experts.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_triton(tokens, routing, experts)
    dense = 4 * size * (dim + 2 * width)
    assert sum(saved.values()) <= 1.1 * dense


def test_without_gradients_nothing_is_kept(plain):
    tokens, routing, experts = make_case(plain)
    schedule = make_schedule(routing)
    with torch.no_grad():
        out = run_triton(tokens, routing, experts)
    parameters = [p.detach() for p in experts.parameters()]
    tensors = (schedule.offsets, schedule.token, schedule.rows_of_token)
    again, before = experts_forward(tokens, schedule.weights, *parameters, *tensors, True, False)
    assert torch.equal(out, again)
    assert before.numel() == 0


def test_operators_are_what_they_say(plain):
    """torch's own check: schema, shapes for tracing, autograd registration."""
    tokens, routing, experts = make_case(plain)
    schedule = make_schedule(routing)
    tensors = (schedule.offsets, schedule.token, schedule.rows_of_token)
    inputs = [tokens.requires_grad_(), schedule.weights, *experts.parameters()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(experts_forward, (*inputs, *tensors, True, True), test_utils=checks)
    out, before = experts_forward(*inputs, *tensors, True, True)
    inputs = [x.detach() for x in inputs]
    arguments = (torch.ones_like(out), *inputs, *tensors, before.detach(), True, [True, False, True, True, False, True])
    torch.library.opcheck(experts_backward, arguments, test_utils=checks)


LAYERS = {
    "batch priority": {"batch_priority": True, "capacity_factor": 0.6},
    "expert choice": {"router": "expert_choice"},
    "ensemble": {"ensemble_size": 2, "num_selected_experts": 1, "capacity_factor": 0.7},
    "one group per image": {"group_size": "image", "num_selected_experts": 3},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_buffers(plain, name):
    config = vm.MoEConfig(num_experts=4, layers=(0,), noise_std=0.0, **LAYERS[name])
    torch.manual_seed(0)
    layer = MoE(config, 0, 16, 24).to(plain.device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, 9, 16, device=plain.device)
    results = []
    for layer.dispatch in ("buffers", "triton"):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        loss = out.tokens.square().sum() + out.auxiliary_loss
        results.append([out.tokens, *torch.autograd.grad(loss, [leaf, *layer.parameters()])])
    for buffers, triton in zip(*results, strict=True):
        torch.testing.assert_close(triton, buffers, rtol=1e-4, atol=1e-4)


CONFIG = vm.ModelConfig(
    image_size=16, patch_size=8, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2, num_classes=5,
    moe=vm.MoEConfig(num_experts=4, layers=(1,), capacity_factor=0.6),
)  # fmt: skip


def make_model(device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = vm.create_model(CONFIG, noise_std=0.0).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.moe_layer(1).dispatch = "triton"
    return model


def test_whole_model_compiles_to_one_graph(plain):
    """Forward and backward equal eager; other batch sizes make at most one more graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make_model(plain.device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (4, 6, 3):
        images = torch.rand(batch, 3, 16, 16, device=plain.device) * 2 - 1
        gradients = []
        for call in (model, compiled):
            model.zero_grad()
            out = call(images)
            (out.logits.square().mean() + out.auxiliary_loss).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert counter.frame_count <= 2


def test_flops_are_those_that_count_flops_says(plain):
    model = make_model(plain.device).eval()
    plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain_attention, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(8, 3, 16, 16, device=plain.device))
    assert counter.get_total_flops() == pytest.approx(vm.count_flops(model, batch_size=8) * 8, rel=1e-3)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the tuner's configurations")
def test_the_host_learns_nothing_in_a_step(plain):
    """No operator of a training step of the whole model brings a value from the device to the host."""
    model = make_model(plain.device).train()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        out = model(torch.rand(4, 3, 16, 16) * 2 - 1)
        (out.logits.square().mean() + out.auxiliary_loss).backward()
    assert "experts_forward" in seen
    assert "experts_backward" in seen
    assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"} & set(seen)
