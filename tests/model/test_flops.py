"""count_flops against torch's own counter: what a routing setting pays for, and what a forward pass then does.

A setting pays for the requests that the experts have places for. Where some experts are asked less than they have
places for, fewer requests are kept, and the segments path computes only those: the difference is exactly the empty
places, which these tests take from the recorded routing.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import visionmoe as vm
from visionmoe.analysis.record import recording

SMALL = vm.ModelConfig(
    image_size=32, patch_size=8, hidden_size=64, num_layers=4, mlp_dim=256, num_heads=4, num_classes=10,
    moe=vm.MoEConfig(num_experts=8, layers=(1, 3)),
)  # fmt: skip
MEDIUM = vm.ModelConfig(
    image_size=64, patch_size=8, hidden_size=192, num_layers=4, mlp_dim=768, num_heads=6, num_classes=100,
    moe=vm.MoEConfig(num_experts=16, layers=(1, 2, 3)),
)  # fmt: skip
SIZES = {"small": (SMALL, 16), "medium": (MEDIUM, 8)}


def make(config: vm.ModelConfig) -> vm.VisionTransformer:
    torch.manual_seed(0)
    model = vm.create_model(config).eval()
    if config.moe.router != "soft":
        for layer in model.moe_layers:
            torch.nn.init.normal_(model.get_submodule(f"blocks.{layer}.mlp.router.gate").weight, std=0.3)
    return model


def counted(model: vm.VisionTransformer, images: int, bf16: bool = False) -> tuple[int, int]:
    """Operations of one forward pass by torch's counter, and places that its experts could not fill.

    Attention runs as plain matrix products here: of the fused kernels the counter knows CUDA's, not the CPU's.
    """
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(images, model.config.in_channels, *model.config.image_hw, generator=generator) * 2 - 1
    counter = FlopCounterMode(display=False)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with recording(model) as records, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), autocast, counter:
        model(pixels)
    empty = 0
    for (routing,) in records.values():
        groups, requests = routing.token_index.shape
        empty += min(requests, routing.num_experts * routing.capacity) * groups - int(routing.kept.sum())
    return counter.get_total_flops(), empty


def operations_of(requests: int, config: vm.ModelConfig) -> int:
    return requests * 2 * 2 * config.hidden_size * config.mlp_dim


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pooling", ["gap", "token", "map"])
@pytest.mark.parametrize("priority", [False, True])
def test_equals_torchs_counter_plus_the_empty_places(size: str, pooling: str, priority: bool):
    config, images = SIZES[size]
    model = make(config.replace(pooling=pooling))
    for k, factor in ((1, 1.5), (2, 1.05), (2, 0.5), (3, 0.13)):
        model.set_routing(k, factor, priority)
        actual, empty = counted(model, images)
        paid = vm.count_flops(model, batch_size=images) * images
        assert paid == pytest.approx(actual + operations_of(empty, config), rel=1e-3), (k, factor)
        assert actual <= paid * 1.001  # a setting is never dearer than it says


@pytest.mark.parametrize("size", SIZES)
def test_settings_of_single_layers_count(size: str):
    config, images = SIZES[size]
    model = make(config)
    for layer, setting in ((1, (1, 0.3, True)), (3, (3, 0.7, False))):
        model.set_routing(*setting, layers=[layer])
    actual, empty = counted(model, images)
    paid = vm.count_flops(model, batch_size=images) * images
    assert paid == pytest.approx(actual + operations_of(empty, config), rel=1e-3)
    # The same from the differences: only layer 1 back at K = 2, C = 1.05.
    tokens, groups = config.num_tokens, 2 * 2 * config.hidden_size * config.mlp_dim
    before = vm.count_flops(model)
    model.set_routing(2, 1.05, False, layers=[1])
    assert vm.count_flops(model) - before == pytest.approx(tokens * (2 - 0.3) * groups, abs=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("priority", [False, True])
def test_balanced_routing_does_what_is_counted(size: str, priority: bool):
    """Noise alone chooses here, so every expert is as likely: no correction, and 2 % of the whole model is enough.

    By chance some experts are still asked less than they have places for, so C is below 1. The size of the batch is
    not told to `count_flops`, so places are not rounded to multiples of 4 here.
    """
    config, images = SIZES[size]
    noise = config.moe.num_experts  # of standard deviation 1
    model = make(config.replace(noise_std=noise, capacity_multiple_of=None)).train()
    for layer in model.moe_layers:
        torch.nn.init.zeros_(model.get_submodule(f"blocks.{layer}.mlp.router.gate").weight)
    for k, factor in ((1, 0.9), (2, 0.9), (2, 0.25)):
        model.set_routing(k, factor, priority)
        actual, _ = counted(model, images * 4)
        assert vm.count_flops(model) * images * 4 == pytest.approx(actual, rel=0.02), (k, factor)


def test_rows_of_bfloat16_are_filled_up_by_less_than_sixteen_per_expert():
    model = make(SMALL)
    paid = vm.count_flops(model, batch_size=16) * 16
    actual, empty = counted(model, 16, bf16=True)
    kept = paid - operations_of(empty, SMALL)
    assert kept * (1 - 1e-3) <= actual <= kept * (1 + 1e-3) + operations_of(15 * 8 * 2, SMALL)  # 8 experts, 2 layers
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert actual > kept * (1 + 1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"layers": ()},
        {"router": "expert_choice"},
        {"router": "soft"},
        {"router": "soft", "group_size": 34},
        {"ensemble_size": 2, "num_selected_experts": 1, "capacity_factor": 0.5},
        {"group_size": "image", "capacity_factor": 0.3},
        {"group_size": 34, "capacity_factor": 0.3},
        {"representation_size": 48},
        {"attention_qk_norm": True},
    ],
    ids=str,
)
def test_other_models(overrides: dict):
    model = make(SMALL.replace(**overrides))
    if model.config.moe.router == "soft" or not model.moe_layers:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.rand(8, 3, 32, 32))
        actual, empty = counter.get_total_flops(), 0
    else:
        actual, empty = counted(model, 8)
    paid = vm.count_flops(model, batch_size=8) * 8
    assert paid == pytest.approx(actual + operations_of(empty, SMALL), rel=1e-3)


def test_rounding_of_the_capacity_counts_where_the_group_is_known():
    # 17 tokens, K = 2, C = 0.1: 3.4 requests for 8 experts, so 1 place each, rounded up to 4: 32 of 34 requests paid.
    model = make(SMALL.replace(group_size="image", capacity_factor=0.1))
    per_request = operations_of(1, SMALL)
    large = make(SMALL.replace(capacity_factor=0.1))  # a batch of unknown size: 3.4 requests
    difference = vm.count_flops(model) - vm.count_flops(large)
    assert difference == pytest.approx(2 * (32 - 3.4) * per_request, abs=2)
    assert vm.count_flops(large, batch_size=1) == vm.count_flops(model)
    # 100 images: 340 requests for 8 experts are 43 places each, rounded up to 44: 352 / 100 per image.
    assert vm.count_flops(large, batch_size=100) - vm.count_flops(large) == pytest.approx(
        2 * (3.52 - 3.4) * per_request, abs=2
    )


def test_counting_does_not_log(caplog: pytest.LogCaptureFixture):
    """It may be called for settings that are never used."""
    vm.count_flops(make(SMALL.replace(group_size="image", capacity_factor=0.0123)))
    assert not caplog.records
