"""What only a GPU can show: no waiting of the host, CUDA graphs, compilation, latency, speed of the products."""

import statistics
import time

import pytest
import torch

import visionmoe as vm
from visionmoe.model.gpu.ops import run_triton
from visionmoe.model.moe import MoE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model(**overrides):
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {"image_size": 64, "num_layers": 4, "num_classes": 10, "layers": (1, 3)}
    return vm.create_model("vmoe_b16_e8_every2", **(options | overrides)).cuda()


def step(model, images):
    with torch.autocast("cuda", torch.bfloat16):
        out = model(images)
    (out.logits.float().square().mean() + out.auxiliary_loss).backward()
    return out.logits


@pytest.mark.parametrize("overrides", [{}, {"batch_priority": True}, {"router": "expert_choice"}], ids=str)
def test_a_step_never_waits(overrides):
    model = make_model(**overrides).train()
    images = torch.rand(8, 3, 64, 64, device="cuda") * 2 - 1
    for _ in range(2):  # compiles and tunes
        step(model, images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_in_one_cuda_graph():
    """Replayed on other images it gives what eager gives: the routing is not part of the graph."""
    model = make_model(noise_std=0.0).train()
    images = torch.rand(8, 3, 64, 64, device="cuda") * 2 - 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step(model, images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        logits = step(model, images)
    captured = {name: p.grad for name, p in model.named_parameters()}
    for _ in range(2):
        images.copy_(torch.rand_like(images) * 2 - 1)
        graph.replay()
        replayed = {name: g.clone() for name, g in captured.items()}
        for parameter in model.parameters():
            parameter.grad = None
        torch.testing.assert_close(logits, step(model, images), rtol=1e-2, atol=1e-2)
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().clamp_min(1e-6)
            torch.testing.assert_close(replayed[name] / scale, parameter.grad / scale, rtol=0, atol=0.05, msg=name)


def test_training_compiles_to_one_graph():
    model = make_model(noise_std=0.0).train()
    images = torch.rand(8, 3, 64, 64, device="cuda") * 2 - 1
    logits = step(model, images)
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True), images), logits, rtol=2e-2, atol=2e-2)


def test_many_rows_equal_float64():
    """A whole layer's worth of rows in bfloat16, each expert over some tiles, against buffers in float64."""
    torch.manual_seed(0)
    layer = MoE(vm.MoEConfig(num_experts=8, layers=(0,), noise_std=0.0), 0, 768, 3072).cuda()
    layer.reset_parameters()
    x = torch.randn(16, 197, 768, device="cuda")
    routing, _, _ = layer.router(x.view(1, -1, 768), layer.setting)
    exact = layer.experts.double()
    from visionmoe.model.dispatch import run_buffers

    expected = run_buffers(x.view(-1, 768).double(), routing, exact)
    actual = run_triton(x.view(-1, 768).bfloat16(), routing, layer.experts.bfloat16())
    # weights, hidden row, row and sum are rounded to 2^-9 each, tokens too
    assert (actual.double() - expected).abs().max() <= 5 * 2.0**-9 * expected.abs().max()


def test_latency_of_one_image():
    """In a CUDA graph at most 0.6 of eager."""
    model = make_model(image_size=224, num_layers=12, layers=(1, 3, 5, 7, 9, 11)).bfloat16().eval()
    image = (torch.rand(1, 3, 224, 224, device="cuda") * 2 - 1).bfloat16()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    medians = []
    with torch.no_grad():
        for call in (model, compiled):
            times = []
            for number in range(40):
                torch.compiler.cudagraph_mark_step_begin()
                torch.cuda.synchronize()
                start = time.perf_counter()
                call(image)
                torch.cuda.synchronize()
                if number >= 10:
                    times.append(time.perf_counter() - start)
            medians.append(statistics.median(times))
    assert medians[1] <= 0.6 * medians[0]
