"""Streaming statistics against direct counting of what the routers of small models did."""

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.analysis.collect import Keeping, Statistics, collect
from visionmoe.analysis.gallery import best_requests, window
from visionmoe.analysis.information import information
from visionmoe.analysis.record import Requests, record_routing, requests_of
from visionmoe.analysis.stats import LayerStatistics, Shape, histogram, make_shuffles, merge_moments, moments_of
from visionmoe.analysis.summary import class_shares, summarise_layer
from visionmoe.config import RoutingSetting
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.data.decode import BrokenImageError
from visionmoe.data.sources import ArraySource

SMALL = vm.ModelConfig(
    image_size=(8, 12), patch_size=4, in_channels=1, num_classes=3, hidden_size=16, num_layers=4, mlp_dim=32,
    num_heads=2, moe=vm.MoEConfig(num_experts=4, layers=(1, 3), capacity_factor=1.0, capacity_multiple_of=None),
)  # fmt: skip
KINDS = [
    {},
    {"pooling": "gap"},
    {"group_size": 21},  # 3 images per group: the last batch is filled up
    {"group_size": "image", "batch_priority": True},
    {"router": "expert_choice", "num_selected_experts": 1},
    {"ensemble_size": 2, "num_selected_experts": 1},
    {"layer_routing": {3: RoutingSetting(3, 0.7, True)}},
]


def make(overrides: dict) -> vm.VisionTransformer:
    torch.manual_seed(0)
    return vm.create_model(SMALL.replace(**overrides))


def images(count: int, batch: int = 7) -> EvalLoader:
    rng = np.random.default_rng(1)
    source = ArraySource(
        rng.integers(0, 255, (count, 8, 12), dtype=np.uint8), rng.integers(0, 3, count), ("a", "b", "c")
    )
    return EvalLoader(DataConfig(image_size=(8, 12), eval_batch_size=batch), source=source)


def statistics_of(model: vm.VisionTransformer, loader: EvalLoader, shuffles: int = 2) -> Statistics:
    statistics = Statistics.empty(model.config, 3, shuffles, gallery=4)
    collect(model, loader, statistics)
    return statistics


@pytest.mark.parametrize("overrides", KINDS, ids=str)
@pytest.mark.parametrize("layer", [1, 3])
def test_against_direct_counting(overrides: dict, layer: int):
    """One request after the other, by the definition of `Routing`, on the same batches."""
    model, loader = make(overrides), images(17)
    config = model.config
    tokens, members, front = config.num_tokens, config.ensemble_size, config.num_tokens - 6
    found, shape = statistics_of(model, loader).layers[layer], Statistics.empty(config, 3, 2, 4).shapes[layer]
    by_class, by_position = np.zeros((3, 2, 4)), np.zeros((tokens, 2, 4))
    asked, kept, served = np.zeros((shape.choices, 4)), np.zeros((shape.choices, 4)), np.zeros(tokens)
    weights: list[list[float]] = [[] for _ in range(shape.choices)]
    best: list[dict[int, tuple[float, int]]] = [{} for _ in range(4)]  # per expert: image -> weight, token
    for pixels, labels, indices in loader:
        routing = record_routing(model, pixels)[layer]
        seen = set()
        for group in range(len(routing.token_index)):
            for place in range(routing.token_index.shape[1]):
                whole = (group * routing.num_tokens + int(routing.token_index[group, place])) // members
                image, token = divmod(whole, tokens)
                if image >= len(labels):
                    continue
                rank = place % shape.choices if config.moe.router == "top_k" else 0
                expert = int(routing.expert_index[group, place])
                weight, used = float(routing.combine_weights[group, place]), bool(routing.kept[group, place])
                by_class[labels[image], min(rank, 1), expert] += 1
                by_position[token, min(rank, 1), expert] += 1
                asked[rank, expert] += 1
                kept[rank, expert] += used
                weights[rank].append(weight)
                if used and (image, token) not in seen:
                    seen.add((image, token))
                    served[token] += 1
                number = int(indices[image])
                if token >= front and weight > best[expert].get(number, (-1.0, 0))[0]:
                    best[expert][number] = weight, token
    assert (found.by_class == by_class).all()
    assert (found.by_position == by_position).all()
    assert (found.asked == asked).all()
    assert (found.kept == kept).all()
    assert (found.served_by_position == served).all()
    for rank, values in enumerate(weights):
        assert found.weight_moments[rank, 0] == len(values)
        assert found.weight_moments[rank, 1] == pytest.approx(np.mean(values), rel=1e-6)
        assert found.weight_moments[rank, 2] / len(values) == pytest.approx(np.var(values), rel=1e-4)
        assert (found.weights[rank] == np.histogram(np.float32(values), np.linspace(0, 1, 51))[0]).all()
    for expert in range(4):
        expected = sorted(((-w, i, t) for i, (w, t) in best[expert].items()))[:4]
        assert found.best_image[expert][: len(expected)].tolist() == [i for _, i, _ in expected]
        assert found.best_token[expert][: len(expected)].tolist() == [t for _, _, t in expected]
        np.testing.assert_allclose(found.best_weight[expert][: len(expected)], [-w for w, _, _ in expected], rtol=1e-6)
        assert (found.best_label[expert] == loader.source.labels[found.best_image[expert]])[: len(expected)].all()


@pytest.mark.parametrize("overrides", KINDS, ids=str)
def test_entropy_of_the_probabilities(overrides: dict):
    """By position, from the logits of the gate on what enters the layer."""
    model, loader = make(overrides), images(9, batch=9)
    config = model.config
    caught = []
    handle = model.moe_layer(3).register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    found = statistics_of(model, loader).layers[3]
    handle.remove()
    members, tokens = config.ensemble_size, config.num_tokens
    x = caught[0][: 9 * members]  # (B*M, T, D), members adjacent
    gate = model.moe_layer(3).router.gate.weight.detach().view(members, -1, x.shape[-1])
    expected = np.zeros(tokens)
    for row in range(len(x)):
        probs = torch.softmax(x[row] @ gate[row % members].T, -1)
        expected += -(probs * probs.log2()).sum(-1).detach().numpy() / members
    np.testing.assert_allclose(found.entropy_by_position, expected, rtol=1e-4)
    assert found.entropy_moments[0, 1] == pytest.approx(expected.sum() / tokens / 9, rel=1e-4)
    assert found.entropies.sum() == 9 * tokens * members


def test_memory_does_not_grow_with_the_images():
    model = make({})
    few, many = statistics_of(model, images(14)), statistics_of(model, images(140))
    assert reachable_bytes(few) == reachable_bytes(many) > few.nbytes() == many.nbytes()
    assert (few.num_images, many.num_images) == (14, 140)


def reachable_bytes(value: object) -> int:
    """Memory of all that an object holds, in arrays and in Python's own containers; numbers count alike."""
    found: dict[int, object] = {}
    left = [value]
    while left:
        one = left.pop()
        if id(one) in found or isinstance(one, type | int | float | str):
            continue
        found[id(one)] = one
        left += gc.get_referents(one)
    return sum(one.nbytes if isinstance(one, np.ndarray) else sys.getsizeof(one) for one in found.values())


def test_a_stopped_pass_goes_on_and_gives_the_same(tmp_path: Path):
    model, loader = make({}), images(40)
    whole = statistics_of(model, loader)
    keeping, batches = Keeping(tmp_path / "s.npz", "mine", seconds=0), []

    def stop(count: int) -> None:
        batches.append(count)
        if len(batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, loader, Statistics.empty(model.config, 3, 2, 4), on_batch=stop, keeping=keeping)
    stored = Statistics.load(keeping.path, "mine")
    assert stored is not None
    assert (stored.num_images, stored.next_image) == (14, 14)  # two batches of 7 were saved
    collect(model, loader, stored, on_batch=batches.append, keeping=keeping)
    assert batches == [7, 7, 7, 7, 7, 7, 5]  # the third again, then the rest
    for layer in (1, 3):
        for name, array in whole.layers[layer].arrays().items():
            assert (array == stored.layers[layer].arrays()[name]).all(), name
    # Done: nothing is left to do, and another fingerprint does not get it.
    finished = Statistics.load(keeping.path, "mine")
    assert finished is not None
    collect(model, loader, finished, on_batch=lambda count: pytest.fail("no batch was expected"))
    assert Statistics.load(keeping.path, "another") is None
    assert Statistics.load(tmp_path / "nothing.npz", "mine") is None


@pytest.mark.parametrize("content", [b"", b"PK broken", b"[]"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes):
    path = tmp_path / "s.npz"
    path.write_bytes(content)
    assert Statistics.load(path, "mine") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is not a file of statistics" in caplog.text


class Broken(ArraySource):
    """The first and the 30th image are not there."""

    def decode(self, index: int, *rest: int) -> np.ndarray:
        if index in (0, 29):
            raise BrokenImageError("broken")
        return super().decode(index, *rest)


def test_a_stopped_pass_allows_as_many_broken_images_as_a_whole_one():
    """2 of 40 are 5 %, which is allowed; of what is left after image 28 one would be 9 %."""
    model, whole = make({}), images(40)
    source = Broken(whole.source.images, whole.source.labels, ("a", "b", "c"))

    def loader() -> EvalLoader:
        config = DataConfig(image_size=(8, 12), eval_batch_size=7, max_broken=0.05)
        return EvalLoader(config, source=source)

    expected = statistics_of(model, loader())
    stopped, batches = Statistics.empty(model.config, 3, 2, 4), []

    def stop(count: int) -> None:
        batches.append(count)
        if len(batches) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, loader(), stopped, on_batch=stop)
    assert stopped.next_image == 28
    collect(model, loader(), stopped)
    assert stopped.broken == expected.broken and len(expected.broken) == 2
    assert stopped.num_images == 38
    assert (stopped.layers[1].by_class == expected.layers[1].by_class).all()


def test_normalised_weights_are_taken_before_they_are_normalised():
    """What the router thinks does not change with what is done to its weights afterwards."""
    plain, normalised = make({}), make({"normalize_combine_weights": True})
    normalised.load_state_dict(plain.state_dict())
    first, second = (statistics_of(model, images(20)).layers[1] for model in (plain, normalised))
    for name, array in first.arrays().items():
        assert (array == second.arrays()[name]).all(), name


def specialised(count: int, tokens: int, experts: int) -> tuple[LayerStatistics, Shape]:
    """A router that sends all tokens of class c to expert c, for `count` images of `experts` classes, sorted by class
    as those of folders are."""
    shape = Shape(experts, tokens, tokens, experts, experts, 1, shuffles=5, gallery=1)
    labels = np.sort(np.arange(count) % experts)
    statistics = LayerStatistics.empty(shape)
    for indices in np.split(np.arange(count), 4):
        image, token = (grid.ravel() for grid in np.mgrid[: len(indices), :tokens])
        ones = np.ones(len(image))
        requests = Requests(image, token, labels[indices][image], np.zeros_like(image), ones, ones > 0)
        entropy, shuffles = np.zeros((len(indices), tokens, 1)), make_shuffles(shape, labels, indices, seed=0)
        statistics.add(shape, requests, entropy, labels[indices], indices, shuffles)
    return statistics, shape


def test_a_router_that_specialises_by_class():
    statistics, _ = specialised(count=2000, tokens=6, experts=8)
    of_class = information(statistics.by_class.sum(1), statistics.shuffled_class.sum(2))
    assert of_class.bits == pytest.approx(3.0)  # log2(8)
    # The bias for n independent images: (8 - 1)^2 / (2 n ln 2) = 0.0177 bits. Tokens of an image are not independent;
    # were they taken as such, it would be a sixth of this.
    assert of_class.shuffled_mean == pytest.approx(49 / (2 * 2000 * np.log(2)), rel=0.3)
    assert 0 < of_class.shuffled_std < 0.01
    assert of_class.share == pytest.approx(1.0, abs=0.01)
    # Every place has the same experts, before and after places are shuffled.
    of_position = information(statistics.by_position.sum(1), statistics.shuffled_position.sum(2))
    assert of_position.bits == of_position.shuffled_mean == pytest.approx(0.0, abs=1e-12)


def test_shuffles_keep_the_sizes_of_classes_and_the_class_token():
    shape = Shape(3, 7, 6, 4, 4, 2, shuffles=3, gallery=1)
    labels = np.array([0] * 10 + [1] * 5 + [2] * 3)
    shuffles = make_shuffles(shape, labels, np.arange(18), seed=0)
    assert [np.bincount(line).tolist() for line in shuffles.labels] == [[10, 5, 3]] * 3
    assert (np.sort(shuffles.tokens, axis=2) == np.arange(7)).all()
    assert (shuffles.tokens[..., 0] == 0).all()
    part = make_shuffles(shape, labels, np.arange(4, 9), seed=0)
    assert (part.labels == shuffles.labels[:, 4:9]).all()
    assert (part.tokens == shuffles.tokens[:, 4:9]).all()


def test_shares_of_tokens_sum_to_k():
    model = make({})
    statistics = statistics_of(model, images(20))
    shares = class_shares(statistics.layers[1], statistics.shapes[1])
    np.testing.assert_allclose(shares.sum(1), [2, 2, 2])
    summary = summarise_layer(statistics.layers[1], statistics.shapes[1], ("a", "b", "c"))
    assert sorted(summary["experts_by_class"]["class_order"]) == [0, 1, 2]
    assert sum(summary["load"]["share"]) == pytest.approx(1)
    np.testing.assert_allclose(np.sum(summary["experts_by_position"]["share"], axis=1), 2, atol=1e-5)


def test_moments_merge_and_bins_hold_the_ends():
    values = np.random.default_rng(0).normal(5, 2, 100)
    moments = np.zeros(3)
    for part in (values[:1], values[1:40], values[40:40], values[40:]):
        merge_moments(moments, moments_of(part))
    assert moments.tolist() == pytest.approx([100, values.mean(), values.var() * 100])
    assert histogram(np.array([0, 0.1, 0.5, 1.0, 1.0000001]), 2, 1.0).tolist() == [2, 3]


def test_strongest_requests():
    expert = np.array([0, 0, 0, 1, 0])
    weight = np.array([0.5, 0.9, 0.7, 0.1, 0.7])
    image = np.array([3, 3, 2, 3, 1])
    chosen, place = best_requests(expert, weight, image, np.zeros(5, int), most=2)
    # Expert 0: image 3 by its 0.9, then of the two with 0.7 that of image 1; expert 1 has one.
    assert chosen.tolist() == [1, 4, 3]
    assert place.tolist() == [0, 1, 0]


def test_windows_stay_inside_and_have_one_size():
    # 24 x 24 pixels, patches of 4: a margin of max(4, 24 // 6) = 4 on each side.
    assert window(2, 3, (4, 4), (24, 24)) == (4, 8, 12, 12)
    assert window(0, 5, (4, 4), (24, 24)) == (0, 12, 12, 12)
    assert window(0, 0, (4, 4), (8, 8)) == (0, 0, 8, 8)


def test_requests_of_images_that_fill_the_last_group_are_left_out():
    model = make({"group_size": 21})
    pixels = torch.rand(5, 1, 8, 12)
    requests = requests_of(record_routing(model, pixels)[1], model.config, 5)
    assert len(requests.image) == 5 * 7 * 2
    assert requests.image.max() == 4
