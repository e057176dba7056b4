"""What each image gets: counted by hand on routings that the test writes down, and on a real model."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import visionmoe as vm
from visionmoe.analysis.compute_per_image import (
    ImageCompute,
    draw_compute_per_image,
    quartiles,
    rank_correlation,
    record_compute,
    requests_per_image,
    shares_per_image,
    tokens_per_image,
)
from visionmoe.config import RoutingSetting
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.model.routing import Routing

CONFIG = vm.ModelConfig(
    image_size=(4, 8), patch_size=4, in_channels=1, num_classes=3, hidden_size=16, num_layers=3, mlp_dim=32,
    num_heads=2, pooling="gap", moe=vm.MoEConfig(num_experts=2, layers=(1, 2), capacity_factor=2.0),
)  # fmt: skip


def routing() -> Routing:
    """Three images of two tokens, K = 2, two places per expert, which the first and the last image share."""
    return Routing(
        token_index=torch.arange(6).repeat_interleave(2)[None],
        expert_index=torch.tensor([[0, 1] * 6]),
        buffer_index=torch.tensor([[0, 0, 1, 3, 2, 4, 5, 5, 3, 2, 4, 1]]),
        combine_weights=torch.full((1, 12), 0.5),
        num_tokens=6,
        num_experts=2,
        capacity=2,
    )


def test_tokens_and_requests_of_every_image():
    # Kept: places below 2: token 0 twice, token 1 once, token 5 once. Tokens 0, 1 are image 0, 5 is of image 2.
    assert tokens_per_image(routing(), CONFIG, 3).tolist() == [2, 0, 1]
    assert requests_per_image(routing(), CONFIG, 3).tolist() == [3, 0, 1]
    # Of four requests each; the mean of two equal layers is the same. The third image may be filling: left out.
    assert shares_per_image({1: routing(), 2: routing()}, CONFIG, 2).tolist() == [0.75, 0.0]


def test_members_of_an_ensemble_count_together():
    # The same tokens as two images of ONE token and two members: tokens 0, 1 | 2, 3 | 4, 5 are the images.
    config = CONFIG.replace(image_size=4, ensemble_size=2, num_selected_experts=1)
    assert tokens_per_image(routing(), config, 3).tolist() == [1, 0, 1]
    assert requests_per_image(routing(), config, 3).tolist() == [3, 0, 1]


def make() -> vm.VisionTransformer:
    torch.manual_seed(0)
    model = vm.create_model(CONFIG)
    torch.nn.init.normal_(model.head.weight)
    return model


def batches(sizes: tuple[int, ...] = (20, 13)) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    made, start = [], 0
    for size in sizes:
        images = torch.rand(size, 1, 4, 8, generator=generator) * 2 - 1
        labels = torch.randint(3, (size,), generator=generator)
        made.append((images, labels, torch.arange(start, start + size)))
        start += size
    return made


def test_a_models_images():
    model = make()
    config, setting = model.config, RoutingSetting(2, 0.3, True)
    compute, fewest, most = record_compute(model, batches(), setting, examples=4)
    assert model.config == config and model.training
    # All places are filled: 40 tokens, K = 2, C = 0.3: 12 places of each expert, 24 of 80; 26 tokens: 7.8, so 8 and 16
    # of 52 requests.
    assert compute.share[:20].mean().item() == pytest.approx(24 / 80)
    assert compute.share[20:].mean().item() == pytest.approx(16 / 52)
    assert compute.indices.tolist() == list(range(33))
    own = ClassificationEvaluator(batches())(model)
    assert compute.own_correct.double().mean().item() == pytest.approx(own["top1"])
    assert compute.own_loss.mean().item() == pytest.approx(own["loss"], rel=1e-5)
    model.set_routing(2, 0.3, True)
    here = ClassificationEvaluator(batches())(model)
    assert compute.correct.double().mean().item() == pytest.approx(here["top1"])
    assert compute.loss.mean().item() == pytest.approx(here["loss"], rel=1e-5)
    order = compute.share.sort().values
    assert [e.share for e in fewest] == order[:4].tolist()
    assert [e.share for e in most] == order.flip(0)[:4].tolist()
    for example in (*fewest, *most):
        assert example.picture.shape == (4, 8, 1)
        assert int(example.kept[2].sum()) == example.tokens == compute.tokens[example.index]
        assert example.label == torch.cat([labels for _, labels, _ in batches()])[example.index]


def test_accuracy_by_quarters():
    share = torch.tensor([0.4, 0.1, 0.2, 0.3, 0.8, 0.7, 0.6, 0.5])
    correct = share > 0.25
    columns = (share, share, correct, 1 - share, correct, 1 - share, share, share)
    found = quartiles(ImageCompute(*columns))
    # In order: 0.1 0.2 | 0.3 0.4 | 0.5 0.6 | 0.7 0.8; only the first two are wrong.
    assert [q["top1"] for q in found] == [0, 1, 1, 1]
    assert [q["mean_share"] for q in found] == pytest.approx([0.15, 0.35, 0.55, 0.75])
    assert (found[0]["lowest_share"], found[0]["highest_share"]) == pytest.approx((0.1, 0.2))
    assert [q["loss"] for q in found] == pytest.approx([0.85, 0.65, 0.45, 0.25])
    assert len(quartiles(ImageCompute(*(c[:2] for c in columns)))) == 2


def test_rank_correlation():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(10, (50,), generator=generator).float()
    second = first + torch.randint(20, (50,), generator=generator)
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    assert rank_correlation(first, torch.ones(50)) == 0.0


def test_the_picture_and_its_numbers(tmp_path: Path):
    found = draw_compute_per_image(tmp_path / "images.png", make(), batches(), ("a", "b", "c"))
    with Image.open(tmp_path / "images.png") as picture:
        picture.load()
        assert min(picture.size) > 400
    assert found["setting"] == {"num_selected_experts": 2, "capacity_factor": 0.3, "batch_priority": True}
    assert sum(q["images"] for q in found["quartiles"]) == 33
    assert found["lowest_share"] <= found["fewest"][0]["share"] <= found["most"][0]["share"] == found["highest_share"]
    assert -1 <= found["rank_correlation_of_share_with_loss"] <= 1


def test_bins_hold_equally_many_possible_values():
    """Shares are multiples of 1/4: bins centred on them. Of 100 steps of 1/1000, at most 40 bins of 3 steps each."""
    from visionmoe.analysis.figures.per_image import bin_edges

    assert bin_edges([0.25, 0.5, 0.75, 0.5]) == pytest.approx([0.125, 0.375, 0.625, 0.875])
    edges = bin_edges([i / 1000 for i in range(101)])
    assert len(edges) - 1 == 34  # 101 values, 3 to a bin
    assert edges[1] - edges[0] == pytest.approx(0.003)
    assert bin_edges([0.3]) == pytest.approx([-0.2, 0.8])
