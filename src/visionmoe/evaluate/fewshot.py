"""Few-shot evaluation of frozen features: ridge regression in closed form (google-research/vmoe, big_vision).

k images per class, features standardised with their mean and std, a large constant appended for the bias, targets in
{-1, 1}. One eigendecomposition per k serves all strengths of the regularisation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

BIAS_CONSTANT = 100.0  # large, so that the bias is almost not regularised
STD_FLOOR = 1e-5
DEFAULT_SHOTS = (1, 5, 10, 25)
DEFAULT_L2_REGS = tuple(2.0**exponent for exponent in range(-10, 20))


def fewshot_accuracy(
    train_x: ArrayLike | Tensor,
    train_y: ArrayLike | Tensor,
    test_x: ArrayLike | Tensor,
    test_y: ArrayLike | Tensor,
    shots: Sequence[int] = DEFAULT_SHOTS,
    l2_regs: Sequence[float] = DEFAULT_L2_REGS,
    num_classes: int | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Returns the test accuracy for every number of shots and strength of regularisation, (shots, l2_regs).

    train_x (N, D) and test_x (N', D) features, train_y and test_y integer labels. num_classes None: the largest
    training label + 1. Classes with fewer than k images give all that they have.
    Raises ValueError for shapes, labels, shots or strengths that cannot be.
    """
    train, test = _features("train_x", train_x), _features("test_x", test_x)
    train_labels, test_labels = _labels("train_y", train_y, len(train)), _labels("test_y", test_y, len(test))
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train_x and test_x must have equally many features, got {train.shape[1]}, {test.shape[1]}")
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    if int(train_labels.max()) >= num_classes or min(int(train_labels.min()), int(test_labels.min())) < 0:
        raise ValueError(f"labels must be between 0 and {num_classes - 1}")
    if min(l2_regs, default=0.0) <= 0:
        raise ValueError(f"l2_regs must be > 0, got {list(l2_regs)}")
    selected = select_shots(train_labels.numpy(), shots, num_classes, seed)
    out = np.empty((len(shots), len(l2_regs)))
    for row, shot in enumerate(shots):
        index = torch.from_numpy(selected[shot])
        ridge = _Ridge.fit(train[index], train_labels[index], num_classes)
        standard = ridge.standardise(test)
        for column, strength in enumerate(l2_regs):
            hits = (standard @ ridge.weights(strength)).argmax(dim=1) == test_labels
            out[row, column] = hits.double().mean().item()
    return out


def select_shots(
    labels: NDArray[np.integer], shots: Sequence[int], num_classes: int, seed: int
) -> dict[int, NDArray[np.int64]]:
    """Indices of k images per class, for each k of `shots`; those of a smaller k are among those of a larger one.

    The reference's selection: numpy's default generator permutes the images of class 0, then those of class 1, ...,
    and the first k of each class are taken.
    """
    if min(shots, default=0) < 1:
        raise ValueError(f"shots must be at least one number >= 1, got {list(shots)}")
    generator = np.random.default_rng(seed)
    permuted = [generator.permutation(np.flatnonzero(np.asarray(labels) == c)) for c in range(num_classes)]
    return {shot: np.concatenate([indices[:shot] for indices in permuted]) for shot in shots}


def best_l2(accuracies: Mapping[str, NDArray[np.float64]], l2_regs: Sequence[float]) -> list[float]:
    """For each number of shots, the strength with the best mean rank over data sets.

    accuracies: data set -> (shots, l2_regs), as `fewshot_accuracy` gives them. Ranks and ties as in the reference.
    """
    ranks = [np.argsort(np.argsort(table, axis=1), axis=1) for table in accuracies.values()]
    return [float(l2_regs[i]) for i in np.argmax(np.mean(ranks, axis=0), axis=1)]


@dataclass(frozen=True)
class _Ridge:
    """weights(l2) = left @ diag(1 / (eigenvalues + l2)) @ right solves (x'x + l2) w = x'y. Float64 throughout."""

    mean: Tensor
    std: Tensor
    eigenvalues: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, num_classes: int) -> "_Ridge":
        """x (N, D), labels (N,). The smaller of x'x (D+1, D+1) and xx' (N, N) is decomposed."""
        mean = x.mean(dim=0, keepdim=True)
        std = x.std(dim=0, keepdim=True, correction=0) + STD_FLOOR
        x = _with_bias((x - mean) / std)
        y = 2.0 * torch.nn.functional.one_hot(labels, num_classes).to(x.dtype) - 1.0
        if x.shape[0] >= x.shape[1]:
            eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
            return cls(mean, std, eigenvalues, vectors, vectors.T @ (x.T @ y))
        eigenvalues, vectors = torch.linalg.eigh(x @ x.T)
        return cls(mean, std, eigenvalues, x.T @ vectors, vectors.T @ y)

    def standardise(self, x: Tensor) -> Tensor:
        return _with_bias((x - self.mean) / self.std)

    def weights(self, l2: float) -> Tensor:
        """(D+1, classes)."""
        return (self.left / (self.eigenvalues + l2)) @ self.right


def _with_bias(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1), value=BIAS_CONSTANT)


def _features(name: str, value: ArrayLike | Tensor) -> Tensor:
    x = torch.as_tensor(value).detach().cpu().to(torch.float64)
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"{name} must be (images, features), got shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return x


def _labels(name: str, value: ArrayLike | Tensor, rows: int) -> Tensor:
    labels = torch.as_tensor(value).detach().cpu()
    if labels.shape != (rows,) or labels.is_floating_point():
        raise ValueError(f"{name} must be {rows} integers, got {labels.dtype} of shape {tuple(labels.shape)}")
    return labels.to(torch.int64)
