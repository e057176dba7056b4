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
import torch

from visionmoe.analysis.record import entropy_bits, recording, recording_probabilities, requests_of, with_probabilities
from visionmoe.analysis.stats import BEST, LayerStatistics, Moments, Shape, make_shuffles
from visionmoe.config import ModelConfig
from visionmoe.data.loader import EvalLoader
from visionmoe.distributed.world import current, from_first, gather, sum_of_all, tensor_of_first
from visionmoe.evaluate.forward import autocast_context, evaluation_mode, prepare
from visionmoe.evaluate.shared_batches import Share, broken_of_all, segments
from visionmoe.files import atomic_write, one_line
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

    def keep(self, keeping: "Keeping") -> None:
        """Saves; of several processes the first one does."""
        if current().is_first:
            self.save(keeping.path, keeping.fingerprint)

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


def statistics_of_first(own: Statistics | None) -> Statistics | None:
    """Those of the first process, on every process; what the others give is not looked at. Collective."""
    if current().size == 1:
        return own
    about = from_first(None if own is None else dataclasses.replace(own, layers={}))
    if about is None:
        return None
    layers = {}
    for layer, shape in about.shapes.items():
        arrays = (LayerStatistics.empty(shape) if own is None else own.layers[layer]).arrays()
        arrays = {name: tensor_of_first(torch.from_numpy(array)).numpy() for name, array in arrays.items()}
        layers[layer] = LayerStatistics.of_arrays(arrays)
    return dataclasses.replace(about, layers=layers)


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

    Several processes share the batches, and all get the same statistics as one would. Collective.
    seed: of the shuffles. on_batch: called with the number of images of every batch, of all processes.
    """
    saved, source = time.monotonic(), loader.source
    start = statistics.next_image
    if start >= len(source):
        return
    size, seconds = loader.config.eval_batch_size, 20.0 if keeping is None else keeping.seconds
    with evaluation_mode(model):
        for segment in segments(model, loader, start=start // size, seconds=seconds, autocast=autocast):
            part, told = _Part.of(statistics), 0
            for share in segment.batches:
                if told:
                    on_batch(told)
                part.add(model, source.labels, share, seed, autocast)
                told = share.progress  # of the last one only when the statistics have it
            broken = broken_of_all(loader)
            part.merge_into(statistics)
            statistics.next_image = min(segment.stop * size, len(source))
            statistics.broken |= broken
            if told:
                on_batch(told)
            if keeping is not None and time.monotonic() - saved >= keeping.seconds:
                statistics.keep(keeping)
                saved = time.monotonic()
    if not statistics.num_images:
        raise ValueError("the data has no images")
    if keeping is not None:
        statistics.keep(keeping)


@dataclass
class _Part:
    """What this process adds to the statistics in one segment. layers: in one process those of the statistics."""

    shapes: dict[int, Shape]
    layers: dict[int, LayerStatistics]
    moments: dict[int, dict[int, Moments]]  # by batch number and layer
    num_images: int = 0

    @classmethod
    def of(cls, statistics: Statistics) -> Self:
        layers = statistics.layers
        if current().size > 1:
            layers = {layer: LayerStatistics.empty(shape) for layer, shape in statistics.shapes.items()}
        return cls(statistics.shapes, layers, {})

    def add(self, model: VisionTransformer, all_labels: np.ndarray, share: Share, seed: int, autocast: bool) -> None:
        """One batch of every layer."""
        config, count = model.config, len(share.images)
        with recording(model) as routings, recording_probabilities(model) as found, autocast_context(model, autocast):
            model(prepare(model, share.images))
        labels, indices = share.labels.numpy(), share.indices.numpy()
        first = next(iter(self.shapes.values()))  # labels, positions and P are the same in all layers
        shuffles = make_shuffles(first, all_labels, indices, seed)
        moments = self.moments.setdefault(share.number, {})
        for layer, table in self.layers.items():
            probabilities = found[layer][0]
            requests = requests_of(with_probabilities(routings[layer][0], probabilities), config, count)
            entropy = entropy_bits(probabilities, config, count).cpu().numpy()
            moments[layer] = table.add(self.shapes[layer], requests, entropy, labels, indices, shuffles)
        self.num_images += count

    def merge_into(self, statistics: Statistics) -> None:
        """Adds the parts of all processes. Collective."""
        statistics.num_images += sum(gather(self.num_images))
        if current().size > 1:
            for layer, table in self.layers.items():
                into = statistics.layers[layer]
                for name, array in table.counts().items():
                    getattr(into, name)[...] += sum_of_all(torch.from_numpy(array)).numpy()
                for best in gather({name: getattr(table, name) for name in BEST}):
                    into.merge_best(best)
        moments = {number: layers for part in gather(self.moments) for number, layers in part.items()}
        for number in sorted(moments):
            for layer, batch in moments[number].items():
                statistics.layers[layer].add_moments(batch)


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
