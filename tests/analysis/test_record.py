"""Recorded routings: which patches are kept, and which experts a class asks for."""

import pytest
import torch

import visionmoe as vm
from visionmoe.analysis.record import (
    experts_by_class,
    experts_per_token,
    kept_patches,
    record_routing,
    recording,
    to_grid,
)
from visionmoe.config import RoutingSetting

SMALL = vm.ModelConfig(
    image_size=(8, 12),
    patch_size=4,
    in_channels=1,
    num_classes=3,
    hidden_size=16,
    num_layers=4,
    mlp_dim=32,
    num_heads=2,
    moe=vm.MoEConfig(num_experts=4, layers=(1, 3), capacity_factor=4.0, capacity_multiple_of=None),
)


def make(config: vm.ModelConfig = SMALL) -> vm.VisionTransformer:
    torch.manual_seed(0)
    return vm.create_model(config)


def some_images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_records_every_call_of_every_layer_and_stops_afterwards():
    model = make().eval()
    with recording(model) as records:
        model(some_images(2))
        model(some_images(5))
    model(some_images(3))
    assert list(records) == [1, 3]
    # 2 x 3 patches and the class token: 7 tokens per image, all images one group, 2 requests per token.
    for routings in records.values():
        assert [r.token_index.shape for r in routings] == [(1, 2 * 7 * 2), (1, 5 * 7 * 2)]


def test_recording_does_not_change_the_result():
    model, images = make().eval(), some_images(3)
    plain = model(images).logits
    with recording(model):
        assert torch.equal(model(images).logits, plain)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"group_size": 21},  # 3 images per group: 5 images are filled up to 6
        {"group_size": "image"},
        {"router": "expert_choice", "num_selected_experts": 1},
        {"ensemble_size": 2, "num_selected_experts": 1, "group_size": "batch"},
    ],
    ids=str,
)
def test_counts_of_every_token(overrides: dict):
    """With a place for everyone a token is processed by K experts of each member; expert choice takes all S tokens."""
    model, images = make(SMALL.replace(**overrides)), some_images(5)
    config = model.config
    counts = experts_per_token(record_routing(model, images)[1], config, len(images))
    assert counts.shape == (5, 7)
    each = config.moe.num_experts if config.moe.router == "expert_choice" else 2  # K = 2, or 2 members of K = 1
    assert (counts == each).all()
    assert to_grid(counts, config).shape == (5, 2, 3)


def test_members_of_an_ensemble_are_counted_with_their_own_image():
    """Tokens are ordered (image, token, member): what is dropped by priority of position is the last image's."""
    config = SMALL.replace(ensemble_size=2, num_selected_experts=1, capacity_factor=0.5)
    counts = experts_per_token(record_routing(make(config), some_images(6))[1], config, 6)
    assert counts[0].sum() > counts[-1].sum()
    assert counts.max() <= 2


def test_the_class_token_is_not_a_patch():
    values = torch.arange(2 * 7).view(2, 7)
    assert to_grid(values, SMALL).tolist() == [[[1, 2, 3], [4, 5, 6]], [[8, 9, 10], [11, 12, 13]]]


def test_kept_patches_at_several_capacities():
    model, images = make(), some_images(4)
    config = model.config
    settings = [RoutingSetting(1, c, priority) for c in (4.0, 0.5, 0.1) for priority in (False, True)]
    kept = kept_patches(model, images, settings)
    assert model.config == config
    for masks in kept.values():
        assert [mask.shape for mask in masks] == [(4, 2, 3)] * 6
        assert masks[0].all()
        assert masks[1].all()
        # 28 tokens, four experts, capacity 0.1: one place each, so at most 4 patches are kept.
        assert masks[4].sum() <= 4
        assert masks[5].sum() <= 4
        # By position: nothing of the last image is left at the lowest capacity, for the first ones took the places.
        assert masks[4][0].sum() >= masks[4][-1].sum()


def test_shares_of_experts_by_class():
    model = make(SMALL.replace(group_size=21))
    batch = (some_images(5), torch.tensor([0, 0, 2, 2, 2]), torch.arange(5))
    shares = experts_by_class(model, [batch], num_classes=3)
    routing = record_routing(model, batch[0])[3]
    # By hand for class 0: the requests of images 0 and 1, which are tokens 0 ... 13 of group 0.
    mine = routing.expert_index[0][routing.token_index[0] < 14]
    expected = torch.bincount(mine, minlength=4) / len(mine)
    torch.testing.assert_close(shares[3][0], expected)
    assert shares[3][1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(shares[3].sum(1), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("overrides", [{"layers": ()}, {"router": "soft", "num_selected_experts": 1}], ids=str)
def test_models_without_routing(overrides: dict):
    with pytest.raises(ValueError, match="no layers that route"), recording(make(SMALL.replace(**overrides))):
        pass


def test_images_of_another_size():
    with pytest.raises(ValueError, match="images must be"):
        record_routing(make(), torch.zeros(1, 1, 8, 8))
