"""torch.compile of the whole model: no graph breaks, one compilation for all batches, equal to eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import visionmoe as vm

CONFIG = vm.ModelConfig(
    image_size=16, patch_size=8, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2, num_classes=5,
    moe=vm.MoEConfig(num_experts=4, layers=(1,), capacity_factor=0.6),
)  # fmt: skip


def make_model(**overrides):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = vm.create_model(CONFIG, **overrides).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


OPTIONS = [
    {"batch_priority": True},
    {"router": "expert_choice"},
    {"ensemble_size": 2, "num_selected_experts": 1},
    {"router": "soft"},
]


@pytest.mark.parametrize("overrides", OPTIONS)
def test_one_graph_for_all_batches(overrides):
    """Other images do not recompile; the first other batch size makes one graph for every size."""
    model = make_model(**overrides)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    with torch.no_grad():
        for batch in (8, 8, 8, 4, 6, 12, 5):
            images = torch.rand(batch, 3, 16, 16) * 2 - 1
            actual, expected = compiled(images), model(images)
            torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(actual.auxiliary_loss, expected.auxiliary_loss)
            frames.append(counter.frame_count)
    assert frames[2] == 1
    assert frames[-1] <= 2


def test_training_step_with_the_default_backend():
    """Forward and backward through the CPU code generator equal eager."""
    model = make_model(noise_std=0.0, num_layers=1, layers=(0,)).train()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        out = call(images)
        (out.logits.square().mean() + out.auxiliary_loss).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)
