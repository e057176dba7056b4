"""Times in turns."""

import time

import pytest
import torch

import visionmoe as vm
from visionmoe.config import RoutingSetting
from visionmoe.evaluate.timing import affordable_batch, take_turns, time_settings


def test_every_run_has_its_turn_in_every_round():
    order: list[str] = []
    seen: list[int] = []
    timing = take_turns(
        [lambda: order.append("a"), lambda: order.append("b")], rounds=3, on_run=lambda: seen.append(len(order))
    )
    assert "".join(order) == "ab" * 4  # one round before the three that count
    assert (timing.rounds, len(timing.seconds), len(seen)) == (3, 2, 8)


def test_the_median_forgets_one_slow_round():
    pauses = iter([0.0, 0.0, 0.1, 0.0])
    timing = take_turns([lambda: time.sleep(next(pauses))], rounds=3)
    assert timing.seconds[0] < 0.05


def test_slow_runs_get_fewer_rounds_but_one():
    timing = take_turns([lambda: time.sleep(0.02)], rounds=50, max_seconds=0.01)
    assert timing.rounds == 1


class Slow(torch.nn.Module):
    """Takes 10 ms per image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> None:
        self.seen.append(len(images))
        time.sleep(0.01 * len(images))


def test_slow_models_get_smaller_batches():
    model, images = Slow(), torch.rand(64, 1, 4, 4)
    # Two rounds of two calls: 40 ms per image.
    assert affordable_batch(model, images, 2, max_seconds=100) == 64
    assert model.seen == [1]  # one image was enough to know
    size = affordable_batch(model, images, 2, max_seconds=0.5)
    assert 4 <= size <= 8  # 0.5 / 0.04 = 12.5; doubled while that is affordable
    assert affordable_batch(model, images, 2, max_seconds=0.01) == 1


def test_small_batches_that_are_only_tried_say_nothing_of_their_capacity(caplog: pytest.LogCaptureFixture):
    model = vm.create_model(
        "vmoe_s32_e8_last2", image_size=64, num_classes=3, num_layers=2, layers=(1,), hidden_size=64
    )
    model.set_routing(capacity_factor=1.0123)  # a case that no other test has: each is said once
    assert affordable_batch(model, torch.rand(16, 3, 64, 64), 2) == 16
    assert not caplog.records
    model.eval()(torch.rand(3, 3, 64, 64))
    assert "capacity_factor 1.0123 was asked" in caplog.text


def test_settings_are_restored_and_fewer_places_take_less_time():
    torch.manual_seed(0)
    model = vm.create_model(
        vm.ModelConfig(image_size=32, patch_size=4, num_classes=3, hidden_size=128, num_layers=2, mlp_dim=1024,
                       num_heads=2, moe=vm.MoEConfig(num_experts=4, layers=(0, 1)))
    )  # fmt: skip
    config = model.config
    settings = [{0: RoutingSetting(2, c, True), 1: RoutingSetting(2, c, True)} for c in (1.0, 0.1)]
    timing = time_settings(model, torch.rand(8, 3, 32, 32), settings)
    assert model.config == config and model.training
    # Experts are 2 * 1024 * 128 * 2 * K of about 2 * 128 * 128 * 4 + ... per token: nine tenths of the whole.
    assert timing.seconds[1] < 0.7 * timing.seconds[0]
    with pytest.raises(ValueError, match="must be between 1 and 4, got 5"):
        time_settings(model, torch.rand(8, 3, 32, 32), [{0: RoutingSetting(5, 1.0, True)}])
    assert model.config == config
