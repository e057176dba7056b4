"""Fine-tuning: the reference's recipes, the head, layer-wise decay of the rate, freezing, and no steps at all."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import visionmoe as vm
from visionmoe.cli import main
from visionmoe.model.pretrained import read_pretrained_config
from visionmoe.train.config import OptimizerConfig, TrainConfig, assign, read_config
from visionmoe.train.finetuning import ROUTERS, decide_head, layer_decay_factors
from visionmoe.train.log import read_log
from visionmoe.train.optim import create_optimizer, create_schedule
from visionmoe.train.recipes import get_finetuning
from visionmoe.train.setup import prepare

TINY = ["model.num_layers=2", "model.moe.layers=[1]", "model.hidden_size=16", "model.mlp_dim=32", "model.num_heads=2",
        "data.train_split=train[:400]", "data.eval_split=test[:100]", "data.batch_size=50", "tensorboard=false",
        "data.eval_batch_size=40", "model.moe.capacity_factor=0.6"]  # fmt: skip
PROGRAM = ["--set", "tensorboard=false"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 40 steps: better than chance, capacity scarce, batches of 40 in evaluation."""
    out = tmp_path_factory.mktemp("trained") / "run"
    sets = [word for text in TINY for word in ("--set", text)]
    assert main(["train", "--steps", "40", "--out", str(out), *sets]) == 0
    assert results(out)["eval"]["test"]["top1"] > 0.15
    return out


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def finetune(run, out, *arguments):
    return main(["finetune", str(run), "--out", str(out), *PROGRAM, *arguments])


def evaluated(run, out, *arguments):
    assert main(["evaluate", str(run), "--out", str(out), *arguments]) == 0
    return results(out)


def same(tuned, expected):
    ours = results(tuned)["eval"]["test"]
    return all(ours[name] == expected[name] for name in ("num_images", "top1", "top5", "loss", "per_class_accuracy"))


# -- recipes: the table in section 4 of the reference, column fine-tuning -----------------------------------------


@pytest.mark.parametrize(
    ("recipe", "size", "steps", "peak", "warmup"),
    [("finetune_imagenet", 384, 10_000, 0.003, 500), ("finetune_cifar10", 128, 1000, 0.0015, 100)],
)
def test_recipes_are_the_references(recipe, size, steps, peak, warmup):
    config = get_finetuning(recipe, "vmoe_b16_imagenet21k_randaug_strong")
    assert config.loss == "softmax" and config.label_smoothing == 0.0
    assert (config.steps, config.data.batch_size, config.data.image_size) == (steps, 1024, size)
    assert (config.data.crop, config.data.flip) == ("inception", True)
    assert (config.data.randaugment_ops, config.data.mixup_alpha) == (0, 0.0)
    assert config.model_options == {"capacity_factor": 1.5}
    arguments = config.optimizer.arguments()
    assert (arguments["name"], arguments["momentum"], arguments["weight_decay"]) == ("sgd", 0.9, 0.0)
    assert arguments["gradient_clip"] == {"global_norm": 10.0}
    schedule = create_schedule(**arguments["learning_rate"], total_steps=steps)
    assert schedule(warmup) == pytest.approx(peak)
    assert schedule(warmup // 2) == pytest.approx(peak / 2)
    # Half-way through the cosine the rate is the mean of its ends.
    assert schedule((warmup + steps) // 2) == pytest.approx((peak + 1e-5) / 2)
    assert schedule(steps) == pytest.approx(1e-5)


def test_the_general_recipe_is_the_same_at_a_smaller_size(trained):
    config, reference = get_finetuning("finetune", str(trained / "model")), get_finetuning("finetune_imagenet", "x")
    assert config.optimizer.options == reference.optimizer.options
    assert config.optimizer.gradient_clip == reference.optimizer.gradient_clip
    assert config.optimizer.learning_rate.peak_value == reference.optimizer.learning_rate.peak_value
    assert (config.data.image_size, config.data.in_channels, config.new_head) == (28, 1, None)


# -- no steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--set", "ema_decay=0.9"], ["--head", "keep"]])
def test_no_steps_on_the_runs_own_images_change_nothing(trained, tmp_path, more):
    assert finetune(trained, tmp_path / "tuned", "--steps", "0", *more) == 0
    before, after = weights(trained), weights(tmp_path / "tuned")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    expected = evaluated(trained, tmp_path / "before")
    assert same(tmp_path / "tuned", expected)
    after = evaluated(tmp_path / "tuned", tmp_path / "after")
    assert (after["top1"], after["loss"], after["routing"]) == (expected["top1"], expected["loss"], expected["routing"])
    config = read_config(str(tmp_path / "tuned" / "config.json"))
    assert (config.data.eval_split, config.data.eval_batch_size) == ("test[:100]", 40)


def test_no_steps_at_another_routing_setting(trained, tmp_path):
    assert finetune(trained, tmp_path / "tuned", "--steps", "0", "--set", "model_options.capacity_factor=1.5") == 0
    assert same(tmp_path / "tuned", evaluated(trained, tmp_path / "e", "--capacity-factor", "1.5"))


def test_no_steps_with_the_reference_recipe(trained, tmp_path):
    changes = ("data.image_size=28", "data.in_channels=1", "data.eval_split=test[:100]", "data.workers=0")
    sets = [word for text in changes for word in ("--set", text)]
    recipe = ["--recipe", "finetune_cifar10", "--data", "fashion-mnist", *sets]
    assert finetune(trained, tmp_path / "tuned", "--steps", "0", *recipe) == 0
    # The recipe's capacity factor and batch size.
    arguments = ["--data", "fashion-mnist", "--split", "test[:100]", "--capacity-factor", "1.5", "--batch-size", "256"]
    assert same(tmp_path / "tuned", evaluated(trained, tmp_path / "e", *arguments))


def test_no_steps_at_another_resolution_and_back(trained, tmp_path):
    # From 4 x 4 patches to 7 x 7 and back: 7 - 1 is a multiple of 4 - 1, so the old positions are among the new ones.
    assert finetune(trained, tmp_path / "large", "--steps", "0", "--image-size", "49") == 0
    assert same(tmp_path / "large", evaluated(trained, tmp_path / "e", "--image-size", "49"))
    assert finetune(tmp_path / "large", tmp_path / "back", "--steps", "0", "--image-size", "28") == 0
    before, after = weights(trained), weights(tmp_path / "back")
    torch.testing.assert_close(after["pos_embed"], before["pos_embed"], rtol=0, atol=1e-6)
    first, last = results(trained)["eval"]["test"], results(tmp_path / "back")["eval"]["test"]
    assert last["top1"] == first["top1"] and last["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_evaluation_prepares_images_as_the_run_that_is_fine_tuned(trained, tmp_path):
    base = tmp_path / "base"
    sets = [word for text in [*TINY, "data.eval_resize=34"] for word in ("--set", text)]
    assert main(["train", "--steps", "2", "--out", str(base), *sets]) == 0
    expected = evaluated(base, tmp_path / "e")
    assert vm.load(base / "model").preprocessing.resize_to == 34
    assert finetune(base, tmp_path / "tuned", "--steps", "0") == 0
    assert read_config(str(tmp_path / "tuned" / "config.json")).data.eval_resize == 34
    assert same(tmp_path / "tuned", expected)
    # At another size the crop keeps its proportion: 34 / 28 * 49 = 59.5.
    assert finetune(base, tmp_path / "large", "--steps", "0", "--image-size", "49") == 0
    assert read_config(str(tmp_path / "large" / "config.json")).data.eval_resize == 60
    assert same(tmp_path / "large", evaluated(base, tmp_path / "e", "--image-size", "49"))


# -- the head ----------------------------------------------------------------------------------------------------

TEN, OTHER = tuple("abcdefghij"), tuple("abcdefghiz")


@pytest.mark.parametrize(("head", "width"), [("new", None), ("keep", 24)])
def test_pre_logits_goes_with_the_head(trained, tmp_path, head, width):
    config = vm.load(trained / "model").config.replace(representation_size=24)
    vm.create_model(config).save_pretrained(tmp_path / "wide")
    few = ["--set", "data.train_split=train[:100]", "--set", "data.eval_split=test[:100]"]
    arguments = ["--data", "fashion-mnist", "--steps", "1", "--head", head, *few]
    assert finetune(tmp_path / "wide", tmp_path / "tuned", *arguments) == 0
    assert vm.load(tmp_path / "tuned" / "model").config.representation_size == width


@pytest.mark.parametrize(
    ("wanted", "stored", "names", "new", "reason"),
    [
        (None, {}, TEN, False, "the head is kept: the checkpoint has the same 10 classes (by name)"),
        (None, {}, None, False, "the head is kept: the checkpoint has the same 10 classes (by number"),
        (None, {}, OTHER, True, "the head is new: the checkpoint's classes have other names ('z', not 'j')"),
        (None, {"num_classes": 7}, None, True, "the head is new: the checkpoint has 7 classes, the images have 10"),
        (None, {"num_classes": None}, None, True, "the checkpoint has no classes, the images have 10"),
        (None, {"representation_size": 8}, TEN, True, "the head is new: representation_size was 8 and is None"),
        (True, {}, TEN, True, "the head is new, as asked for"),
        (False, {}, OTHER, False, "the head is kept, as asked for"),
    ],
)
def test_which_head(wanted, stored, names, new, reason):
    final = vm.ModelConfig(num_classes=10)
    decision = decide_head(wanted, final.replace(**stored), final, names, TEN)
    assert decision.new == new and reason in decision.reason


def test_a_head_that_cannot_be_kept():
    with pytest.raises(ValueError, match="the head cannot be kept: the checkpoint has 3 classes, the images have 10"):
        decide_head(False, vm.ModelConfig(num_classes=3), vm.ModelConfig(num_classes=10), None, TEN)


def test_a_run_knows_its_classes_and_other_ones_get_a_new_head(trained, tmp_path):
    names = read_pretrained_config(trained / "model").class_names
    assert names is not None and len(names) == 10 and "Trouser" in names
    for number in range(10):  # as many classes, other names
        folder = tmp_path / "other" / f"class{number}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((28, 28), 20 * number, np.uint8)).save(folder / "1.png")
    arguments = ["--data", f"folder:{tmp_path / 'other'}", "--set", "data.eval_split=train", "--steps", "0"]
    assert finetune(trained, tmp_path / "tuned", *arguments) == 0
    assert not weights(tmp_path / "tuned")["head.weight"].any()
    messages = [record["message"] for record in read_log(tmp_path / "tuned" / "log.jsonl") if "message" in record]
    assert any("other names" in message for message in messages)
    assert any("0 steps: a head that was not trained" in message for message in messages)
    assert read_pretrained_config(tmp_path / "tuned" / "model").class_names == tuple(f"class{n}" for n in range(10))
    assert finetune(trained, tmp_path / "kept", *arguments, "--head", "keep") == 0
    assert torch.equal(weights(tmp_path / "kept")["head.weight"], weights(trained)["head.weight"])


# -- layer-wise decay of the rate --------------------------------------------------------------------------------


def test_layer_decay_by_hand():
    torch.manual_seed(0)
    config = vm.ModelConfig(
        image_size=8, patch_size=4, num_classes=3, hidden_size=8, num_layers=2, mlp_dim=12, num_heads=2,
        moe=vm.MoEConfig(num_experts=2, layers=(1,), num_selected_experts=1),
    )  # fmt: skip
    model = vm.create_model(config)
    factors = layer_decay_factors(0.5, num_layers=2)
    optimizer = create_optimizer(
        model.named_parameters(), name="sgd", total_steps=1, learning_rate=1.0, learning_rate_factors=factors
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # a gradient of 1 at rate 1: every parameter moves by its factor
    moved = {name: (before[name] - p.detach()).mean().item() for name, p in model.named_parameters()}
    for name, step in moved.items():
        # L + 1 = 3. Depth 0: 0.5^3; block 0, depth 1: 0.5^2; block 1, depth 2, its experts and router: 0.5; head 1.
        depth = {"patch_embed": 0, "cls_token": 0, "pos_embed": 0, "norm": 3, "head": 3}.get(name.split(".")[0])
        depth = int(name.split(".")[1]) + 1 if depth is None else depth
        assert step == pytest.approx(0.5 ** (3 - depth), rel=1e-5), name
    assert "blocks.1.mlp.router.gate.weight" in moved and "blocks.1.mlp.experts.fc1.weight" in moved


def test_layer_decay_of_a_run_and_factors_that_come_first(trained, tmp_path):
    config = assign(
        get_finetuning("finetune", str(trained / "model")),
        [f"out={tmp_path}", "data.source=fashion-mnist", "optimizer.layer_decay=0.5",
         "optimizer.learning_rate_factors=[['router', 3.0]]"],
    )  # fmt: skip
    parts = prepare(config, resume=False)
    names = {id(p): name for name, p in parts.model.named_parameters()}
    factor = {names[id(p)]: group["rate_factor"] for group in parts.optimizer.param_groups for p in group["params"]}
    assert factor["blocks.1.mlp.router.gate.weight"] == 3.0
    assert factor["blocks.1.mlp.experts.fc1.weight"] == 0.5 and factor["blocks.0.attn.qkv.weight"] == 0.25
    assert factor["pos_embed"] == 0.125 and factor["head.weight"] == factor["norm.weight"] == 1.0


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1, float("nan")])
def test_layer_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match="layer_decay must be > 0 and <= 1, got"):
        OptimizerConfig(layer_decay=decay)
    with pytest.raises(ValueError, match="layer_decay must be > 0 and <= 1, got"):
        layer_decay_factors(decay, 2)


# -- freezing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "frozen"),
    [
        (["--freeze-router"], ROUTERS),
        (["--freeze", r"^patch_embed\.", "pos_embed", r"blocks\.0\."], r"^patch_embed\.|pos_embed|blocks\.0\."),
        (["--freeze", "experts", "--freeze-router"], r"experts|\.router\."),
        (["--set", "optimizer.frozen_pattern=mlp"], "mlp"),
        (["--set", "optimizer.trainable_pattern=^head"], "^(?!head)"),
    ],
)
def test_frozen_parameters_stay_bitwise_and_all_others_change(trained, tmp_path, arguments, frozen):
    noise = ["--set", "optimizer.weight_decay=0.1", "--set", "ema_decay=0.5", "--set", "data.batch_size=50"]
    assert finetune(trained, tmp_path / "tuned", "--steps", "3", *noise, *arguments) == 0
    before, after = weights(trained), weights(tmp_path / "tuned")
    expected = {name for name in before if re.search(frozen, name)}
    assert expected and {name for name in before if torch.equal(before[name], after[name])} == expected


def test_frozen_parameters_get_no_gradients(trained, tmp_path):
    config = assign(
        get_finetuning("finetune", str(trained / "model")),
        [f"out={tmp_path}", "data.source=fashion-mnist", "optimizer.frozen_pattern=blocks"],
    )
    parts = prepare(config, resume=False)
    for name, parameter in parts.model.named_parameters():
        assert parameter.requires_grad == ("blocks" not in name)
    parts.forward(torch.zeros(4, 1, 28, 28)).logits.square().sum().backward()
    assert all((p.grad is None) == ("blocks" in name) for name, p in parts.model.named_parameters())


def test_a_frozen_run_resumes(trained, tmp_path):
    common = ["--freeze-router", "--layer-decay", "0.7", "--steps", "4", "--set", "checkpoint_every=2",
              "--set", "data.batch_size=50"]  # fmt: skip
    assert finetune(trained, tmp_path / "a", *common) == 0
    assert finetune(trained, tmp_path / "b", *common) == 0
    for path in (tmp_path / "b" / "checkpoints").glob("step_00000004/*"):
        path.unlink()
    (tmp_path / "b" / "checkpoints" / "step_00000004").rmdir()
    assert finetune(trained, tmp_path / "b", *common, "--resume") == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_with_other_options_says_so(trained, tmp_path, capfd):
    out = tmp_path / "tuned"
    assert finetune(trained, out, "--epochs", "0.25", "--freeze-router") == 0  # shorter than the recipe's warm-up
    assert finetune(trained, out, "--freeze-router", "--resume") == 0  # what was given before may be given again
    changes = {
        "init_from": ["nowhere"],
        "recipe": [str(trained), "--recipe", "finetune_cifar10"],
        "new_head": [str(trained), "--head", "new"],
        "optimizer.frozen_pattern": [str(trained), "--freeze", "head"],
        "optimizer.layer_decay": [str(trained), "--layer-decay", "0.5"],
        "init_config": [str(trained), "--model-config", "x.json"],
    }
    for name, arguments in changes.items():
        capfd.readouterr()
        assert main(["finetune", *arguments, "--out", str(out), "--resume"]) == 2, name
        error = capfd.readouterr().err
        assert "a resumed run must keep its" in error and name in error, error


# -- mistakes ----------------------------------------------------------------------------------------------------

MISTAKES = {
    "pattern without a match": (["--freeze", "router", "gates"], "frozen_pattern: no parameter matches 'gates'"),
    "not a pattern": (["--freeze", "("], "'(' is not a regular expression"),
    "nothing left": (["--freeze", "."], "frozen_pattern or trainable_pattern leaves no parameter to train"),
    "frozen and trainable": (["--freeze-router", "--set", "optimizer.trainable_pattern=head"], "not both"),
    "layer decay": (["--layer-decay", "1.5"], "layer_decay must be > 0 and <= 1, got 1.5"),
    "no such head": (["--head", "old"], "('auto', 'keep', 'new')"),
    "option of the model": (
        ["--set", "model_options.capacity_factor=high"],
        "model_options.moe.capacity_factor must be float, got 'high'",
    ),
    "routing of a layer": (
        ["--set", "model_options.layer_routing={'1': 3}"],
        "model_options.moe.layer_routing.1 must be a table of options, got 3",
    ),
    "option of the optimizer": (["--set", "optimizer.options.momentum=x"], "optimizer.options.momentum must be float"),
    "warm-up": (["--set", "optimizer.learning_rate.warmup_steps=3"], "must be less than the run's 3 steps, got 3"),
    "size": (["--image-size", "30"], "image_size must be a multiple of patch_size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_stop_before_the_first_step(trained, tmp_path, capfd, mistake):
    arguments, expected = MISTAKES[mistake]
    assert finetune(trained, tmp_path / "tuned", "--steps", "3", *arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("visionmoe finetune: ") and expected in lines[0]
    assert not (tmp_path / "tuned" / "log.jsonl").exists()


def test_a_dense_model_has_no_router_to_freeze(tmp_path, capfd):
    config = vm.ModelConfig(image_size=28, patch_size=14, in_channels=1, num_classes=10, hidden_size=8, num_layers=1,
                            mlp_dim=8, num_heads=1)  # fmt: skip
    vm.create_model(config).save_pretrained(tmp_path / "dense")
    common = ["--steps", "1", "--freeze-router"]
    assert finetune(tmp_path / "dense", tmp_path / "tuned", "--data", "fashion-mnist", *common) == 2
    assert "no parameter matches" in capfd.readouterr().err
    # A folder that is no run does not say its images.
    assert finetune(tmp_path / "dense", tmp_path / "tuned", "--steps", "1") == 2
    assert "is no run that says its images: give --data" in capfd.readouterr().err


def test_few_shot_evaluation_is_part_of_the_config():
    with pytest.raises(ValueError, match=r"fewshot\.every must be >= 1, got 0"):
        assign(
            TrainConfig(model=vm.ModelConfig(image_size=28, patch_size=7, in_channels=1), steps=1), ["fewshot.every=0"]
        )
