"""What results.json says of one sparse layer: shares, orders, moments and information from its tables."""

import dataclasses
from typing import Any

import numpy as np

from visionmoe.analysis.information import Information, information
from visionmoe.analysis.seriation import seriate
from visionmoe.analysis.stats import LayerStatistics, Shape


def class_shares(statistics: LayerStatistics, shape: Shape) -> np.ndarray:
    """Share of a class's tokens that ask for each expert, any choice; (classes, E), rows sum to K (or K*M)."""
    tokens = np.maximum(statistics.images, 1) * shape.tokens
    return statistics.by_class.sum(1) / tokens[:, None]


def position_shares(statistics: LayerStatistics) -> np.ndarray:
    """Share of the images whose token at a place asks for each expert, any of its choices; (T, E)."""
    return statistics.by_position.sum(1) / max(1, statistics.images.sum())


def summarise_layer(statistics: LayerStatistics, shape: Shape, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Everything of one layer as plain numbers."""
    shares = class_shares(statistics, shape)
    rows, columns = seriate(shares)
    return {
        "num_experts": shape.experts,
        "experts_by_class": {
            "share": _rounded(shares),
            "class_order": rows.tolist(),
            "expert_order": columns.tolist(),
            "images": statistics.images.tolist(),
        },
        "experts_by_position": {"share": _rounded(position_shares(statistics))},
        "combine_weights": _weights(statistics),
        "load": _load(statistics),
        "entropy_bits": _entropy(statistics, shape),
        "information": {
            "class": _both(statistics.by_class, statistics.shuffled_class),
            "position": _both(
                statistics.by_position[-shape.patches :], statistics.shuffled_position[:, -shape.patches :]
            ),
        },
        "gallery": _gallery(statistics, shape, class_names),
    }


def _both(table: np.ndarray, shuffled: np.ndarray) -> dict[str, dict[str, float]]:
    """table: (labels, 2, E); shuffled: (P, labels, 2, E)."""
    first = information(table[:, 0], list(shuffled[:, :, 0]))
    every = information(table.sum(1), list(shuffled.sum(2)))
    return {"first": _plain(first), "all": _plain(every)}


def _plain(found: Information) -> dict[str, float]:
    return {**dataclasses.asdict(found), "excess": found.excess, "share": found.share}


def _weights(statistics: LayerStatistics) -> dict[str, Any]:
    count, mean, squares = statistics.weight_moments.T
    return {
        "counts": statistics.weights.tolist(),
        "edges": np.linspace(0, 1, statistics.weights.shape[1] + 1).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(squares / np.maximum(count, 1)).tolist(),
    }


def _load(statistics: LayerStatistics) -> dict[str, Any]:
    asked, kept = statistics.asked, statistics.kept
    return {
        "share": (asked.sum(0) / max(1, asked.sum())).tolist(),
        "dropped_by_expert": (1 - kept.sum(0) / np.maximum(asked.sum(0), 1)).tolist(),
        "dropped_by_choice": (1 - kept.sum(1) / np.maximum(asked.sum(1), 1)).tolist(),
        "dropped": float(1 - kept.sum() / max(1, asked.sum())),
        "requests": int(asked.sum()),
    }


def _entropy(statistics: LayerStatistics, shape: Shape) -> dict[str, Any]:
    count, mean, squares = statistics.entropy_moments[0]
    images = max(1, int(statistics.images.sum()))
    return {
        "mean": float(mean),
        "std": float(np.sqrt(squares / max(1, count))),
        "highest": float(np.log2(max(2, shape.experts_seen))),
        "counts": statistics.entropies.tolist(),
        "by_position": (statistics.entropy_by_position / images).tolist(),
        "served_by_position": (statistics.served_by_position / images).tolist(),
    }


def _gallery(statistics: LayerStatistics, shape: Shape, class_names: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    front = shape.tokens - shape.patches
    columns = zip(
        statistics.best_weight, statistics.best_image, statistics.best_token, statistics.best_label, strict=True
    )
    return [
        [
            {"image": int(i), "patch": int(t) - front, "class": class_names[int(c)], "weight": round(float(w), 5)}
            for w, i, t, c in zip(*line, strict=True)
            if i >= 0
        ]
        for line in columns
    ]


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values, 6).tolist()
