import dataclasses
import json

import pytest

import visionmoe as vm
from visionmoe.checkpoint import params_to_vmoe, write_vmoe
from visionmoe.config import from_dict, to_dict
from visionmoe.train.config import (
    OptimizerConfig,
    TrainConfig,
    assign,
    read_config,
    with_model,
)
from visionmoe.train.recipes import FINETUNING, FROM_SCRATCH, dense_twin, get_finetuning, get_recipe

SMALL = ("fashion_mnist", "fashion_mnist_dense", "cifar10_small", "cifar10_small_dense")


@pytest.mark.parametrize("name", [*FROM_SCRATCH, *FINETUNING])
def test_every_recipe_survives_json_and_says_where_it_is_from(name):
    config = get_recipe(name) if name in FROM_SCRATCH else get_finetuning(name, "vmoe_x")
    assert config.recipe == name
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert (FROM_SCRATCH | FINETUNING)[name].__doc__.count("`visionmoe") == 1 or name == "cifar10_small_dense"


@pytest.mark.parametrize(
    ("model", "rate"),
    [("vmoe_s32_e32_every2", 1e-3), ("vmoe_b16_e8_every2", 8e-4), ("vmoe_l32_e32_every2", 6e-4),
     ("vmoe_l16_e32_every2", 4e-4), ("vmoe_h14_e32_last5", 3e-4)],
)  # fmt: skip
def test_pretraining_rate_follows_the_size(model, rate):
    config = get_recipe("imagenet21k", model)
    assert config.optimizer.learning_rate.peak_value == rate
    assert config.model == vm.get_config(model).replace(num_classes=21_843, head_bias_init=-10.0)


def test_the_largest_model_gets_adafactor():
    optimizer = get_recipe("imagenet21k", "vmoe_15b").optimizer
    assert optimizer.name == "big_vision_adafactor" and optimizer.options["min_dim_size_to_factor"] == 33


def test_dense_twin_has_equal_flops():
    flops = [
        vm.count_flops(vm.create_model(get_recipe(name).model)) for name in ("cifar10_small", "cifar10_small_dense")
    ]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)
    moe = vm.ModelConfig(num_layers=4, moe=vm.MoEConfig(layers=(1, 3)))  # 2 of 4 blocks with K 2: 1.5 times as wide
    assert dense_twin(moe).mlp_dim == 1.5 * moe.mlp_dim and not dense_twin(moe).moe.layers


def test_assign_sets_any_field():
    config = assign(
        get_recipe("fashion_mnist"),
        ["steps=7", "optimizer.learning_rate.peak_value=1e-4", "optimizer.weight_decay=[['fc1', 0.1]]",
         "optimizer.options.b2=0.95", "model.moe.layers=[0, 2]", "data.flip=False", "loss=sigmoid", "ema_decay=null",
         "data.source=folder:a=b"],
    )  # fmt: skip
    assert (config.steps, config.epochs) == (7, None)
    assert config.optimizer.learning_rate.peak_value == 1e-4
    assert config.optimizer.arguments()["weight_decay"] == (("fc1", 0.1),)
    assert config.optimizer.arguments()["b2"] == 0.95
    assert config.model.moe.layers == (0, 2) and config.data.flip is False
    assert config.data.source == "folder:a=b"
    assert assign(config, ["epochs=2"]).steps is None
    assert assign(config, ["init_from=x"]).model is None


def test_assign_image_size_sets_model_and_data():
    config = assign(get_recipe("fashion_mnist"), ["image_size=56", "in_channels=3"])
    assert config.model.image_size == config.data.image_size == 56
    assert config.model.in_channels == config.data.in_channels == 3
    assert assign(config, ["image_size=[28, 56]"]).model.image_hw == (28, 56)


def test_assign_image_size_keeps_the_proportion_of_the_evaluation_crop():
    config = assign(get_recipe("fashion_mnist"), ["data.eval_resize=32"])
    assert assign(config, ["image_size=56"]).data.eval_resize == 64  # 32 / 28 * 56
    for order in (["image_size=56", "data.eval_resize=60"], ["data.eval_resize=60", "image_size=56"]):
        assert assign(config, order).data.eval_resize == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz=3", "unknown field 'stepz'; did you mean 'steps'"),
        ("optimizer.learning_rate.peak_valu=3", r"did you mean 'optimizer\.learning_rate\.peak_value'"),
        ("model.moe.capacity=3", r"did you mean 'model\.moe\.capacity_factor'"),
        ("steps=many", "steps must be int"),
        ("steps=-1", "steps must be >= 0, got -1"),
        ("steps", "must be NAME=VALUE, got 'steps'"),
        ("out.x=1", "out is one value, not a table"),
        ("data.image_size=32", r"model\.image_size must be data\.image_size, got 28 and 32"),
        ("accumulation=3", r"batch_size must be a multiple of accumulation, got 128 and 3"),
        ("model.moe.num_selected_experts=9", "num_selected_experts must be between 1 and 8, got 9"),
        ("ema_decay=1.0", r"ema_decay must be >= 0 and < 1, got 1\.0"),
        ("loss=hinge", "loss must be .* got 'hinge'"),
    ],
)
def test_mistakes_are_one_clear_error(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        assign(get_recipe("fashion_mnist"), [text])
    assert "\n" not in str(caught.value)


def test_recipe_mistakes():
    with pytest.raises(ValueError, match="unknown recipe 'fashion_mnst'; did you mean 'fashion_mnist'"):
        get_recipe("fashion_mnst")
    with pytest.raises(ValueError, match="recipe 'finetune' fine-tunes trained weights: use visionmoe finetune"):
        get_recipe("finetune")
    with pytest.raises(ValueError, match="recipe 'imagenet1k' starts from scratch: use visionmoe train"):
        get_finetuning("imagenet1k", "x")
    with pytest.raises(ValueError, match="unknown model 'vmoe_b17'"):
        get_recipe("imagenet21k", "vmoe_b17")
    config = get_finetuning("finetune", "x")
    with pytest.raises(ValueError, match=r"takes its model from init_from; use model_options\.mlp_dim="):
        assign(config, ["model.mlp_dim=3"])
    with pytest.raises(ValueError, match=r"give model .* or init_from"):
        dataclasses.replace(config, init_from=None)
    with pytest.raises(ValueError, match=r"optimizer\.options cannot hold 'weight_decay'"):
        OptimizerConfig(options={"weight_decay": 0.1}).arguments()


def test_finetuning_takes_the_size_that_a_folder_states(tmp_path):
    model = vm.ModelConfig(image_size=(28, 56), patch_size=14, in_channels=1, num_classes=5, hidden_size=16,
                           num_layers=1, mlp_dim=24, num_heads=2)  # fmt: skip
    vm.create_model(model).save_pretrained(tmp_path)
    config = get_finetuning("finetune", str(tmp_path))
    assert (config.data.image_size, config.data.in_channels) == ((28, 56), 1)
    assert get_finetuning("finetune", "vmoe_x").data.image_size == 224


def test_finetuning_takes_the_size_of_a_checkpoint_with_its_config(tmp_path):
    model = vm.ModelConfig(image_size=32, patch_size=8, in_channels=1, num_classes=5, hidden_size=16, num_layers=1,
                           mlp_dim=24, num_heads=2)  # fmt: skip
    write_vmoe(tmp_path / "ckpt", params_to_vmoe(vm.create_model(model).state_dict(), model))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(model)))
    config = get_finetuning("finetune", str(tmp_path / "ckpt"), str(tmp_path / "config.json"))
    assert (config.data.image_size, config.data.in_channels) == (32, 1)
    assert config.init_config == str(tmp_path / "config.json")


def test_read_config_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"stepz": 3}')
    with pytest.raises(ValueError, match=r"config\.json: unknown option 'stepz'"):
        read_config(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(str(path))


def test_with_model_keeps_the_images_and_classes():
    config = with_model(get_recipe("fashion_mnist"), vm.ModelConfig(patch_size=14, num_layers=2))
    assert (config.model.image_size, config.model.in_channels, config.model.num_classes) == (28, 1, 10)
    assert get_recipe("cifar10_small", "vit_s32").model.num_layers == 8
