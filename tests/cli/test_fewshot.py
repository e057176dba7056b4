"""`visionmoe fewshot`, and few-shot evaluation in a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import visionmoe as vm
from visionmoe.cli import main
from visionmoe.train.log import read_log

FASHION = ["--data", "fashion-mnist", "--train-split", "train[:400]", "--test-split", "test[:100]"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A grey model without a head, in a folder."""
    torch.manual_seed(0)
    config = vm.ModelConfig(
        image_size=28, patch_size=14, in_channels=1, num_classes=None, hidden_size=16, num_layers=2, mlp_dim=24,
        num_heads=2, moe=vm.MoEConfig(num_experts=4, layers=(1,)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    vm.create_model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def colours(tmp_path):
    """A folder of colour images of two classes, dark and bright, 40 x 30 pixels."""
    rng = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        folder = tmp_path / "colours" / name
        folder.mkdir(parents=True)
        for number in range(20):
            Image.fromarray(rng.integers(low, low + 100, (30, 40, 3), np.uint8)).save(folder / f"{number:02}.png")
    return f"folder:{tmp_path / 'colours'}"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_several_data_sets_and_a_second_call_with_other_shots(model, colours, tmp_path, capsys):
    out = tmp_path / "out"
    data = ["--data", "fashion-mnist", colours, "--train-split", "train[:400]", "train[:50%]",
            "--test-split", "test[:100]", "train[50%:]"]  # fmt: skip
    assert main(["fewshot", model, *data, "--shots", "1", "5", "--seeds", "0", "1", "2", "--out", str(out)]) == 0
    first = results(out)
    assert (out / "fewshot.png").stat().st_size > 10_000
    fashion, two = first["data"]
    assert (fashion["num_images"], two["num_images"]) == ({"train": 400, "test": 100}, {"train": 20, "test": 20})
    assert (fashion["num_classes"], two["num_classes"], first["feature_dim"]) == (10, 2, 16)
    assert two["accuracy"]["5"]["per_seed"] == [1.0, 1.0, 1.0]  # dark and bright are easily told apart
    assert two["accuracy"]["5"]["std"] == 0.0
    assert 0.2 < fashion["accuracy"]["5"]["mean"] < 0.9  # far above chance, although the weights are random
    per_seed = fashion["accuracy"]["1"]["per_seed"]
    assert fashion["accuracy"]["1"]["mean"] == pytest.approx(sum(per_seed) / 3)
    assert set(first["l2"]) == {"1", "5"} and all(np.log2(l2) in range(-10, 20) for l2 in first["l2"].values())
    assert "5-shot" in capsys.readouterr().out
    assert main(["fewshot", model, *data, "--shots", "5", "2", "--seeds", "1", "--out", str(out)]) == 0
    second = results(out)
    assert all(used for one in second["data"] for used in one["features_from_cache"].values())
    assert second["data"][1]["accuracy"]["5"] == {"mean": 1.0, "std": None, "per_seed": [1.0]}


def test_another_size_and_routing_are_other_features(model, tmp_path):
    cache = ["--cache", str(tmp_path / "cache")]
    for number, more in enumerate(
        ([], ["--image-size", "42"], ["--capacity-factor", "0.2"], ["--eval-resize", "32"], ["--bf16"])
    ):
        out = tmp_path / str(number)
        assert main(["fewshot", model, *FASHION, *cache, "--shots", "2", *more, "--out", str(out)]) == 0
        assert not any(results(out)["data"][0]["features_from_cache"].values())
    assert results(tmp_path / "1")["image_size"] == [42, 42]
    assert results(tmp_path / "2")["routing"]["capacity_factor"] == 0.2
    assert len(list((tmp_path / "cache").iterdir())) == 5 * 2


MISTAKES = {
    "no data": ([], "--data"),
    "shots": ([*FASHION, "--shots", "0"], "shots must be >= 1, got 0"),
    "the same shots": ([*FASHION, "--shots", "5", "5"], "shots must be one or more, all different, got [5, 5]"),
    "splits": ([*FASHION[:2], "--test-split", "test", "test"], "give one test split, or one for each of the 1 sources"),
    "equal splits": ([*FASHION[:2], "--test-split", "train"], "must differ, got 'train' for both"),
    "unknown split": ([*FASHION[:2], "--test-split", "tests"], "unknown split 'tests'"),
    "twice the same": (["--data", "fashion-mnist", "fashion-mnist"], "data sets must be one or more, all different"),
    "dense routing": ([*FASHION, "--num-selected-experts", "9"], "num_selected_experts must be between 1 and 4"),
    "size": ([*FASHION, "--image-size", "30"], "image_size must be a multiple of patch_size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, model, tmp_path, capfd):
    arguments, expected = MISTAKES[mistake]
    assert main(["fewshot", model, *arguments, "--out", str(tmp_path)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("visionmoe fewshot: ") and expected in lines[0]
    assert not (tmp_path / "results.json").exists()


def test_ctrl_c_and_again(model, tmp_path):
    """As a program: 130 and no traceback; the second call uses the data set that was finished."""
    arguments = ["fewshot", model, *FASHION[:2], "--batch-size", "1", "--train-split", "train[:64]", "--shots", "1"]
    arguments += ["--out", str(tmp_path)]
    command = [sys.executable, "-m", "visionmoe", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell ignores SIGINT for what it starts in the background, and children inherit that
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    features = tmp_path / "features"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        re.fullmatch(r"[^.]+\.safetensors", p.name) for p in features.glob("*")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # the 64 training images are done, the 2,000 test images are not
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error and not (tmp_path / "results.json").exists()
    assert main([*arguments, "--test-split", "test[:50]"]) == 0
    assert results(tmp_path)["data"][0]["features_from_cache"] == {"train": True, "test": False}


def test_a_run_evaluates_few_shot_as_its_config_says(tmp_path):
    sets = ["model.num_layers=1", "model.moe.layers=[0]", "model.hidden_size=16", "model.mlp_dim=16",
            "model.num_heads=2", "data.train_split=train[:100]", "data.eval_split=test[:50]", "data.batch_size=50",
            "tensorboard=false", 'fewshot.sources=["fashion-mnist"]', "fewshot.train_split=train[:200]",
            "fewshot.test_split=test[:50]", "fewshot.shots=[2]", "fewshot.every=2", "eval_every=3"]  # fmt: skip
    arguments = [word for text in sets for word in ("--set", text)]
    assert main(["train", "--steps", "5", "--out", str(tmp_path / "run"), *arguments]) == 0
    records = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "eval"]
    # every 2 steps and at the end; the run's own images every 3 steps and at the end
    assert [(r["step"], r["name"]) for r in records] == [
        (2, "fewshot"), (3, "test"), (4, "fewshot"), (5, "test"), (5, "fewshot")
    ]  # fmt: skip
    last = records[-1]["metrics"]
    assert list(last) == ["fashion-mnist/2-shot"] and results(tmp_path / "run")["eval"]["fewshot"] == last
    # The same number as the command gives for the finished model (one strength for one data set and seed).
    arguments = ["--train-split", "train[:200]", "--test-split", "test[:50]", "--shots", "2", "--seeds", "0"]
    assert main(["fewshot", str(tmp_path / "run"), "--data", "fashion-mnist", *arguments, "--out", str(tmp_path)]) == 0
    assert results(tmp_path)["data"][0]["accuracy"]["2"]["mean"] == last["fashion-mnist/2-shot"]
