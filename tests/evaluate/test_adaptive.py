"""Accuracy against compute: the grid, the figures of a point, and that the model's own routing comes back."""

import pytest
import torch

import visionmoe as vm
from visionmoe.config import RoutingSetting
from visionmoe.evaluate.adaptive import (
    SweepPoint,
    apply_routing,
    layer_settings,
    most_selected_experts,
    pareto_frontier,
    restored_routing,
    routing_grid,
    set_routing,
    sweep,
)
from visionmoe.evaluate.classify import ClassificationEvaluator

SMALL = vm.ModelConfig(
    image_size=8,
    patch_size=2,
    in_channels=1,
    num_classes=3,
    hidden_size=16,
    num_layers=4,
    mlp_dim=32,
    num_heads=2,
    pooling="gap",
    moe=vm.MoEConfig(num_experts=4, layers=(1, 3), capacity_factor=1.25),
)


def make(config: vm.ModelConfig = SMALL) -> vm.VisionTransformer:
    torch.manual_seed(0)
    model = vm.create_model(config)
    torch.nn.init.normal_(model.head.weight)
    return model


def batches(images: int = 8) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(images, 1, 8, 8) * 2 - 1, torch.randint(3, (images,)), torch.arange(images))]


def test_grid_is_every_combination():
    grid = routing_grid([1, 2], [1.0, 0.5], [False, True])
    assert grid[:3] == (RoutingSetting(1, 1.0, False), RoutingSetting(1, 0.5, False), RoutingSetting(1, 1.0, True))
    assert len(set(grid)) == 8


def test_points_say_what_each_setting_costs_and_drops():
    model = make()
    settings = routing_grid([1, 2], [0.25, 4.0])
    seen = []
    points = sweep(model, ClassificationEvaluator(batches()), settings, seen.append)
    assert seen == points
    for setting, point in zip(settings, points, strict=True):
        assert (point.num_selected_experts, point.capacity_factor, point.batch_priority) == (
            setting.num_selected_experts,
            setting.capacity_factor,
            setting.batch_priority,
        )
        # 8 images x 16 tokens = 128 tokens; at 4.0 every expert has a place for every request, at 0.25 the four
        # experts have 128 * K * 0.25 places together, so at least three quarters of the requests are dropped.
        assert point.dropped == 0 if setting.capacity_factor == 4.0 else point.dropped >= 0.75
        assert 0 <= point.top1 <= 1
        assert point.loss > 0
    # Operations of the experts: 2 layers x 16 tokens x K * min(1, C) x (D*F + F*D) multiply-adds, times two.
    by_setting = dict(zip(settings, points, strict=True))
    dearer, cheaper = by_setting[RoutingSetting(2, 4.0, True)], by_setting[RoutingSetting(1, 0.25, True)]
    assert dearer.flops - cheaper.flops == 2 * (2 * 16 * (2 - 0.25) * 2 * 16 * 32)


def test_order_does_not_matter_when_nothing_is_dropped():
    points = sweep(make(), ClassificationEvaluator(batches()), routing_grid([2], [4.0]))
    assert points[0].loss == pytest.approx(points[1].loss, rel=1e-6)


@pytest.mark.parametrize("layer_routing", [{}, {3: RoutingSetting(1, 0.75, True)}])
def test_the_models_own_routing_comes_back(layer_routing: dict[int, RoutingSetting]):
    model = make(SMALL.replace(layer_routing=layer_routing))
    config, image = model.config, batches()[0][0]
    before = model.eval()(image).logits
    sweep(model, ClassificationEvaluator(batches()), routing_grid([1], [0.25]))
    assert model.config == config
    assert torch.equal(model(image).logits, before)


def test_the_models_own_routing_comes_back_after_an_error():
    model = make()
    config = model.config
    with pytest.raises(RuntimeError, match="stop"), restored_routing(model):
        set_routing(model, RoutingSetting(1, 0.5, True))
        assert model.config != config
        raise RuntimeError("stop")
    assert model.config == config


def test_wrong_settings_are_found_before_anything_is_evaluated():
    def never(model: vm.VisionTransformer) -> dict[str, float]:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="num_selected_experts must be between 1 and 4, got 5"):
        sweep(make(), never, routing_grid([2, 5], [1.0]))
    with pytest.raises(ValueError, match="capacity_factor must be > 0 and finite, got 0"):
        sweep(make(), never, routing_grid([2], [0.0]))
    with pytest.raises(ValueError, match="no sparse layers"):
        sweep(make(SMALL.replace(layers=())), never, routing_grid([2], [1.0]))
    with pytest.raises(ValueError, match=r"layers must be among the sparse ones \[1, 3\], got \[0, 2\]"):
        sweep(make(), never, routing_grid([2], [1.0]), layers=[2, 3, 0])


def test_capacities_that_round_to_no_place_are_found_before_anything_is_evaluated():
    """16 tokens, 4 experts, K = 1: 0.1 is 0.4 places; an image more than one has places enough."""
    model = make(SMALL.replace(capacity_ceil_or_round="round", capacity_multiple_of=None))
    calls = []

    def evaluate(model: vm.VisionTransformer) -> dict:
        calls.append(model)
        return {}

    settings = routing_grid([1], [1.0, 0.1], [False])
    with pytest.raises(ValueError, match=r"capacity must be at least 1, got 0 .* capacity_factor=0.1"):
        sweep(model, evaluate, settings, batch_size=1)
    assert not calls
    assert len(sweep(model, ClassificationEvaluator(batches(2)), settings, batch_size=2)) == 2


def test_the_experts_per_token_of_the_layers_count_not_the_common_ones():
    model = make()
    model.set_routing(num_selected_experts=1, layers=[1, 3])
    assert model.config.moe.num_selected_experts == 2
    assert most_selected_experts(model) == 1
    model.set_routing(num_selected_experts=3, layers=[3])
    assert most_selected_experts(model) == 3


def test_only_some_layers_change():
    model = make()
    config, seen = model.config, []

    def evaluate(model: vm.VisionTransformer) -> dict:
        seen.append(layer_settings(model))
        return ClassificationEvaluator(batches())(model)

    points = sweep(model, evaluate, routing_grid([1], [0.5], [True]), layers=[3])
    assert seen == [{1: RoutingSetting(2, 1.25, False), 3: RoutingSetting(1, 0.5, True)}]
    # 16 tokens of 2 experts in block 1, of half an expert in block 3: 1.5 * 16 MLPs less than at full compute.
    assert vm.count_flops(model) - points[0].flops == 2 * 1.5 * 16 * 2 * 16 * 32
    assert model.config == config


def test_operations_at_a_batch_size():
    # 2 images x 16 tokens, K = 1, C = 0.1: 3.2 requests for 4 experts are 1 place each, raised to 4: 16 requests of 32.
    points = sweep(make(), ClassificationEvaluator(batches(2)), [RoutingSetting(1, 0.1, True)], batch_size=2)
    model = make()
    model.set_routing(1, 0.5)
    assert points[0].flops == vm.count_flops(model)


def test_frontier():
    def point(flops: int, top1: float) -> SweepPoint:
        return SweepPoint(1, 1.0, True, top1, 1.0, flops, 0.0, 1.0)

    # 30 is dearer than 20 and not better; 20 with 0.5 is worse than 20 with 0.6; equal points both stay.
    points = [point(10, 0.5), point(20, 0.6), point(20, 0.5), point(30, 0.6), point(40, 0.7), point(40, 0.7)]
    assert pareto_frontier(points) == [True, True, False, False, True, True]
    assert pareto_frontier([]) == []


def test_settings_of_all_layers_can_be_taken_and_given_back():
    model = make(SMALL.replace(layer_routing={3: RoutingSetting(1, 0.75, True)}))
    taken = layer_settings(model)
    assert taken == {1: RoutingSetting(2, 1.25, False), 3: RoutingSetting(1, 0.75, True)}
    set_routing(model, RoutingSetting(1, 0.1, True))
    apply_routing(model, taken)
    assert layer_settings(model) == taken
    assert model.moe_layer(3).setting == taken[3]
    apply_routing(model, dict.fromkeys((1, 3), taken[3]))
    assert model.config.moe.routing() == taken[3]  # one setting for all is the common one
