"""The demonstration with a tiny model and few steps: every file is there, and it goes on after a stop."""

import json
from pathlib import Path

import pytest
import torch

from visionmoe import demo
from visionmoe.train.loop import TrainingDivergedError

TINY = ["model.num_layers=2", "model.moe.layers=[1]", "model.hidden_size=16", "model.mlp_dim=32", "model.num_heads=2",
        "data.train_split=train[:200]", "data.eval_split=test[:100]", "data.batch_size=50", "tensorboard=false",
        "optimizer.learning_rate.warmup_steps=1", "steps=4", "log_every=2"]  # fmt: skip


def test_leaves_results_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.set_num_threads(1)
    assert demo.run(tmp_path, TINY, lowest_accuracy=0.0) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["test_accuracy"] <= 1
    assert results["test_accuracy"] == results["test"]["top1"] == results["training"]["eval"]["test"]["top1"]
    settings = {(p["num_selected_experts"], p["capacity_factor"], p["batch_priority"]) for p in results["sweep"]}
    assert settings == {(k, c / 10, b) for k in (1, 2) for c in range(1, 11) for b in (False, True)}
    for name in results["pictures"]:
        assert (tmp_path / name).stat().st_size > 5_000
    text = capsys.readouterr().out
    assert "top-1" in text
    assert str(tmp_path / "kept_patches.png") in text
    # Again: the finished run is not trained again, and gives the same numbers.
    assert demo.run(tmp_path, TINY, lowest_accuracy=0.0) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["test_accuracy"] == results["test_accuracy"]
    assert again["training"] == results["training"]
    assert again["sweep"] == results["sweep"]  # speeds too: no setting was evaluated again
    # Another recipe in the same folder.
    changes = [word for text in [*TINY, "seed=1"] for word in ("--set", text)]
    capsys.readouterr()
    assert demo.main(["--out", str(tmp_path), *changes]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed was 0, got 1" in error and "make demo OUT=" in error


def test_fails_when_the_accuracy_is_too_low(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert demo.run(tmp_path, [*TINY, "steps=2"], lowest_accuracy=0.99) == 1
    assert "the training did not work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [(KeyboardInterrupt(), 130, "the same command goes on from there"), (TrainingDivergedError("nan"), 1, "nan")],
)
def test_ends_without_a_traceback(
    raised: BaseException, code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    def train(*args: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(demo, "train", train)
    assert demo.main(["--out", str(tmp_path)]) == code
    assert text in capsys.readouterr().err


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert demo.main(["--out", str(tmp_path), "--set", "modle.num_layers=2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
