"""The loss at the best temperature."""

import math

import pytest
import torch

import visionmoe as vm
from visionmoe.evaluate.calibrated import CalibratedEvaluator, best_sharpness, image_losses
from visionmoe.evaluate.classify import ClassificationEvaluator


def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).sample()
    return logits, labels


def test_the_sharpness_is_that_of_a_fine_grid():
    torch.manual_seed(0)
    logits, labels = predictions()
    log_probs = torch.log_softmax(0.25 * logits, dim=1)
    grid = torch.linspace(0.5, 10, 2000).tolist()
    losses = [torch.nn.functional.cross_entropy(log_probs.double() * s, labels).item() for s in grid]
    best = min(losses)
    found = best_sharpness(log_probs, labels)
    assert found == pytest.approx(grid[losses.index(best)], abs=0.01)
    assert image_losses(log_probs, labels, found).mean().item() == pytest.approx(best, abs=1e-6)


def test_confidence_does_not_matter():
    """The same logits, four times as flat: the same calibrated losses, another plain loss."""
    torch.manual_seed(0)
    logits, labels = predictions()
    losses = []
    for scale in (1.0, 0.25):
        log_probs = torch.log_softmax(scale * logits, dim=1)
        losses.append(image_losses(log_probs, labels, best_sharpness(log_probs, labels)))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


def test_perfect_and_constant_predictions_are_finite():
    labels = torch.tensor([0, 1])
    assert best_sharpness(torch.tensor([[0.0, -69.0], [-69.0, 0.0]]), labels) == pytest.approx(32, rel=1e-3)
    constant = torch.full((2, 2), -math.log(2))
    found = image_losses(constant, labels, best_sharpness(constant, labels))
    assert found.tolist() == pytest.approx([math.log(2)] * 2)


def test_evaluator_agrees_with_the_plain_one():
    torch.manual_seed(0)
    model = vm.create_model(
        vm.ModelConfig(image_size=8, patch_size=4, in_channels=1, num_classes=3, hidden_size=16, num_layers=2,
                       mlp_dim=32, num_heads=2, moe=vm.MoEConfig(num_experts=4, layers=(1,)))
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    batches = [(torch.rand(n, 1, 8, 8) * 2 - 1, torch.randint(3, (n,)), torch.arange(n)) for n in (6, 3)]
    seen: list[int] = []
    result = CalibratedEvaluator(batches, keep_images=True, on_batch=seen.append)(model)
    plain = ClassificationEvaluator(batches)(model)
    assert seen == [6, 3]
    assert (result["num_images"], result["top1"]) == (9, plain["top1"])
    assert result["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert result["calibrated_loss"] <= result["loss"]
    assert sum(result["image_losses"]) / 9 == pytest.approx(result["calibrated_loss"], abs=1e-5)
    assert sum(result["image_correct"]) / 9 == result["top1"]
    assert "image_losses" not in CalibratedEvaluator(batches)(model)
    with pytest.raises(ValueError, match="no images"):
        CalibratedEvaluator([])(model)
