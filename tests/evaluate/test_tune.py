"""Tuning on a model of which the test knows what each layer is worth."""

import itertools
import math

import pytest
import torch

import visionmoe as vm
from visionmoe.config import RoutingSetting
from visionmoe.evaluate.adaptive import apply_routing, layer_settings, restored_routing
from visionmoe.evaluate.allocation import level_of
from visionmoe.evaluate.calibrated import CalibratedEvaluator
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.forward import Batch
from visionmoe.evaluate.speed import FRACTIONS, Speed, budget_for_speed
from visionmoe.evaluate.tune import (
    Tuned,
    _verdict,
    check_budget,
    flops_at,
    lowest_routing,
    most_evaluations,
    tune,
)

CONFIG = vm.ModelConfig(
    image_size=16, patch_size=4, in_channels=1, num_classes=5, hidden_size=32, num_layers=4, mlp_dim=64, num_heads=2,
    pooling="gap", moe=vm.MoEConfig(num_experts=4, layers=(1, 3)),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> vm.VisionTransformer:
    """Block 1's experts answer nothing, block 3's matter: all compute of block 1 is wasted."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = vm.create_model(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
        model.blocks[3].mlp.experts.fc2.weight.mul_(4)
        for parameter in model.blocks[1].mlp.experts.fc2.parameters():
            parameter.zero_()
        images = torch.rand(64, 1, 16, 16) * 2 - 1
        model.head.bias.sub_(model(images).logits.mean(0))  # all classes occur
    return model


def batches(model: vm.VisionTransformer, seed: int, count: int = 4) -> list[Batch]:
    """Images whose labels are what the model answers at full compute."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        images = torch.rand(64, 1, 16, 16, generator=generator) * 2 - 1
        with torch.no_grad():
            labels = model(images).logits.argmax(1)
        made.append((images, labels, torch.arange(64)))
    return made


def run(model: vm.VisionTransformer, share: float, **options) -> tuple[Tuned, int]:
    budget = round(share * vm.count_flops(model, batch_size=64))
    calibrate = CalibratedEvaluator(batches(model, 1))
    check = CalibratedEvaluator(batches(model, 2), keep_images=True)
    return tune(model, budget, calibrate, check, batch_size=64, **options), budget


@pytest.fixture(scope="module")
def tuned(model: vm.VisionTransformer) -> tuple[Tuned, int]:
    return run(model, 0.8)


def test_compute_goes_where_it_matters(model: vm.VisionTransformer, tuned: tuple[Tuned, int]):
    result, budget = tuned
    assert result.kept == "tuned"
    levels = {layer: level_of(setting) for layer, setting in result.chosen.routing.items()}
    assert levels[3] > 3 * levels[1]
    assert all(setting.batch_priority for setting in result.chosen.routing.values())
    for candidate in (result.uniform, result.chosen):
        assert candidate.flops <= budget
        assert candidate.flops == flops_at(model, candidate.routing, 64) > 0.97 * budget
    assert len({(s.num_selected_experts, s.capacity_factor) for s in result.uniform.routing.values()}) == 1


def test_held_out_images_agree(model: vm.VisionTransformer, tuned: tuple[Tuned, int]):
    result, _ = tuned
    held_out, accuracy = ClassificationEvaluator(batches(model, 3)), {}
    with restored_routing(model):
        for name, candidate in {"uniform": result.uniform, "tuned": result.chosen}.items():
            apply_routing(model, candidate.routing)
            accuracy[name] = held_out(model)["top1"]
    assert accuracy["tuned"] > accuracy["uniform"] + 0.02


def test_all_that_was_tried_is_told_and_bounded(model: vm.VisionTransformer, tuned: tuple[Tuned, int]):
    result, budget = tuned
    assert len(result.tried) <= most_evaluations(model)
    assert {c.stage for c in result.tried} == {"uniform", "sensitivity", "plan", "search"}
    settings = [tuple(sorted(c.routing.items())) for c in result.tried]
    assert len(set(settings)) == len(settings)
    within = [c.calibrated_loss for c in result.tried if c.flops <= budget]
    assert result.best.calibrated_loss == min(within)
    assert set(result.check) == {"uniform", "tuned"}


def test_the_models_own_routing_comes_back(model: vm.VisionTransformer):
    config = model.config

    def broken(model: vm.VisionTransformer) -> dict:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tune(model, vm.count_flops(model) * 8 // 10, broken, broken)
    assert model.config == config
    assert layer_settings(model) == {1: RoutingSetting(2, 1.05, False), 3: RoutingSetting(2, 1.05, False)}
    assert model.moe_layer(3).setting == RoutingSetting(2, 1.05, False)


def test_the_uniform_setting_is_kept_when_the_check_does_not_agree(
    model: vm.VisionTransformer, tuned: tuple[Tuned, int]
):
    """The check images' labels here are those of the uniform setting itself."""
    first, budget = tuned
    with restored_routing(model):
        apply_routing(model, first.uniform.routing)
        check = CalibratedEvaluator(batches(model, 2), keep_images=True)
    calibrate = CalibratedEvaluator(batches(model, 1))
    result = tune(model, budget, calibrate, check, batch_size=64, curves=first.curves)
    assert result.best is not result.uniform
    assert result.kept == "uniform"
    assert result.chosen == result.uniform
    assert "uniform setting is kept" in result.reason
    assert all(c.stage != "sensitivity" for c in result.tried)  # those were given


def test_the_whole_budget_is_the_present_setting_in_priority_order(model: vm.VisionTransformer):
    result, _ = run(model, 1.0)
    assert result.uniform.routing == {layer: RoutingSetting(2, 1.05, True) for layer in (1, 3)}


def test_a_single_sparse_layer_has_uniform_settings_only():
    torch.manual_seed(0)
    model = vm.create_model(CONFIG, layers=(3,)).eval()
    torch.nn.init.normal_(model.head.weight)
    result, budget = run(model, 0.9)
    assert (result.kept, result.curves) == ("uniform", {})
    assert result.chosen.flops <= budget


@pytest.mark.parametrize("share", [0.2, 1.01])
def test_budgets_out_of_reach(model: vm.VisionTransformer, share: float):
    # Per image: 16 tokens; block's rest 16 * 4 * 32^2 + 2 * 16^2 * 32 = 81,920, dense MLP 65,536, gate 2,048, patches
    # 8,192, head 160 multiply-adds. Experts: 16 * level * 4,096, level 2 now and 0.1 at the lowest.
    rest = 4 * 81_920 + 2 * 65_536 + 2 * 2_048 + 8_192 + 160
    present, lowest = rest + 2 * 16 * 2 * 4_096, rest + 2 * 16 * 0.1 * 4_096
    assert vm.count_flops(model) == 2 * present
    allowed = rf"between {lowest / present:.3f} \(the lowest setting\) and 1 \(the present one\)"
    with pytest.raises(ValueError, match=rf"{allowed} .* got {share}"):
        check_budget(model, round(share * 2 * present))


def test_models_that_cannot_be_tuned():
    def never(model: vm.VisionTransformer) -> dict:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="no sparse layers"):
        tune(vm.create_model(CONFIG, layers=()), 1, never, never)
    with pytest.raises(ValueError, match="its router is 'expert_choice'"):
        tune(vm.create_model(CONFIG, router="expert_choice"), 1, never, never)


@pytest.mark.parametrize("share", [0.83, 0.9, 0.97])
def test_small_groups_have_few_capacities_and_stay_within_the_budget(share: float):
    """17 tokens, 8 experts, places in fours: K = 1 costs 1 expert per token, K = 2 32 / 17 or 2, nothing between."""
    torch.manual_seed(0)
    model = vm.create_model(CONFIG.replace(pooling="token", num_experts=8, group_size="image")).eval()
    torch.nn.init.normal_(model.head.weight)
    result, budget = run(model, share)
    assert all(c.flops <= budget for c in (result.uniform, result.chosen))
    if share < 0.94:  # two layers of K = 1, of which each saves 0.09
        assert {s.num_selected_experts for s in result.uniform.routing.values()} == {1}


def test_a_budget_above_what_one_expert_costs_also_tries_one_expert(model: vm.VisionTransformer):
    result, budget = run(model, 0.9)
    uniform = [c.routing[1] for c in result.tried if c.stage == "uniform"]
    assert [s.num_selected_experts for s in uniform] == [1, 2]
    assert uniform[0].capacity_factor >= 1
    assert all(c.flops <= budget for c in result.tried if c.stage == "uniform")


def test_capacities_that_round_to_no_place_are_not_tried():
    """16 tokens, 4 experts: K = 1 at C = 0.05 * 2 is 0.4 places, which round to 0."""
    torch.manual_seed(0)
    rounded = CONFIG.replace(group_size="image", capacity_ceil_or_round="round", capacity_multiple_of=None)
    model = vm.create_model(rounded).eval()
    torch.nn.init.normal_(model.head.weight)
    result, budget = run(model, 0.7)
    assert result.chosen.flops <= budget
    for candidate in result.tried:
        for s in candidate.routing.values():
            assert round(16 * s.num_selected_experts * s.capacity_factor / 4) >= 1


def test_settings_whose_loss_is_not_finite_are_worse_than_all_others(model: vm.VisionTransformer):
    """Losses that are not numbers where block 3 has less than half of an expert."""
    calibrate = CalibratedEvaluator(batches(model, 1))

    def broken(model: vm.VisionTransformer) -> dict:
        result = calibrate(model)
        return result | ({"calibrated_loss": math.nan} if level_of(model.config.moe.routing(3)) < 0.5 else {})

    budget = round(0.8 * vm.count_flops(model, batch_size=64))
    check = CalibratedEvaluator(batches(model, 2), keep_images=True)
    result = tune(model, budget, broken, check, batch_size=64)
    assert result.kept == "tuned"
    assert any(math.isinf(c.calibrated_loss) for c in result.tried)

    def never_finite(model: vm.VisionTransformer) -> dict:
        return {"calibrated_loss": math.nan, "top1": 0.0}

    with pytest.raises(ValueError, match="not finite at any setting"):
        tune(model, budget, never_finite, check, batch_size=64)


def clock(model: vm.VisionTransformer, slope: float = 1e-9, start: float = 1e-4):
    """A machine whose time per image is start + slope * operations."""

    def speeds(settings, what):
        return [1 / (start + slope * flops_at(model, setting, 64)) for setting in settings]

    return speeds


def test_a_speed_becomes_a_budget(model: vm.VisionTransformer):
    most, least = vm.count_flops(model, batch_size=64), flops_at(model, lowest_routing(model), 64)
    middle = (most + least) // 2
    budget = budget_for_speed(model, 1 / (1e-4 + 1e-9 * middle), 64, clock(model))
    assert budget == pytest.approx(middle, rel=1e-4)
    slow, fast = (1 / (1e-4 + 1e-9 * flops) for flops in (most, least))
    allowed = rf"between {slow:.1f} \(the present setting\) and {fast:.1f} \(the lowest\)"
    for wanted in (slow * 0.9, fast * 1.1):
        with pytest.raises(ValueError, match=allowed):
            budget_for_speed(model, wanted, 64, clock(model))
    assert FRACTIONS[0] == 1.0


def test_a_missed_speed_tightens_the_budget(model: vm.VisionTransformer):
    most = vm.count_flops(model, batch_size=64)
    speed = Speed(wanted=105.0, reached=102.0, present=100.0, attempts=1)
    assert not speed.met and Speed(100.0, 99.1, 90.0, 1).met
    # From the present setting to this one: 1/100 - 1/102 s for the operations saved; 1/102 - 1/105 s are missing.
    flops = int(0.9 * most)
    missing = (1 / 102 - 1 / 105) / (1 / 100 - 1 / 102) * (most - flops)
    assert speed.tightened(model, flops, flops, 64) == pytest.approx(flops - 1.2 * missing, abs=2)
    # Not faster than the present setting in spite of fewer operations: noise. A twentieth of the range less.
    least = flops_at(model, lowest_routing(model), 64)
    noisy = Speed(wanted=105.0, reached=100.0, present=101.0, attempts=1)
    assert noisy.tightened(model, flops, flops, 64) == pytest.approx(flops - 1.2 * 0.05 * (most - least), abs=2)
    assert speed.tightened(model, least, least, 64) == least


def test_lowest_routing_is_the_cheapest(model: vm.VisionTransformer):
    lowest = flops_at(model, lowest_routing(model))
    for k, level in itertools.product((1, 2), (0.1, 0.5)):
        routing = {layer: RoutingSetting(k, level / k, True) for layer in (1, 3)}
        assert flops_at(model, routing) >= lowest


@pytest.mark.parametrize(("others", "said"), [((1.9, 2.3), "lower"), ((-0.1, 0.3), "higher")])
def test_the_verdict_says_which_loss_is_lower(others, said):
    tuned = {"image_losses": (1.0, 1.2), "top1": 0.5}
    uniform = {"image_losses": others, "top1": 0.5}  # by 0.9 and 1.1 apart: deviation 0.1 sqrt(2), error 0.1
    assert f"the loss is 1.0000 +- 0.1000 {said} than with the uniform" in _verdict(False, tuned, uniform)[1]
