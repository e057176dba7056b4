import numpy as np
import pytest
import torch

from visionmoe.evaluate.fewshot import best_l2, fewshot_accuracy, select_shots


def reference(conformance, case):
    table = np.load(conformance / "units" / "fewshot.npz")
    return {key.split("/")[1]: table[key] for key in table if key.startswith(f"{case}/")}


@pytest.mark.parametrize("case", [0, 1])
def test_selections_against_reference(case, conformance):
    data = reference(conformance, case)
    shots = [int(k) for k in data["shots"]]
    selected = select_shots(data["train_labels"], shots, int(data["train_labels"].max()) + 1, seed=0)
    for shot in shots:
        np.testing.assert_array_equal(selected[shot], data[f"selected_{shot}"])


@pytest.mark.parametrize("case", [0, 1])
def test_accuracy_against_reference(case, conformance):
    data = reference(conformance, case)
    shots, l2 = [int(k) for k in data["shots"]], [float(r) for r in data["l2"]]
    accuracy = fewshot_accuracy(data["train_features"], data["train_labels"], data["test_features"],
                                data["test_labels"], shots, l2, int(data["train_labels"].max()) + 1, 0)  # fmt: skip
    # The reference decomposes x'x in float32: its largest eigenvalue is about N * 100^2 (the bias column), so below
    # l2 = N * 100^2 * 2^-23 it regularises with its own rounding errors. Above, one near-tie may fall otherwise.
    images = len(data["test_labels"])
    for row, shot in enumerate(shots):
        count = sum(min(shot, int(n)) for n in np.bincount(data["train_labels"]))
        exact = np.array(l2) > 16 * count * 100.0**2 * 2.0**-23
        wrong = np.abs(accuracy[row] - data["accuracy"][row]) * images
        assert wrong[exact].max() < 1.5 and (wrong[exact] > 0.5).sum() <= 1
        assert wrong.max() < 0.05 * images
    assert best_l2({"only": accuracy}, l2) == data["best_l2"].tolist()


def test_ridge_is_the_closed_form_solution():
    rng = np.random.default_rng(3)
    train, test = rng.normal(size=(12, 4)), rng.normal(size=(50, 4))
    labels, truth = np.arange(12) % 3, rng.integers(0, 3, 50)
    got = fewshot_accuracy(train, labels, test, truth, [4], [0.5], 3, seed=1)
    x = np.c_[(train - train.mean(0)) / (train.std(0) + 1e-5), np.full(12, 100.0)]  # 4 shots are all 12 images
    weights = np.linalg.solve(x.T @ x + 0.5 * np.eye(5), x.T @ (2.0 * np.eye(3)[labels] - 1))
    t = np.c_[(test - train.mean(0)) / (train.std(0) + 1e-5), np.full(50, 100.0)]
    assert got[0, 0] == ((t @ weights).argmax(1) == truth).mean()


def test_more_features_than_images_gives_the_same_as_the_long_form():
    rng = np.random.default_rng(4)
    train, test, labels = rng.normal(size=(6, 40)), rng.normal(size=(30, 40)), np.arange(6) % 2
    got = fewshot_accuracy(torch.tensor(train), labels, test, np.zeros(30, int), [3], [1.0], 2)
    x = np.c_[(train - train.mean(0)) / (train.std(0) + 1e-5), np.full(6, 100.0)]
    weights = np.linalg.solve(x.T @ x + np.eye(41), x.T @ (2.0 * np.eye(2)[labels] - 1))
    t = np.c_[(test - train.mean(0)) / (train.std(0) + 1e-5), np.full(30, 100.0)]
    assert got[0, 0] == ((t @ weights).argmax(1) == 0).mean()


def test_best_l2_is_the_best_mean_rank():
    # ranks (worst 0): a = 0 1 2, b = 2 1 0, c = 0 2 1; means 2/3 4/3 1
    tables = {"a": np.array([[0.1, 0.2, 0.3]]), "b": np.array([[0.9, 0.8, 0.1]]), "c": np.array([[0.1, 0.3, 0.2]])}
    assert best_l2(tables, [1.0, 2.0, 4.0]) == [2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": [0]}, "shots must be at least one number >= 1, got \\[0\\]"),
        ({"l2_regs": [0.0]}, "l2_regs must be > 0"),
        ({"train_y": np.array([0.0, 1.0])}, "train_y must be 2 integers"),
        ({"test_x": np.ones((2, 3))}, "equally many features, got 2, 3"),
        ({"train_x": np.array([[1.0, np.nan], [0, 0]])}, "train_x must be finite"),
        ({"num_classes": 1}, "labels must be between 0 and 0"),
    ],
)
def test_mistakes_are_one_clear_error(change, message):
    good = {"train_x": np.eye(2), "train_y": np.array([0, 1]), "test_x": np.eye(2), "test_y": np.array([0, 1])}
    with pytest.raises(ValueError, match=message):
        fewshot_accuracy(**(good | {"shots": [1], "l2_regs": [1.0], "num_classes": 2} | change))
