"""Streaming statistics of routings: tables of counts, histograms and moments whose size no number of images changes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from visionmoe.analysis.gallery import best_requests
from visionmoe.analysis.record import Requests, count_by_image
from visionmoe.data.randomness import sample_keys, shuffled_indices, uniform

WEIGHT_BINS, ENTROPY_BINS = 50, 50
BEST = ("best_weight", "best_image", "best_token", "best_label")


@dataclass(frozen=True)
class Shape:
    """What the statistics of one layer are about: numbers of classes, tokens T per image (class token included),
    patches, experts E, experts a token chooses from (E/M), choices K, ensemble members M; and how much is kept."""

    classes: int
    tokens: int
    patches: int
    experts: int
    experts_seen: int
    choices: int
    shuffles: int
    gallery: int


@dataclass(frozen=True)
class Shuffles:
    """The labels of a batch as P permutations see them. labels: (P, B); tokens: (P, B, T), the new place of each."""

    labels: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Moments:
    """What one batch adds to the statistics of a layer that is no integer, so that the order matters in which batches
    are added: weights (K, 3) and entropies (1, 3) as count, mean, squared deviations; entropy_by_position (T,)."""

    weights: np.ndarray
    entropies: np.ndarray
    entropy_by_position: np.ndarray


@dataclass
class LayerStatistics:
    """Of one sparse layer; axis "2" is first choices and later ones. Counts are int64 and of requests.

    by_class (classes, 2, E) and by_position (T, 2, E); the same of shuffled labels (P, ...). asked, kept (K, E).
    weights (K, bins): Requests.weight, 0 .. 1. entropies (bins,): of tokens' probabilities, over 0 .. log2(E/M)
    bits. weight_moments (K, 3), entropy_moments (1, 3): count, mean, sum of squared deviations.
    entropy_by_position, served_by_position (T,): sum of entropies; how many tokens at least one expert processed.
    images (classes,).
    best_* (E, N): the strongest requests of patches, one per image: weight, image (-1: none), token, label.
    """

    by_class: np.ndarray
    by_position: np.ndarray
    shuffled_class: np.ndarray
    shuffled_position: np.ndarray
    asked: np.ndarray
    kept: np.ndarray
    weights: np.ndarray
    weight_moments: np.ndarray
    entropies: np.ndarray
    entropy_moments: np.ndarray
    entropy_by_position: np.ndarray
    served_by_position: np.ndarray
    images: np.ndarray
    best_weight: np.ndarray
    best_image: np.ndarray
    best_token: np.ndarray
    best_label: np.ndarray

    @classmethod
    def empty(cls, shape: Shape) -> Self:
        experts, choices, best = shape.experts, shape.choices, (shape.experts, shape.gallery)
        class_table, position_table = (shape.classes, 2, experts), (shape.tokens, 2, experts)
        count = np.int64
        return cls(
            by_class=np.zeros(class_table, count),
            by_position=np.zeros(position_table, count),
            shuffled_class=np.zeros((shape.shuffles, *class_table), count),
            shuffled_position=np.zeros((shape.shuffles, *position_table), count),
            asked=np.zeros((choices, experts), count),
            kept=np.zeros((choices, experts), count),
            weights=np.zeros((choices, WEIGHT_BINS), count),
            weight_moments=np.zeros((choices, 3)),
            entropies=np.zeros(ENTROPY_BINS, count),
            entropy_moments=np.zeros((1, 3)),
            entropy_by_position=np.zeros(shape.tokens),
            served_by_position=np.zeros(shape.tokens, count),
            images=np.zeros(shape.classes, count),
            best_weight=np.zeros(best, np.float32),
            best_image=np.full(best, -1, count),
            best_token=np.zeros(best, count),
            best_label=np.zeros(best, count),
        )

    def add(
        self,
        shape: Shape,
        requests: Requests,
        entropy: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        shuffles: Shuffles,
    ) -> Moments:
        """One batch, but for its moments, which are to be given to `add_moments` in the order of the batches.

        entropy: (B, T, M) in bits. labels, indices: (B,), indices of the images in their source.
        """
        self.images += np.bincount(labels, minlength=shape.classes)
        self._add_tables(shape, requests, labels, shuffles)
        weights = self._add_weights(shape, requests)
        self.entropies += histogram(entropy.ravel(), ENTROPY_BINS, np.log2(max(2, shape.experts_seen)))
        pair = np.unique(requests.image[requests.kept] * shape.tokens + requests.token[requests.kept])
        self.served_by_position += np.bincount(pair % shape.tokens, minlength=shape.tokens)
        self._add_best(shape, requests, labels, indices)
        values = entropy.astype(np.float64)
        return Moments(weights, moments_of(values.ravel())[None], values.mean(2).sum(0))

    def add_moments(self, moments: Moments) -> None:
        for own, batch in zip(self.weight_moments, moments.weights, strict=True):
            merge_moments(own, batch)
        merge_moments(self.entropy_moments[0], moments.entropies[0])
        self.entropy_by_position += moments.entropy_by_position

    def counts(self) -> dict[str, np.ndarray]:
        """The tables of integers that only grow: those of two parts of the images are added up."""
        return {name: array for name, array in self.arrays().items()
                if array.dtype == np.int64 and not name.startswith("best_")}  # fmt: skip

    def merge_best(self, other: Mapping[str, np.ndarray]) -> None:
        """Takes up the strongest requests, best_*, of other images."""
        there = other["best_image"] >= 0
        self._choose_best(np.nonzero(there)[0], {name: other[name][there] for name in BEST})

    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def _add_tables(self, shape: Shape, requests: Requests, labels: np.ndarray, shuffles: Shuffles) -> None:
        by_image = count_by_image(requests, len(labels), shape.experts)
        np.add.at(self.by_class, labels, by_image)  # a class belongs to the whole image
        self.by_position += _by_token(requests.token, requests, shape)
        for number in range(shape.shuffles):
            np.add.at(self.shuffled_class[number], shuffles.labels[number], by_image)
            token = shuffles.tokens[number][requests.image, requests.token]
            self.shuffled_position[number] += _by_token(token, requests, shape)

    def _add_weights(self, shape: Shape, requests: Requests) -> np.ndarray:
        """Returns the moments (K, 3)."""
        cell = requests.rank * shape.experts + requests.expert
        for table, chosen in ((self.asked, slice(None)), (self.kept, requests.kept)):
            table += np.bincount(cell[chosen], minlength=table.size).reshape(table.shape)
        moments = np.zeros((shape.choices, 3))
        for rank in range(shape.choices):
            values = requests.weight[requests.rank == rank].astype(np.float64)
            self.weights[rank] += histogram(values, WEIGHT_BINS, 1.0)
            moments[rank] = moments_of(values)
        return moments

    def _add_best(self, shape: Shape, requests: Requests, labels: np.ndarray, indices: np.ndarray) -> None:
        patch = requests.token >= shape.tokens - shape.patches
        image = requests.image[patch]
        columns = (requests.weight[patch], indices[image], requests.token[patch], labels[image])
        self._choose_best(requests.expert[patch], dict(zip(BEST, columns, strict=True)))

    def _choose_best(self, expert: np.ndarray, requests: Mapping[str, np.ndarray]) -> None:
        """Keeps the strongest of the present ones and of these, all (R,)."""
        seen = self.best_image >= 0
        expert = np.concatenate([np.nonzero(seen)[0], expert])
        columns = {name: np.concatenate([getattr(self, name)[seen], requests[name]]) for name in BEST}
        best = (columns["best_weight"], columns["best_image"], columns["best_token"])
        chosen, place = best_requests(expert, *best, most=self.best_image.shape[1])
        for name, column in columns.items():
            getattr(self, name)[expert[chosen], place] = column[chosen]


def make_shuffles(shape: Shape, all_labels: np.ndarray, indices: np.ndarray, seed: int) -> Shuffles:
    """The P shuffles of a batch, a function of the seed and the images' indices alone.

    Classes: each of P permutations of all images gives an image the label of another one, so classes keep their sizes
    and the tokens of an image stay together. Positions: in each image the patches change places at random; the class
    token keeps its own.
    """
    front = shape.tokens - shape.patches
    labels = np.empty((shape.shuffles, len(indices)), np.int64)
    tokens = np.empty((shape.shuffles, len(indices), shape.tokens), np.int64)
    tokens[..., :front] = np.arange(front)
    for number in range(shape.shuffles):
        labels[number] = all_labels[shuffled_indices(seed, number, indices, len(all_labels))]
        keys = sample_keys(seed + 1, np.full(len(indices), number), indices)
        draws = np.stack([uniform(keys, patch) for patch in range(shape.patches)], axis=1)  # (B, patches)
        tokens[number, :, front:] = front + draws.argsort(1)
    return Shuffles(labels, tokens)


def histogram(values: np.ndarray, bins: int, highest: float) -> np.ndarray:
    """Counts in equal bins over 0 .. highest, int64 (bins,); what rounding puts outside counts in the end bins."""
    return np.bincount(np.clip((values / highest * bins).astype(np.int64), 0, bins - 1), minlength=bins)


def moments_of(values: np.ndarray) -> np.ndarray:
    """Count, mean, sum of squared deviations of values (N,), float64 (3,)."""
    mean = values.mean() if len(values) else 0.0
    return np.array([len(values), mean, ((values - mean) ** 2).sum()])


def merge_moments(moments: np.ndarray, others: np.ndarray) -> None:
    """Adds what `moments_of` gives for more values, in place (Chan, Golub and LeVeque, 1983)."""
    count, mean, squares = moments
    more, more_mean, more_squares = others
    if not more:
        return
    total, delta = count + more, more_mean - mean
    moments[:] = total, mean + delta * more / total, squares + more_squares + delta**2 * count * more / total


def _by_token(token: np.ndarray, requests: Requests, shape: Shape) -> np.ndarray:
    """(T, 2, E) counts of requests by token place, first choices and later ones, and expert."""
    cell = (token * 2 + (requests.rank > 0)) * shape.experts + requests.expert
    return np.bincount(cell, minlength=shape.tokens * 2 * shape.experts).reshape(shape.tokens, 2, shape.experts)
