"""Frozen features, their cache, and the evaluator of several data sets."""

import logging

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.evaluate.features import FeatureCache, extract, features_of, model_fingerprint
from visionmoe.evaluate.fewshot import FewShotData, FewShotEvaluator, best_l2, fewshot_accuracy


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    config = vm.ModelConfig(
        image_size=28, patch_size=14, in_channels=1, num_classes=10, hidden_size=16, num_layers=2, mlp_dim=24,
        num_heads=2, moe=vm.MoEConfig(num_experts=4, layers=(1,), num_selected_experts=2),
    )  # fmt: skip
    return vm.create_model(config.replace(**changes)).eval()


def loader(split="test[:50]", **changes):
    return EvalLoader(DataConfig(**({"eval_split": split, "eval_batch_size": 20} | changes)))


def counted(model):
    """The list that grows by the batch's size with every forward pass."""
    sizes = []
    model.patch_embed.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("changes", [{}, {"representation_size": 6}, {"pooling": "gap"}, {"layers": ()}])
def test_features_are_what_the_model_returns_without_its_head(changes):
    model = tiny(**changes)
    headless = tiny(num_classes=None, **changes)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    made = extract(model, loader())
    with torch.no_grad():
        expected = torch.cat([headless(images).logits for images, _, _ in loader()])
    assert torch.equal(made.x, expected)
    assert torch.equal(made.x, extract(headless, loader()).x)
    assert made.labels.tolist() == loader().source.labels.tolist()


def test_members_of_an_ensemble_stand_side_by_side():
    model = tiny(ensemble_size=2, num_selected_experts=1)
    images, _, _ = next(iter(loader()))
    with torch.no_grad():
        features = features_of(model, images)
        rows = model.forward_head(model.forward_features(images), pre_logits=True)  # copies of an image adjacent
    assert features.shape == (20, 32)
    assert torch.equal(features[3], torch.cat([rows[6], rows[7]]))


def test_the_last_group_of_a_fixed_size_is_filled_and_cut():
    model = tiny(group_size=8 * 5, capacity_factor=0.5)  # 8 images of 4 patches and a class token
    batches = loader("test[:13]", eval_batch_size=13)
    made = extract(model, batches)
    images, _, _ = next(iter(batches))
    filled = torch.cat([images, torch.full((3, 1, 28, 28), -1.0)])  # 13 images: two groups, of which 3 black
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(filled), pre_logits=True)[:13]
    assert torch.equal(made.x, expected)


def test_grey_model_on_colour_images_of_another_size(cifar10_parquet):
    images = loader("test[:30]", source=f"parquet:{cifar10_parquet}")
    assert extract(tiny(), images).x.shape == (30, 16)


def test_cache_reads_what_it_has_and_notices_every_change(tmp_path):
    model = tiny()
    cache, sizes = FeatureCache(tmp_path), counted(model)
    first = cache.features(model, loader())
    assert (sizes, first.cached) == ([20, 20, 10], False)
    second = cache.features(model, loader(workers=0, cache_mb=0))  # how images are read does not count
    assert (len(sizes), second.cached) == (3, True)
    assert torch.equal(first.x, second.x) and torch.equal(first.labels, second.labels)
    # Another split, batch, preprocessing, precision, routing setting, parameter: each is extracted anew.
    changed = [({}, {"split": "test[:49]"}), ({}, {"eval_batch_size": 25}), ({}, {"eval_resize": 32}),
               ({"autocast": True}, {})]  # fmt: skip
    for count, (how, what) in enumerate(changed, start=2):
        assert not cache.features(model, loader(**what), **how).cached
        assert len(list(tmp_path.iterdir())) == count
    model.set_routing(capacity_factor=0.3)
    assert not cache.features(model, loader()).cached
    model.set_routing(capacity_factor=1.05)
    assert cache.features(model, loader()).cached
    with torch.no_grad():
        model.blocks[0].norm1.bias[3] += 1e-3
    assert not cache.features(model, loader()).cached
    assert not FeatureCache(tmp_path, refresh=True).features(model, loader()).cached


def test_cache_notices_images_that_changed(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((28, 28), 40 * number, np.uint8)).save(folder / label / f"{number}.png")
    cache, model = FeatureCache(tmp_path / "cache"), tiny()
    images = {"split": "train", "source": f"folder:{folder}"}
    assert not cache.features(model, loader(**images)).cached
    assert cache.features(model, loader(**images)).cached
    Image.fromarray(np.full((28, 28), 200, np.uint8)).save(folder / "b" / "1.png")
    assert not cache.features(model, loader(**images)).cached


def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path):
    model, cache = tiny(), FeatureCache(tmp_path, save_seconds=0.0)
    expected = extract(model, loader(eval_batch_size=10))
    sizes = counted(model)

    def stop(count):
        if len(sizes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.features(model, loader(eval_batch_size=10), on_batch=stop)
    assert [path.name.partition(".")[2] for path in sorted(tmp_path.iterdir())] == [
        "part-0000.safetensors",
        "part-0001.safetensors",
    ]
    told = []
    made = cache.features(model, loader(eval_batch_size=10), on_batch=told.append)
    assert len(sizes) == 3 + 3  # batches 2, 3 and 4; the third was not yet saved
    assert told == [20, 10, 10, 10]  # what is there already counts for the progress
    assert torch.equal(made.x, expected.x) and torch.equal(made.labels, expected.labels)
    assert len(list(tmp_path.iterdir())) == 1  # the pieces are gone


def interrupt(cache, model, after):
    """An extraction of batches of 10 that ends before batch `after` is saved."""
    done = []

    def stop(count):
        done.append(count)
        if len(done) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.features(model, loader(eval_batch_size=10), on_batch=stop)


def test_an_interrupted_refresh_goes_on_without_it(tmp_path):
    model, cache = tiny(), FeatureCache(tmp_path, save_seconds=0.0)
    cache.features(model, loader(eval_batch_size=10))
    interrupt(FeatureCache(tmp_path, save_seconds=0.0, refresh=True), model, after=3)
    assert sorted(path.name.split(".")[1] for path in tmp_path.iterdir()) == ["part-0000", "part-0001"]
    sizes = counted(model)
    assert not cache.features(model, loader(eval_batch_size=10)).cached
    assert len(sizes) == 3  # batches 2, 3 and 4 of five


def test_only_pieces_without_gaps_count(tmp_path):
    model, cache = tiny(), FeatureCache(tmp_path, save_seconds=0.0)
    expected = extract(model, loader(eval_batch_size=10))
    interrupt(cache, model, after=5)  # four pieces of one batch
    parts = sorted(tmp_path.iterdir())
    parts[1].write_bytes(parts[3].read_bytes())  # begins with batch 3, where batch 1 is due
    sizes = counted(model)
    made = cache.features(model, loader(eval_batch_size=10))
    assert len(sizes) == 4
    assert torch.equal(made.x, expected.x) and torch.equal(made.labels, expected.labels)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    model, cache = tiny(), FeatureCache(tmp_path)
    first = cache.features(model, loader())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        again = cache.features(model, loader())
    assert "is damaged and made anew" in caplog.text
    assert not again.cached and torch.equal(again.x, first.x)


def test_fingerprint_is_of_parameters_and_config():
    assert model_fingerprint(tiny()) == model_fingerprint(tiny())
    different = {model_fingerprint(m) for m in (tiny(), tiny(seed=1), tiny(capacity_factor=2.0))}
    assert len(different) == 3


def sets():
    one = FewShotData("first", loader("train[:300]"), loader("test[:60]"))
    return [one, FewShotData("second", loader("train[300:500]"), loader("test[60:100]"))]


def test_evaluator_shares_the_strength_over_data_sets_and_seeds():
    model, seeds, l2_regs = tiny(), (0, 5), [0.01, 1.0, 100.0]
    evaluator = FewShotEvaluator(sets(), shots=[1, 4], seeds=seeds, l2_regs=l2_regs)
    results = evaluator.evaluate(model)
    tables = {}
    for one in sets():
        train, test = extract(model, one.train), extract(model, one.test)
        for seed in seeds:
            tables[one.name, seed] = fewshot_accuracy(
                train.x, train.labels, test.x, test.labels, [1, 4], l2_regs, 10, seed
            )
    chosen = best_l2(tables, l2_regs)  # ranks averaged over all four tables
    columns = [l2_regs.index(strength) for strength in chosen]
    assert results[0].l2_regs == results[1].l2_regs == tuple(chosen)
    for result in results:
        per_seed = np.array([[tables[result.name, seed][row, columns[row]] for seed in seeds] for row in (0, 1)])
        assert result.accuracy.tolist() == per_seed.tolist()
        assert result.mean == pytest.approx(per_seed.sum(axis=1) / 2)
        # Of two values the sample standard deviation is |a - b| / sqrt(2).
        assert result.std == pytest.approx(np.abs(per_seed[:, 0] - per_seed[:, 1]) / np.sqrt(2))
    pairs = dict(evaluator.run(model))
    assert pairs == {f"{r.name}/{k}-shot": r.mean[i] for r in results for i, k in enumerate([1, 4])}
    assert FewShotEvaluator(sets(), shots=[1], l2_regs=[1.0]).evaluate(model)[0].std is None


def test_evaluator_leaves_the_mode_and_tells_its_progress(caplog):
    model, batches, fits = tiny().train(), [], []
    evaluator = FewShotEvaluator(
        sets(), shots=[40], l2_regs=[1.0], on_batch=batches.append, on_fit=lambda: fits.append(1)
    )
    with caplog.at_level(logging.WARNING):
        dict(evaluator.run(model))
    assert model.training and sum(batches) == 300 + 60 + 200 + 40 and len(fits) == 2
    assert "second: 10 classes have fewer than 40 training images" in caplog.text
    caplog.clear()
    dict(evaluator.run(model))
    assert not caplog.text  # said once


def test_classes_without_any_training_image_are_named(caplog):
    labels = loader("train[:8]").source.labels
    names = [name for number, name in enumerate(loader().class_names) if number not in labels]
    assert len(names) > 3
    with caplog.at_level(logging.WARNING):
        FewShotEvaluator([FewShotData("few", loader("train[:8]"), loader("test[:10]"))], shots=[1]).evaluate(tiny())
    assert f"few has no training image of {', '.join(names[:3])} and {len(names) - 3} more" in caplog.text
    assert f"few: {len(names)} classes have fewer than 1 training images (the smallest 0)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": [0]}, "shots must be >= 1, got 0"),
        ({"shots": []}, "shots must be one or more, all different"),
        ({"shots": [5, 5]}, r"shots must be one or more, all different, got \[5, 5\]"),
        ({"seeds": [-1]}, "seeds must be >= 0, got -1"),
        ({"l2_regs": [0.0]}, "l2_regs must be > 0"),
        ({"data": []}, "data sets must be one or more"),
    ],
)
def test_mistakes_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        FewShotEvaluator(**({"data": sets()} | options))
