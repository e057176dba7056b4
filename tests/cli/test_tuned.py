"""What can be done with a model that `tune` left, and what a sweep tries of models with routers of other kinds."""

import json
from pathlib import Path

import pytest
import torch

import visionmoe as vm
from visionmoe.cli import main
from visionmoe.cli.options import Sweep
from visionmoe.cli.sweep import grid

CONFIG = vm.ModelConfig(
    image_size=28, patch_size=7, in_channels=1, num_classes=10, hidden_size=16, num_layers=2, mlp_dim=32, num_heads=2,
    moe=vm.MoEConfig(num_experts=8, layers=(1,)),
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that save_pretrained wrote."""
    torch.manual_seed(0)
    model = vm.create_model(CONFIG)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_what_can_be_done_with_a_tuned_model(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, images = str(tmp_path / "tuned"), ["--data", "fashion-mnist", "--split", "test[:40]"]
    tune = ["tune", "--flops", "0.9", "--calibration-split", "train[:60]"]
    assert main([*tune, str(saved), *images, "--out", out]) == 0
    for command in ("evaluate", "analyze", "sweep"):
        capsys.readouterr()
        assert main([command, out, "--out", str(tmp_path / command)]) == 2
        assert f"{out} is no run that says its images: give --data, one of" in capsys.readouterr().err
    assert main(["evaluate", out, *images, "--out", str(tmp_path / "evaluate")]) == 0
    tuned = results(tmp_path / "tuned")["tuned"]
    assert results(tmp_path / "evaluate")["top1"] == tuned["held_out"]["top1"]
    # The experts per token of its layer, not those that were in force before.
    factors = ["--capacity-factors", "0.5", "--order", "batch-priority"]
    assert main(["sweep", out, *images, *factors, "--out", str(tmp_path / "sweep")]) == 0
    swept = results(tmp_path / "sweep")
    k = tuned["routing"]["1"]["num_selected_experts"]
    assert (
        swept["points"][0]["num_selected_experts"] == swept["per_image_compute"]["setting"]["num_selected_experts"] == k
    )
    capsys.readouterr()
    weights = (tmp_path / "tuned" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main([*tune, out, *images, "--out", out]) == 2
    assert "holds the model that is read, which would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "tuned" / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_experts_that_choose_are_swept_in_one_order():
    """The order of tokens does not matter to them, so every point would be there twice."""
    model = vm.create_model(CONFIG, router="expert_choice")
    settings, layers = grid(Sweep(path="run", capacity_factors=(1.0, 0.5)), model)
    assert layers is None
    assert settings == (vm.RoutingSetting(2, 1.0, False), vm.RoutingSetting(2, 0.5, False))
