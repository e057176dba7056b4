"""The pictures of a model: columns of the log, places of the examples, and that every file is drawn."""

from pathlib import Path

import torch
from PIL import Image

import visionmoe as vm
from visionmoe.analysis.report import FACTORS, curves_of_log, draw_kept_patches, draw_report, spread_examples
from visionmoe.evaluate.adaptive import routing_grid, sweep
from visionmoe.evaluate.classify import ClassificationEvaluator

LOG = [
    {"kind": "event", "step": 0, "message": "started"},
    {"kind": "train", "step": 10, "main_loss": 2.0, "auxiliary_loss": 0.5, "accuracy": 0.25,
     "router": {"blocks.1": {"expert_load": [0.75, 0.25]}}},
    {"kind": "train", "step": 15, "main_loss": None, "auxiliary_loss": None, "accuracy": None, "router": {}},
    {"kind": "train", "step": 20, "main_loss": 1.0, "auxiliary_loss": 0.25, "accuracy": 0.5,
     "router": {"blocks.1": {"expert_load": [0.5, 0.5]}}},
    {"kind": "eval", "step": 20, "name": "test", "metrics": {"top1": 0.4}},
]  # fmt: skip


def test_columns_of_the_log():
    """An interval in which every step was skipped has no numbers and is left out."""
    train, evaluations, load = curves_of_log(LOG)
    assert train == {
        "step": [10, 20],
        "loss": [2.5, 1.25],
        "auxiliary_loss": [0.5, 0.25],
        "accuracy": [0.25, 0.5],
    }
    assert evaluations == {"step": [20], "top1": [0.4]}
    assert load == {"block 1": [[0.75, 0.25], [0.5, 0.5]]}


def test_examples_are_spread_over_the_batch():
    # 12 images of classes 0, 1, 2, 0, 1, 2, ...; three classes, so near places 2, 6 and 10.
    labels = torch.arange(12) % 3
    places = spread_examples(labels, [0, 1, 2])
    assert labels[places].tolist() == [0, 1, 2]
    assert places == [3, 7, 11]  # 0 or 3 (3 is as near as any other), 7, 11
    assert spread_examples(labels, [0, 5]) == [3]  # the batch has no class 5


def test_all_pictures_are_drawn(tmp_path: Path):
    torch.manual_seed(0)
    config = vm.ModelConfig(
        image_size=8, patch_size=2, in_channels=1, num_classes=3, hidden_size=16, num_layers=2, mlp_dim=32, num_heads=2,
        moe=vm.MoEConfig(num_experts=2, layers=(1,), num_selected_experts=1),
    )  # fmt: skip
    model = vm.create_model(config)
    images = torch.rand(12, 1, 8, 8) * 2 - 1
    batches = [(images, torch.arange(12) % 3, torch.arange(12))]
    points = sweep(model, ClassificationEvaluator(batches), routing_grid([1], [1.0, 0.5]))
    pictures = draw_report(tmp_path, model, batches, LOG, points, ["a", "b", "c"])
    assert sorted(pictures) == sorted(path.name for path in tmp_path.iterdir())
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            picture.verify()
    kept = draw_kept_patches(
        tmp_path / "kept.png", model, batches[0], ["a", "b", "c"], batch_priority=True, classes=[0, 1, 2]
    )
    shares = [kept[factor] for factor in FACTORS]
    assert shares == sorted(shares, reverse=True)  # less capacity never keeps more
    assert shares[-1] < 0.2
