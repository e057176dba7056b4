"""Classification: every number of the result is worked out by hand from logits that the test chooses."""

import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import visionmoe as vm
from visionmoe.evaluate.classify import ClassificationEvaluator, evaluate, sigmoid_losses
from visionmoe.evaluate.forward import padded_batch, prepare
from visionmoe.model.vit import ModelOutput

SMALL = vm.ModelConfig(
    image_size=8,
    patch_size=4,
    in_channels=1,
    num_classes=7,
    hidden_size=16,
    num_layers=2,
    mlp_dim=32,
    num_heads=2,
    moe=vm.MoEConfig(num_experts=4, layers=(1,)),
)


class Table(nn.Module):
    """Returns chosen logits: the first pixel of an image says which row."""

    def __init__(self, rows: Tensor, members: int = 1) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.members = members
        self.config = SimpleNamespace(moe=SimpleNamespace(layers=()))

    def forward(self, images: Tensor) -> ModelOutput:
        rows = self.rows[images[:, 0, 0, 0].long()].flatten(0, 1)
        return ModelOutput(rows, rows.new_zeros(()), {}, self.members)


def numbered(labels: list[int], size: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of `size` images whose first pixel is their number."""
    index = torch.arange(len(labels))
    images = index.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    parts = zip(images.split(size), torch.tensor(labels).split(size), index.split(size), strict=True)
    return list(parts)


def random_batches(images: int, size: int, classes: int = 7) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.randint(classes, (images,), generator=generator)
    return list(zip(pixels.split(size), labels.split(size), torch.arange(images).split(size), strict=True))


def trained_like(config: vm.ModelConfig) -> vm.VisionTransformer:
    torch.manual_seed(1)
    model = vm.create_model(config)
    nn.init.normal_(model.head.weight)
    return model


def test_numbers_are_those_of_a_table():
    # Seven classes, three images, in batches of two and one.
    # image 0: best class 2 = its label: right. image 1: label 0 is third best: only in the top five.
    # image 2: label 6 has the lowest of the seven logits: in neither.
    rows = torch.tensor(
        [
            [[0.0, 0.0, math.log(9.0), 0.0, 0.0, 0.0, 0.0]],
            [[1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]],
            [[6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]],
        ]
    )
    seen: list[int] = []
    result = evaluate(Table(rows), numbered([2, 0, 6]), class_names=list("abcdefg"), on_batch=seen.append)
    assert seen == [2, 1]
    assert result["num_images"] == 3
    assert result["top1"] == 1 / 3
    assert result["top5"] == 2 / 3
    assert result["per_class_accuracy"] == {"a": 0.0, "c": 1.0, "g": 0.0}  # the others have no images
    # -log p: image 0 has p = 9 / (9 + 6).
    losses = [
        -math.log(9 / 15),
        -math.log(math.e / (math.e + math.e**3 + math.e**2 + 4)),
        -math.log(1 / sum(math.exp(i) for i in range(7))),
    ]
    assert result["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert result["images_per_second"] > 0
    assert result["broken_images"] == {}


def test_an_ensemble_is_judged_by_its_mean_probability():
    # Two classes, two members: p(class 1) is 0.9 and 0.2, mean 0.55: class 1 although the members disagree.
    rows = torch.tensor([[[math.log(0.1), math.log(0.9)], [math.log(0.8), math.log(0.2)]]])
    result = evaluate(Table(rows, members=2), numbered([1]))
    assert result["top1"] == 1.0
    assert result["loss"] == pytest.approx(-math.log(0.55), rel=1e-6)
    assert result["top5"] == 1.0  # with fewer than five classes every class is among the best five


def test_sigmoid_loss_sums_over_classes_and_averages_over_members():
    # One image, label 0, two members: member 0 has logits (0, 0): 2 log 2; member 1 (log 3, -log 3): both
    # cross-entropies are -log(3/4).
    logits = torch.tensor([[0.0, 0.0], [math.log(3), -math.log(3)]])
    expected = (2 * math.log(2) + 2 * math.log(4 / 3)) / 2
    torch.testing.assert_close(sigmoid_losses(logits, torch.tensor([0])), torch.tensor([expected]))
    result = evaluate(Table(logits[None], members=2), numbered([0]), loss="sigmoid")
    assert result["loss"] == pytest.approx(expected, rel=1e-6)


def test_equal_in_batches_of_any_size():
    """Dense, so that routing groups do not depend on the batch: the last, smaller batch counts with its size."""
    model = trained_like(SMALL.replace(layers=()))
    whole, parts = evaluate(model, random_batches(10, 10)), evaluate(model, random_batches(10, 3))
    for name in ("num_images", "top1", "top5", "per_class_accuracy"):
        assert whole[name] == parts[name]
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)


def test_reports_what_the_layers_dropped():
    # One expert per token, capacity 4 of 4 experts: 16 of the batch's 10 * 5 = 50 requests at most are kept.
    model = trained_like(SMALL.replace(num_selected_experts=1, capacity_factor=0.3))
    result = evaluate(model, random_batches(10, 10))
    assert list(result["dropped"]) == ["blocks.1.dropped"]
    assert result["dropped"]["blocks.1.dropped"] >= 1 - 16 / 50


@pytest.mark.parametrize("bf16", ["autocast", "model"])
def test_bfloat16(bf16: str):
    model = trained_like(SMALL)
    exact = evaluate(model, random_batches(16, 8))
    model = model.to(torch.bfloat16) if bf16 == "model" else model
    rough = evaluate(model, random_batches(16, 8), autocast=bf16 == "autocast")
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert rough["loss"] != exact["loss"]


def test_fills_the_last_group_with_black_images():
    # 5 tokens per image, groups of 20 tokens: 4 images per group, so 6 images are evaluated as 8.
    assert padded_batch(6, 5, 20) == 8
    assert padded_batch(8, 5, 20) == 8
    assert padded_batch(1, 17, 4) == 4
    model = trained_like(SMALL.replace(group_size=20))
    images = random_batches(6, 6)[0][0]
    padded = prepare(model, images)
    assert padded.shape == (8, 1, 8, 8)
    assert torch.equal(padded[:6], images)
    assert (padded[6:] == -1).all()
    assert evaluate(model, random_batches(6, 6))["num_images"] == 6
    assert evaluate(model, random_batches(6, 6), loss="sigmoid")["num_images"] == 6


def test_names_broken_images():
    class Loader(list):
        broken: ClassVar = {"photos/7.png": "the file is cut"}

    model = trained_like(SMALL)
    assert evaluate(model, Loader(random_batches(4, 2)))["broken_images"] == Loader.broken


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_and_takes_no_gradients(training: bool):
    model = trained_like(SMALL).train(training)
    ClassificationEvaluator(random_batches(4, 2))(model)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("labels", "message"),
    [([9], "the model has 7 classes, but the data has the label 9"), ([], "no images")],
)
def test_unusable_data(labels: list[int], message: str):
    batches = [(torch.zeros(1, 1, 8, 8), torch.tensor(labels), torch.zeros(1))] if labels else []
    with pytest.raises(ValueError, match=message):
        evaluate(trained_like(SMALL), batches)


def test_unknown_loss():
    with pytest.raises(ValueError, match="loss must be softmax or sigmoid, got 'hinge'"):
        ClassificationEvaluator([], loss="hinge")
