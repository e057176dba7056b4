"""Routing that changes at run time: no copies, no recompilation per batch, and saved with the model."""

from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import visionmoe as vm
from visionmoe.config import RoutingSetting

CONFIG = vm.ModelConfig(
    image_size=16, patch_size=8, hidden_size=16, num_layers=4, mlp_dim=24, num_heads=2, num_classes=5,
    moe=vm.MoEConfig(num_experts=4, layers=(1, 3), capacity_multiple_of=None),
)  # fmt: skip


def make() -> vm.VisionTransformer:
    torch.manual_seed(0)
    model = vm.create_model(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_no_parameter_is_copied():
    model = make()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    model.set_routing(num_selected_experts=1, capacity_factor=0.5, batch_priority=True)
    model.set_routing(capacity_factor=0.2, layers=[3])
    with torch.no_grad():
        model(torch.rand(2, 3, 16, 16))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def test_a_compiled_model_compiles_once_per_setting():
    torch._dynamo.reset()
    model = make()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    settings = [(2, 1.05, None), (2, 0.5, None), (1, 0.5, [3])]
    frames = []
    with torch.no_grad():
        for _ in range(2):  # the second time around, every setting has been compiled
            for k, capacity, layers in settings:
                model.set_routing(2, 1.05, True)
                model.set_routing(k, capacity, True, layers)
                for seed in range(3):
                    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
                    torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=1e-5, rtol=1e-4)
                frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 3, 3, 3]


def test_settings_of_single_layers_are_saved(tmp_path: Path):
    model = make()
    model.set_routing(2, 0.7, True)
    model.set_routing(1, 0.25, False, layers=[3])
    model.save_pretrained(tmp_path)
    loaded = vm.load(tmp_path)
    assert loaded.config == model.config
    assert loaded.moe_layer(1).setting == RoutingSetting(2, 0.7, True)
    assert loaded.moe_layer(3).setting == RoutingSetting(1, 0.25, False)
    assert vm.count_flops(loaded) == vm.count_flops(model)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
