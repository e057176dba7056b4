"""Models made without numbers."""

import torch
from torch import nn

import visionmoe as vm
from visionmoe.model.skeleton import skeleton

SMALL = vm.ModelConfig(
    image_size=32, patch_size=8, num_classes=5, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2
)


def test_same_names_shapes_and_flags_as_a_real_model_and_no_values():
    config = SMALL.replace(num_experts=4, layers=(1,), pooling="map", attention_qk_norm=True, representation_size=6)
    made, real = skeleton(vm.VisionTransformer, config), vm.create_model(config)
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in made.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()
    ]
    assert all(tensor.is_meta for tensor in made.state_dict().values())


def test_no_random_number_is_drawn():
    before = torch.get_rng_state()
    skeleton(vm.VisionTransformer, SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_with_memory_are_filled_as_always():
    def make() -> nn.Module:
        module = nn.Linear(3, 2)
        module.table = torch.zeros(4, device="cpu")
        nn.init.constant_(module.table, 2.0)
        module.table[1:].fill_(5.0).requires_grad_(False)
        return module

    made = skeleton(make)
    assert made.weight.is_meta and made.weight.requires_grad
    assert made.table.tolist() == [2.0, 5.0, 5.0, 5.0]
    assert nn.Linear(3, 2).weight.abs().sum() > 0  # outside, all is as it was
