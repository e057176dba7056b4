"""Stored results: found again for the same weights, images and routing, and for nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.data.sources import ArraySource
from visionmoe.evaluate.store import ResultStore, StoredEvaluator, context_of, model_fingerprint, stored_timing

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
    return context_of(model, images, next(iter(images))[0], autocast=autocast)


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


def test_a_line_that_was_cut_is_worked_out_again(tmp_path: Path):
    store = ResultStore(tmp_path)
    store.put({"a": 1, "b": {"x": 1}}, {"top1": 0.5})
    store.put({"a": 2, "b": {"x": 1}}, {"top1": 0.6})
    text = store.path.read_text()
    store.path.write_text(text[:-10])  # as after a crash in mid-write
    again = ResultStore(tmp_path)
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
