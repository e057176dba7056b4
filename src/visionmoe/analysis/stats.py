"""Streaming statistics of routings: tables of counts, histograms and moments whose size no number of images changes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from visionmoe.analysis.gallery import best_requests
from visionmoe.analysis.record import Requests, count_by_image
from visionmoe.data.randomness import sample_keys, shuffled_indices, uniform

WEIGHT_BINS, ENTROPY_BINS = 50, 50


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
    ) -> None:
        """One batch. entropy: (B, T, M) in bits. labels, indices: (B,), indices of the images in their source."""
        self.images += np.bincount(labels, minlength=shape.classes)
        self._add_tables(shape, requests, labels, shuffles)
        self._add_weights(shape, requests)
        self._add_entropy(shape, entropy)
        pair = np.unique(requests.image[requests.kept] * shape.tokens + requests.token[requests.kept])
        self.served_by_position += np.bincount(pair % shape.tokens, minlength=shape.tokens)
        self._add_best(shape, requests, labels, indices)

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

    def _add_weights(self, shape: Shape, requests: Requests) -> None:
        cell = requests.rank * shape.experts + requests.expert
        for table, chosen in ((self.asked, slice(None)), (self.kept, requests.kept)):
            table += np.bincount(cell[chosen], minlength=table.size).reshape(table.shape)
        for rank in range(shape.choices):
            values = requests.weight[requests.rank == rank].astype(np.float64)
            self.weights[rank] += histogram(values, WEIGHT_BINS, 1.0)
            merge_moments(self.weight_moments[rank], values)

    def _add_entropy(self, shape: Shape, entropy: np.ndarray) -> None:
        self.entropies += histogram(entropy.ravel(), ENTROPY_BINS, np.log2(max(2, shape.experts_seen)))
        merge_moments(self.entropy_moments[0], entropy.ravel().astype(np.float64))
        self.entropy_by_position += entropy.astype(np.float64).mean(2).sum(0)

    def _add_best(self, shape: Shape, requests: Requests, labels: np.ndarray, indices: np.ndarray) -> None:
        patch = requests.token >= shape.tokens - shape.patches
        seen = self.best_image >= 0
        expert_of_seen = np.nonzero(seen)[0]
        expert = np.concatenate([expert_of_seen, requests.expert[patch]])
        columns = {
            "best_weight": np.concatenate([self.best_weight[seen], requests.weight[patch]]),
            "best_image": np.concatenate([self.best_image[seen], indices[requests.image[patch]]]),
            "best_token": np.concatenate([self.best_token[seen], requests.token[patch]]),
            "best_label": np.concatenate([self.best_label[seen], labels[requests.image[patch]]]),
        }
        best = (columns["best_weight"], columns["best_image"], columns["best_token"])
        chosen, place = best_requests(expert, *best, most=shape.gallery)
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


def merge_moments(moments: np.ndarray, values: np.ndarray) -> None:
    """Adds values to (count, mean, sum of squared deviations), in place (Chan, Golub and LeVeque, 1983)."""
    if not len(values):
        return
    count, mean, squares = moments
    total, delta = count + len(values), values.mean() - mean
    moments[1] = mean + delta * len(values) / total
    moments[2] = squares + ((values - values.mean()) ** 2).sum() + delta**2 * count * len(values) / total
    moments[0] = total


def _by_token(token: np.ndarray, requests: Requests, shape: Shape) -> np.ndarray:
    """(T, 2, E) counts of requests by token place, first choices and later ones, and expert."""
    cell = (token * 2 + (requests.rank > 0)) * shape.experts + requests.expert
    return np.bincount(cell, minlength=shape.tokens * 2 * shape.experts).reshape(shape.tokens, 2, shape.experts)
