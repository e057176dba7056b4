"""What commands that run a model over images take from the model: names of classes, and how images are prepared."""

import json
import logging
from pathlib import Path

import pytest
import torch

import visionmoe as vm
from visionmoe.cli import main
from visionmoe.cli.shared import names_differ
from visionmoe.model.pretrained import Preprocessing

CONFIG = vm.ModelConfig(
    image_size=28, patch_size=14, in_channels=1, num_classes=10, hidden_size=16, num_layers=1, mlp_dim=16, num_heads=2
)
DIGITS = tuple("0123456789")


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (None, ("cat", "dog"), None),
        (("cat", "dog"), ("cat", "dog"), None),
        (("cat", "dog", "eel"), ("cat", "dog"), None),  # the same numbers
        (("cat", "dog"), ("dog", "cat"), (0, "cat", "dog")),
        (("cat", "dog", "eel"), ("cat", "eel"), (1, "dog", "eel")),
        (("cat", "dog"), ("0", "1"), None),
        (("0", "1"), ("cat", "dog"), None),
    ],
)
def test_first_class_of_another_name(model, data, expected):
    assert names_differ(model, data) == expected


def evaluated(folder: Path, out: Path, *more: str) -> dict:
    arguments = ["--data", "fashion-mnist", "--split", "test[:40]", "--device", "cpu", "--out", str(out), *more]
    assert main(["evaluate", str(folder), *arguments]) == 0
    return json.loads((out / "results.json").read_text())


def test_evaluation_on_classes_of_other_names_warns(tmp_path, caplog):
    torch.manual_seed(0)
    model = vm.create_model(CONFIG)
    for names, warns in ((tuple("abcdefghij"), True), (DIGITS, False), (None, False)):
        caplog.clear()
        model.save_pretrained(tmp_path / "model", names)
        with caplog.at_level(logging.WARNING, "visionmoe"):
            evaluated(tmp_path / "model", tmp_path / "out")
        assert ("class 0 is 'a' for the model and 'T-shirt/top' in fashion-mnist" in caplog.text) == warns


def test_images_are_prepared_as_the_model_says(tmp_path):
    torch.manual_seed(0)
    model = vm.create_model(CONFIG)
    with torch.no_grad():
        model.head.weight.normal_()
    model.save_pretrained(tmp_path / "exact")
    model.save_pretrained(tmp_path / "small", preprocessing=Preprocessing.of(CONFIG, resize_to=34))
    exact, small = (evaluated(tmp_path / name, tmp_path / "out") for name in ("exact", "small"))
    assert exact["loss"] != small["loss"]
    # By hand: the smaller side to 34 pixels, then the centre of 28.
    from visionmoe.data import DataConfig, EvalLoader
    from visionmoe.evaluate.classify import evaluate

    loader = EvalLoader(DataConfig(eval_split="test[:40]", eval_resize=34))
    assert small["loss"] == pytest.approx(evaluate(model, loader)["loss"], rel=1e-6)
    # The same features from both folders where the command says how images are prepared, else not.
    arguments = ["--data", "fashion-mnist", "--train-split", "train[:40]", "--test-split", "test[:40]", "--shots", "1"]
    arguments += ["--device", "cpu", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    for name, more, cached in (("exact", [], False), ("small", [], False), ("exact", ["--eval-resize", "34"], True)):
        assert main(["fewshot", str(tmp_path / name), *arguments, *more]) == 0
        (data,) = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
        assert set(data["features_from_cache"].values()) == {cached}
