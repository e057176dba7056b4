"""Few-shot evaluation of frozen features: ridge regression in closed form (google-research/vmoe, big_vision).

k images per class, features standardised with their mean and std, a large constant appended for the bias, targets in
{-1, 1}. One eigendecomposition per k serves all strengths of the regularisation. The strength is chosen once per k, for
all data sets and seeds together: the one with the best mean rank of the test accuracies, as the reference does.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from visionmoe.data.loader import EvalLoader
from visionmoe.distributed.world import current, gather
from visionmoe.evaluate.features import FeatureCache, Features, extract, model_fingerprint
from visionmoe.model.vit import VisionTransformer

_log = logging.getLogger(__name__)

BIAS_CONSTANT = 100.0  # large, so that the bias is almost not regularised
STD_FLOOR = 1e-5
_SHOWN = 3  # names of classes in a warning
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
    test = test.to(torch.float64)
    out = np.empty((len(shots), len(l2_regs)))
    for row, shot in enumerate(shots):
        index = torch.from_numpy(selected[shot])
        ridge = _Ridge.fit(train[index].to(torch.float64), train_labels[index], num_classes)
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
class FewShotData:
    """A data set: k images of each class of `train` are learned from, all of `test` are classified."""

    name: str
    train: EvalLoader
    test: EvalLoader


@dataclass(frozen=True)
class FewShotResult:
    """What one data set gave. accuracy (shots, seeds) at the strengths l2_regs, one per number of shots."""

    name: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    l2_regs: tuple[float, ...]
    accuracy: NDArray[np.float64]
    num_classes: int
    train: Features
    test: Features
    fit_seconds: float

    @property
    def mean(self) -> list[float]:
        """Per number of shots, over the seeds."""
        return self.accuracy.mean(axis=1).tolist()

    @property
    def std(self) -> list[float] | None:
        """Sample standard deviation over the seeds, per number of shots; None with one seed, which has no spread."""
        return self.accuracy.std(axis=1, ddof=1).tolist() if len(self.seeds) > 1 else None


class FewShotEvaluator:
    """Built once for some data sets, then run with a model as often as wanted.

    shots: numbers of images per class. seeds: each selects other images. cache: where features are kept between runs.
    autocast: compute features in bfloat16. on_batch: called with the number of images of every batch; on_fit: after
    every seed of every data set.
    Raises ValueError for data sets, shots, seeds or strengths that cannot be, before any work.
    """

    def __init__(
        self,
        data: Sequence[FewShotData],
        *,
        shots: Sequence[int] = DEFAULT_SHOTS,
        seeds: Sequence[int] = (0,),
        l2_regs: Sequence[float] = DEFAULT_L2_REGS,
        autocast: bool = False,
        cache: FeatureCache | None = None,
        on_batch: Callable[[int], None] | None = None,
        on_fit: Callable[[], None] | None = None,
    ) -> None:
        self.data = list(data)
        _check_distinct("data sets", [one.name for one in self.data])
        _check_distinct("shots", shots, lowest=1)
        _check_distinct("seeds", seeds, lowest=0)
        if min(l2_regs, default=0.0) <= 0:
            raise ValueError(f"l2_regs must be > 0, got {list(l2_regs)}")
        self.shots, self.seeds, self.l2_regs = tuple(shots), tuple(seeds), tuple(l2_regs)
        self.autocast = autocast
        self.cache = cache
        self.on_batch, self.on_fit = on_batch, on_fit
        self._noted: set[str] = set()  # data sets whose small classes were told

    def run(self, model: VisionTransformer) -> Iterator[tuple[str, float]]:
        """Yields ("NAME/5-shot", mean accuracy over the seeds) for every data set and number of shots."""
        for result in self.evaluate(model):
            for shot, accuracy in zip(result.shots, result.mean, strict=True):
                yield f"{result.name}/{shot}-shot", accuracy

    def evaluate(self, model: VisionTransformer) -> list[FewShotResult]:
        """One result per data set, in their order; the model's mode is left as it was.

        Several processes share the images' batches and the fits, and all get the results. Collective.
        """
        key = None if self.cache is None else model_fingerprint(model)
        features = {one.name: [self._features(model, part, key) for part in (one.train, one.test)] for one in self.data}
        for one in self.data:
            if one.name not in self._noted:
                self._noted.add(one.name)
                _note_small_classes(one.name, features[one.name][0].labels, self.shots, one.train.class_names)
        tables, seconds = self._fits(features)
        chosen = best_l2(tables, self.l2_regs)
        columns = [self.l2_regs.index(strength) for strength in chosen]
        return [
            FewShotResult(
                name=one.name,
                shots=self.shots,
                seeds=self.seeds,
                l2_regs=tuple(chosen),
                accuracy=np.stack(
                    [tables[f"{one.name} {seed}"][np.arange(len(columns)), columns] for seed in self.seeds], axis=1
                ),
                num_classes=one.train.num_classes,
                train=features[one.name][0],
                test=features[one.name][1],
                fit_seconds=seconds[one.name],
            )
            for one in self.data
        ]

    def _fits(
        self, features: Mapping[str, Sequence[Features]]
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
        """Accuracies (shots, l2_regs) by "NAME seed", and the seconds of each data set's fits."""
        world = current()
        tasks = [(one, seed) for one in self.data for seed in self.seeds]
        own: dict[int, tuple[NDArray[np.float64], float]] = {}
        for number in range(world.rank, len(tasks), world.size):
            one, seed = tasks[number]
            started = time.perf_counter()
            train, test = features[one.name]
            table = fewshot_accuracy(
                train.x, train.labels, test.x, test.labels, self.shots, self.l2_regs, one.train.num_classes, seed
            )
            own[number] = table, time.perf_counter() - started
            if self.on_fit is not None:
                for _ in tasks[number - world.rank :][: world.size]:  # those of the other processes, too
                    self.on_fit()
        found = {number: fit for part in gather(own) for number, fit in part.items()}
        seconds = dict.fromkeys(features, 0.0)
        for number, (one, _) in enumerate(tasks):
            seconds[one.name] += found[number][1]
        return {f"{one.name} {seed}": found[number][0] for number, (one, seed) in enumerate(tasks)}, seconds

    def _features(self, model: VisionTransformer, loader: EvalLoader, key: str | None) -> Features:
        if self.cache is None:
            return extract(model, loader, autocast=self.autocast, on_batch=self.on_batch)
        return self.cache.features(model, loader, autocast=self.autocast, model_key=key, on_batch=self.on_batch)


def _check_distinct(what: str, values: Sequence[str] | Sequence[int], lowest: int | None = None) -> None:
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{what} must be one or more, all different, got {list(values)}")
    wrong = [value for value in values if lowest is not None and int(value) < lowest]
    if wrong:
        raise ValueError(f"{what} must be >= {lowest}, got {wrong[0]}")


def _note_small_classes(name: str, labels: Tensor, shots: Sequence[int], class_names: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(class_names))
    empty = [class_names[number] for number in torch.nonzero(counts == 0).flatten().tolist()]
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        _log.warning("%s has no training image of %s%s", name, ", ".join(empty[:_SHOWN]), more)
    small = int((counts < max(shots)).sum())
    if small:
        _log.warning(
            "%s: %d classes have fewer than %d training images (the smallest %d) and give all that they have",
            name,
            small,
            max(shots),
            int(counts.min()),
        )


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
    x = torch.as_tensor(value).detach().cpu()
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
