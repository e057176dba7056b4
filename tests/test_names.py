"""Names that stay: what other people's programs call. A change here is a change of the contract."""

import importlib
import inspect

import pytest

import visionmoe as vm

PUBLIC = {
    "visionmoe": ["ModelConfig", "create_model", "load", "count_flops"],
    "visionmoe.model.routing": [
        "compute_capacity",
        "top_k_routing",
        "expert_choice_routing",
        "importance_loss",
        "load_loss",
        "gshard_loss",
        "Routing",
    ],
    "visionmoe.checkpoint": ["read_vmoe", "write_vmoe", "params_from_vmoe", "params_to_vmoe", "resize_pos_embed"],
    "visionmoe.train.optim": ["create_optimizer", "create_schedule"],
    "visionmoe.evaluate.fewshot": ["fewshot_accuracy"],
    "visionmoe.evaluate.classify": ["ClassificationEvaluator", "evaluate"],
    "visionmoe.evaluate.adaptive": ["routing_grid", "sweep"],
    "visionmoe.cli": ["main"],
}

PARAMETERS = {
    "visionmoe.model.routing.compute_capacity": [
        "num_tokens",
        "num_experts",
        "capacity_factor",
        "ceil_or_round",
        "multiple_of",
    ],
    "visionmoe.model.routing.top_k_routing": ["probs", "num_selected_experts", "capacity", "batch_priority"],
    "visionmoe.model.routing.expert_choice_routing": ["probs", "capacity"],
    "visionmoe.model.routing.load_loss": ["logits", "noisy_logits", "noise_std", "k"],
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in PUBLIC.items() for n in names])
def test_public_names_exist(module: str, name: str):
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters_keep_their_names(path: str):
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    assert list(inspect.signature(function).parameters) == PARAMETERS[path]


def test_model_methods():
    model = vm.VisionTransformer
    assert list(inspect.signature(model.set_routing).parameters) == [
        "self",
        "num_selected_experts",
        "capacity_factor",
        "batch_priority",
        "layers",
    ]
    assert list(inspect.signature(model.forward_features).parameters) == ["self", "images"]
    assert callable(model.forward_head)
    assert callable(model.save_pretrained)


def test_every_name_of_the_package_can_be_used():
    for name in vm.__all__:
        assert getattr(vm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        vm.create_modle  # noqa: B018


def test_state_dict_of_a_vmoe():
    config = vm.ModelConfig(
        image_size=8, patch_size=4, num_classes=3, hidden_size=8, num_layers=2, mlp_dim=12, num_heads=2,
        representation_size=5, moe=vm.MoEConfig(num_experts=4, layers=(1,)),
    )  # fmt: skip
    shapes = {name: tuple(value.shape) for name, value in vm.create_model(config).state_dict().items()}
    block = {
        "norm1.weight": (8,), "norm1.bias": (8,), "attn.qkv.weight": (24, 8), "attn.qkv.bias": (24,),
        "attn.proj.weight": (8, 8), "attn.proj.bias": (8,), "norm2.weight": (8,), "norm2.bias": (8,),
    }  # fmt: skip
    expected = {
        "cls_token": (1, 1, 8), "pos_embed": (1, 5, 8),
        "patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,),
        **{f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()},
        "blocks.0.mlp.fc1.weight": (12, 8), "blocks.0.mlp.fc1.bias": (12,),
        "blocks.0.mlp.fc2.weight": (8, 12), "blocks.0.mlp.fc2.bias": (8,),
        "blocks.1.mlp.router.gate.weight": (4, 8),
        "blocks.1.mlp.experts.fc1.weight": (4, 12, 8), "blocks.1.mlp.experts.fc1.bias": (4, 12),
        "blocks.1.mlp.experts.fc2.weight": (4, 8, 12), "blocks.1.mlp.experts.fc2.bias": (4, 8),
        "norm.weight": (8,), "norm.bias": (8,),
        "pre_logits.weight": (5, 8), "pre_logits.bias": (5,), "head.weight": (3, 5), "head.bias": (3,),
    }  # fmt: skip
    assert shapes == expected
