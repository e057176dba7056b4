"""Stored results: found again for the same weights, images and routing, and for nothing else."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.data.sources import ArraySource
from visionmoe.evaluate.fingerprint import data_fingerprint, model_fingerprint
from visionmoe.evaluate.store import ResultStore, StoredEvaluator, context_of, stored_timing

CONFIG = vm.ModelConfig(
    image_size=8, patch_size=4, in_channels=1, num_classes=3, hidden_size=8, num_layers=3, mlp_dim=8, num_heads=2,
    moe=vm.MoEConfig(num_experts=2, layers=(1, 2), num_selected_experts=1),
)  # fmt: skip


def make() -> vm.VisionTransformer:
    torch.manual_seed(0)
    return vm.create_model(CONFIG)


def loader(pixel: int = 7, label: int = 1, split: str = "test", batch_size: int = 4) -> EvalLoader:
    images = np.zeros((6, 8, 8), dtype=np.uint8)
    images[0, 0, 0] = pixel
    labels = np.array([0, 1, 2, 0, 1, label])
    data = DataConfig(image_size=8, eval_split=split, eval_batch_size=batch_size)
    return EvalLoader(data, source=ArraySource(images, labels, ("a", "b", "c")))


def context(model: vm.VisionTransformer, images: EvalLoader, autocast: bool = False) -> dict:
    return context_of(model, images, autocast=autocast)


class Counting:
    """An evaluator that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: vm.VisionTransformer) -> dict:
        self.calls += 1
        return {"top1": self.calls / 10, "dropped": {"blocks.1.dropped": 0.5}}


def test_a_result_is_found_again_by_a_later_process(tmp_path: Path):
    model, count, reused = make(), Counting(), []
    first = StoredEvaluator(count, ResultStore(tmp_path), context(model, loader()))(model)
    again = StoredEvaluator(count, ResultStore(tmp_path), context(model, loader()), lambda: reused.append(1))
    assert again(make()) == first
    assert (count.calls, again.evaluated, again.reused, reused) == (1, 0, 1, [1])
    model.set_routing(capacity_factor=0.5, layers=[2])
    assert again(model) != first
    assert count.calls == 2
    # The common setting and one per layer that say the same are one setting.
    other = make()
    other.set_routing(1, 1.05, False, layers=[1, 2])
    assert again(other) == first


@pytest.mark.parametrize(
    "changed",
    [
        lambda: context(make(), loader(pixel=8)),
        lambda: context(make(), loader(label=2)),
        lambda: context(make(), loader(split="test[:6]")),
        lambda: context(make(), loader(batch_size=3)),
        lambda: context(make(), loader(), autocast=True),
        lambda: context(moved(make()), loader()),
    ],
    ids=["pixels", "labels", "split", "batch size", "precision", "weights"],
)
def test_other_models_and_images_have_results_of_their_own(tmp_path: Path, changed):
    model, count = make(), Counting()
    StoredEvaluator(count, ResultStore(tmp_path), context(model, loader()))(model)
    StoredEvaluator(count, ResultStore(tmp_path), changed())(model)
    assert count.calls == 2


def moved(model: vm.VisionTransformer) -> vm.VisionTransformer:
    with torch.no_grad():
        model.blocks[1].mlp.experts.fc1.weight[1, 0, 0] += 1e-3
    return model


def test_the_fingerprint_does_not_depend_on_the_routing():
    model = make()
    before = model_fingerprint(model)
    model.set_routing(capacity_factor=0.3, batch_priority=True, layers=[1])
    assert model_fingerprint(model) == before
    assert model_fingerprint(vm.create_model(CONFIG, num_experts=4)) != before


@pytest.mark.parametrize(
    ("old", "new"), [('"top1": 0.5', '"top": 0.5'), ('"a": 1', '"a": 3'), ('{"key"', '[{"key"'), ('"check"', '"chuck"')]
)
def test_a_damaged_line_is_worked_out_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str):
    store = ResultStore(tmp_path)
    store.put({"a": 1}, {"top1": 0.5})
    store.path.write_text(store.path.read_text().replace(old, new, 1))
    again = ResultStore(tmp_path)
    assert len(again) == 0
    assert len(caplog.records) == 1


def test_a_loss_that_is_not_finite_is_named_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, calls = make(), []

    def evaluate(model: vm.VisionTransformer) -> dict:
        calls.append(model)
        return {"top1": 0.5, "loss": float("nan")}

    for _ in range(2):
        result = StoredEvaluator(evaluate, ResultStore(tmp_path), context(model, loader()))(model)
        assert result["top1"] == 0.5 and math.isnan(result["loss"])
    assert len(calls) == 1
    assert "loss not finite at {'1': {'num_selected_experts': 1, 'capacity_factor': 1.05" in caplog.text


def test_the_fingerprint_of_images_looks_at_all_parts_of_them():
    """1000 images, of which the last one changes: in a batch of 4 it is far from the first."""

    def of(pixel: int) -> str:
        images = np.zeros((1000, 8, 8), dtype=np.uint8)
        images[-1, 0, 0] = pixel
        source = ArraySource(images, np.zeros(1000, dtype=np.int64), ("a",))
        return data_fingerprint(EvalLoader(DataConfig(image_size=8, eval_batch_size=4), source=source))

    assert of(7) == of(7) != of(8)


def test_times_of_another_machine_or_version_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make().eval()
    store, images = ResultStore(tmp_path), next(iter(loader()))[0]

    def count() -> int:
        stored_timing(store, context(model, loader()), model, images, [{1: model.config.moe.routing(1)}])
        return len(store)

    assert (count(), count()) == (1, 1)
    monkeypatch.setattr("visionmoe.evaluate.store.device_name", lambda device: "another processor")
    assert count() == 2
    monkeypatch.setattr("torch.__version__", "0.0")
    assert count() == 3
    monkeypatch.setattr("visionmoe.evaluate.store.__version__", "0.0")
    assert count() == 4


def test_a_line_that_was_cut_is_worked_out_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = ResultStore(tmp_path)
    store.put({"a": 1, "b": {"x": 1}}, {"top1": 0.5})
    store.put({"a": 2, "b": {"x": 1}}, {"top1": 0.6})
    text = store.path.read_text()
    store.path.write_text(text[:-10])  # as after a crash in mid-write
    again = ResultStore(tmp_path)
    assert "1 lines are damaged" in caplog.text
    assert again.get({"b": {"x": 1}, "a": 1}) == {"top1": 0.5}
    assert again.get({"a": 2, "b": {"x": 1}}) is None
    again.put({"a": 2, "b": {"x": 1}}, {"top1": 0.6})
    last = ResultStore(tmp_path)
    assert (len(last), last.count({"b": {"x": 1}}), last.count({"a": 2})) == (2, 2, 1)


def test_times_are_stored_together(tmp_path: Path):
    model = make().eval()
    images = next(iter(loader()))[0]
    settings = [{1: model.config.moe.routing(1)}, {2: model.config.moe.routing(2)}]
    arguments = (context(model, loader()), model, images, settings)
    seconds, how = stored_timing(ResultStore(tmp_path), *arguments)
    assert len(seconds) == 2 and min(seconds) > 0
    assert (how["batch_size"], how["device"]) == (4, "cpu")
    assert stored_timing(ResultStore(tmp_path), *arguments)[0] == seconds
    assert len(stored_timing(ResultStore(tmp_path), *arguments, others=[(model, images)])[0]) == 3
