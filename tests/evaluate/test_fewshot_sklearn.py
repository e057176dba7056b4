"""The ridge regression against scikit-learn's, on the same standardised features with the same constant column."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeClassifier

from visionmoe.evaluate.fewshot import fewshot_accuracy, select_shots

TEST_IMAGES = 400


def data(seed, classes, features):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features))
    labels = rng.integers(0, classes, 40 * classes)
    train = centres[labels] + rng.normal(scale=2.0, size=(len(labels), features))
    test = centres[rng.integers(0, classes, TEST_IMAGES)] + rng.normal(scale=2.0, size=(TEST_IMAGES, features))
    return train, labels, test


def prepared(train, test):
    """Standardised with the training images' mean and standard deviation, then the constant 100."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-5
    return [np.c_[(x - mean) / std, np.full(len(x), 100.0)] for x in (train, test)]


@pytest.mark.parametrize(("classes", "features"), [(2, 6), (5, 12), (5, 300)])  # the last: more features than images
@pytest.mark.parametrize("l2", [2.0**-10, 1.0, 2.0**9, 2.0**19])
def test_against_sklearn_same_predictions(classes, features, l2):
    train, labels, test = data(7, classes, features)
    shots, seed = 8, 3
    chosen = select_shots(labels, [shots], classes, seed)[shots]
    x, t = prepared(train[chosen], test)
    targets = 2.0 * np.eye(classes)[labels[chosen]] - 1.0
    by_ridge = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(x, targets).predict(t).argmax(axis=1)
    by_classifier = RidgeClassifier(alpha=l2, fit_intercept=False, solver="svd").fit(x, labels[chosen]).predict(t)
    assert len(set(by_ridge)) == classes  # the predictions are not all the same
    for predictions in (by_ridge, by_classifier):
        # Accuracy 1 on the other's predictions as labels: every single prediction is the same.
        assert fewshot_accuracy(train, labels, test, predictions, [shots], [l2], classes, seed) == [[1.0]]
