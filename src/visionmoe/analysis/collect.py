"""One pass over labelled images that fills the statistics of every sparse layer, and can be stopped and taken up."""

import dataclasses
import json
import logging
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from visionmoe.analysis.record import entropy_bits, recording, recording_probabilities, requests_of, with_probabilities
from visionmoe.analysis.stats import LayerStatistics, Shape, make_shuffles
from visionmoe.config import ModelConfig
from visionmoe.data.decode import one_line
from visionmoe.data.loader import EvalLoader
from visionmoe.evaluate.classify import autocast_context, evaluation_mode, prepare
from visionmoe.files import atomic_write
from visionmoe.model.vit import VisionTransformer

_log = logging.getLogger(__name__)
# What reading a file raises that was cut, is empty or holds something else.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


@dataclass
class Statistics:
    """Of all sparse layers, by block number. next_image: where in the source the pass goes on. broken: name -> why."""

    shapes: dict[int, Shape]
    layers: dict[int, LayerStatistics]
    num_images: int = 0
    next_image: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, config: ModelConfig, classes: int, shuffles: int, gallery: int) -> Self:
        shapes = {layer: _shape(config, layer, classes, shuffles, gallery) for layer in sorted(config.moe.layers)}
        return cls(shapes, {layer: LayerStatistics.empty(shape) for layer, shape in shapes.items()})

    def nbytes(self) -> int:
        """Memory of all tables; the same however many images were seen."""
        return sum(layer.nbytes() for layer in self.layers.values())

    def save(self, path: Path, fingerprint: str) -> None:
        about = {
            "fingerprint": fingerprint,
            "shapes": {layer: dataclasses.asdict(shape) for layer, shape in self.shapes.items()},
            "num_images": self.num_images,
            "next_image": self.next_image,
            "broken": self.broken,
        }
        arrays: dict[str, Any] = {
            f"{n}.{name}": array for n, layer in self.layers.items() for name, array in layer.arrays().items()
        }
        with atomic_write(path) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Self | None:
        """What `save` wrote with this fingerprint; None for none, and with a warning for another's or damage."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["fingerprint"] != fingerprint:
                    _log.warning("%s is of other options, another model or other images; it is made anew", path)
                    return None
                shapes = {int(layer): Shape(**shape) for layer, shape in about["shapes"].items()}
                tables: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in shapes}
                for key in set(stored.files) - {"about"}:
                    layer, _, name = key.partition(".")
                    tables[int(layer)][name] = stored[key]
            layers = {layer: LayerStatistics.of_arrays(arrays) for layer, arrays in tables.items()}
            return cls(shapes, layers, about["num_images"], about["next_image"], about["broken"])
        except _DAMAGE as error:
            _log.warning("%s is not a file of statistics (%s); it is made anew", path, one_line(error))
            return None


@dataclass(frozen=True)
class Keeping:
    """Where the pass saves itself, for which fingerprint, and after how many seconds again."""

    path: Path
    fingerprint: str
    seconds: float = 20.0


def collect(
    model: VisionTransformer,
    loader: EvalLoader,
    statistics: Statistics,
    *,
    seed: int = 0,
    autocast: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
    keeping: Keeping | None = None,
) -> None:
    """Adds all images of the loader from `statistics.next_image` on. The batches are the same as without a stop.

    seed: of the shuffles. on_batch: called with the number of images of every batch.
    """
    saved = time.monotonic()
    size, source = loader.config.eval_batch_size, loader.source
    start = statistics.next_image
    if start >= len(source):
        return
    with evaluation_mode(model):
        for images, labels, indices in loader.batches(start // size):
            _add(model, statistics, source.labels, images, labels, indices, seed, autocast)
            statistics.next_image = (int(indices[-1]) // size + 1) * size  # the batch may have lost broken images
            statistics.broken |= loader.broken
            on_batch(len(images))
            if keeping is not None and time.monotonic() - saved >= keeping.seconds:
                statistics.save(keeping.path, keeping.fingerprint)
                saved = time.monotonic()
    statistics.next_image = len(source)
    statistics.broken |= loader.broken
    if not statistics.num_images:
        raise ValueError("the data has no images")
    if keeping is not None:
        statistics.save(keeping.path, keeping.fingerprint)


def _add(
    model: VisionTransformer,
    statistics: Statistics,
    all_labels: np.ndarray,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    seed: int,
    autocast: bool,
) -> None:
    """One batch of every layer."""
    config, count = model.config, len(images)
    with recording(model) as routings, recording_probabilities(model) as found, autocast_context(model, autocast):
        model(prepare(model, images))
    first = next(iter(statistics.shapes.values()))  # labels, positions and P are the same in all layers
    shuffles = make_shuffles(first, all_labels, indices.numpy(), seed)
    for layer, table in statistics.layers.items():
        probabilities = found[layer][0]
        requests = requests_of(with_probabilities(routings[layer][0], probabilities), config, count)
        entropy = entropy_bits(probabilities, config, count).cpu().numpy()
        table.add(statistics.shapes[layer], requests, entropy, labels.numpy(), indices.numpy(), shuffles)
    statistics.num_images += count


def _shape(config: ModelConfig, layer: int, classes: int, shuffles: int, gallery: int) -> Shape:
    moe = config.moe
    return Shape(
        classes=classes,
        tokens=config.num_tokens,
        patches=config.grid[0] * config.grid[1],
        experts=moe.num_experts,
        experts_seen=moe.num_experts // config.ensemble_size,
        choices=moe.routing(layer).num_selected_experts if moe.router == "top_k" else 1,
        shuffles=shuffles,
        gallery=gallery,
    )
