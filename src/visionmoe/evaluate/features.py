"""Frozen features of a data set, what the model returns before its head, and their cache on disk.

    FOLDER/KEY.safetensors             x (N, D), labels (N,), and which images were broken
    FOLDER/KEY.part-0003.safetensors   pieces of an extraction that was interrupted; it goes on behind them

KEY is a hash of all that features follow from: the parameters, the model's config with its routing setting, the source
with its names, labels and some of its pixels, the split, the preprocessing, the batch size (images of a batch can
compete for places), the precision, and the version of this package. Nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visionmoe import __version__
from visionmoe.config import to_dict
from visionmoe.data.decode import BrokenImageError
from visionmoe.data.loader import EvalLoader
from visionmoe.data.sources import Source
from visionmoe.distributed.world import current, from_first, tensor_of_first
from visionmoe.evaluate.forward import Loader, autocast_context, evaluation_mode, prepare
from visionmoe.evaluate.shared_batches import broken_of_all, rows_in_order, segments, shared_batches
from visionmoe.files import atomic_write
from visionmoe.model.vit import VisionTransformer

FORMAT = 2
SAMPLED_IMAGES = 16  # of a source, whose pixels count for the key
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """x (N, D) float32 and labels (N,) int64, on the CPU; broken: images left out and why; seconds that it took."""

    x: Tensor
    labels: Tensor
    broken: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False


def features_of(model: VisionTransformer, images: Tensor, *, autocast: bool = False) -> Tensor:
    """What the model returns before its head, for images (B, C, H, W): (B, M*D) float32 on the CPU.

    The M members of an ensemble stand side by side. A last, incomplete routing group is filled and cut off again.
    """
    filled, rows = prepare(model, images), []
    # Taken on their way to the head: a model that is spread over processes gathers its weights when it is called.
    handle = model.head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    try:
        with autocast_context(model, autocast):
            model(filled)
    finally:
        handle.remove()
    return rows[0].float().reshape(len(filled), -1)[: len(images)].cpu()  # (B*M, D) -> (B, M*D)


def extract(
    model: VisionTransformer,
    loader: Loader,
    *,
    autocast: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """The features of all images of a loader, in its order. ValueError where there are none.

    Several processes share the batches, and all get all features. Collective.
    """
    started = time.perf_counter()
    rows: dict[int, tuple[Tensor, ...]] = {}
    with evaluation_mode(model):
        for share in shared_batches(model, loader, autocast=autocast):
            rows[share.number] = features_of(model, share.images, autocast=autocast), share.labels
            if on_batch is not None:
                on_batch(share.progress)
    broken, columns = broken_of_all(loader), rows_in_order(rows)
    if not columns:
        raise ValueError("the data has no images")
    x, labels = columns
    return Features(x, labels, broken, time.perf_counter() - started)


class FeatureCache:
    """Features that were extracted once are read from `folder`; others are extracted and written there.

    refresh: delete what is there and extract anew. save_seconds: so often the work of a long extraction is put aside.
    """

    def __init__(self, folder: str | os.PathLike, *, refresh: bool = False, save_seconds: float = 15.0) -> None:
        self.folder = Path(folder)
        self.refresh = refresh
        self.save_seconds = save_seconds

    def features(
        self,
        model: VisionTransformer,
        loader: EvalLoader,
        *,
        autocast: bool = False,
        model_key: str | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Features:
        """As `extract`. model_key: `model_fingerprint(model)`, where the caller has it already.

        Of several processes the first one reads and writes.
        """
        started = time.perf_counter()
        key = features_key(model_key or model_fingerprint(model), loader, autocast=autocast)
        path = self.folder / f"{key}.safetensors"
        found, pieces = None, _Pieces(self.folder, key)
        if current().is_first:
            if self.refresh:
                for old in (path, *_parts(self.folder, key)):
                    old.unlink(missing_ok=True)
            found = _read(path)
            if found is None:
                pieces.read()
        stored = _features_of_first(None if found is None else found.features)
        if stored is not None:
            if on_batch is not None:
                on_batch(len(stored.x))
            return dataclasses.replace(stored, seconds=time.perf_counter() - started, cached=True)
        pieces.next_batch, before = from_first((pieces.next_batch, pieces.num_images))
        if on_batch is not None and before:
            on_batch(before)
        with evaluation_mode(model):
            self._fill(pieces, model, loader, autocast, on_batch)
        made = None
        if current().is_first:
            made = pieces.joined()
            _write(path, made, 0, len(loader))
            for part in _parts(self.folder, key):
                part.unlink(missing_ok=True)
        made = _features_of_first(made)
        assert made is not None
        return dataclasses.replace(made, seconds=time.perf_counter() - started)

    def _fill(
        self,
        pieces: "_Pieces",
        model: VisionTransformer,
        loader: EvalLoader,
        autocast: bool,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        saved = time.perf_counter()
        start, seconds = pieces.next_batch, self.save_seconds
        for segment in segments(model, loader, start=start, seconds=seconds, autocast=autocast):
            rows: dict[int, tuple[Tensor, ...]] = {}
            for share in segment.batches:
                rows[share.number] = features_of(model, share.images, autocast=autocast), share.labels
                if on_batch is not None:
                    on_batch(share.progress)
            broken, columns = broken_of_all(loader), rows_in_order(rows)
            if not current().is_first:
                continue
            pieces.add(columns, broken, segment.stop)
            if time.perf_counter() - saved >= self.save_seconds:
                pieces.save()
                saved = time.perf_counter()


class _Pieces:
    """An extraction on its way: pieces on disk, then what is not saved yet. next_batch: the first one missing.

    Pieces count as far as each begins where the one before it ends; others are deleted.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.next_batch = self._saved_batches = 0
        self.parts: list[Features] = []
        self.broken: dict[str, str] = {}
        self._unsaved: list[tuple[Tensor, ...]] = []

    def read(self) -> None:
        """Takes up what is on disk."""
        while (found := _read(self._path(len(self.parts)))) is not None and found.first_batch == self.next_batch:
            self.parts.append(found.features)
            self.next_batch = self._saved_batches = found.next_batch
            self.broken |= found.features.broken
        kept = [self._path(number) for number in range(len(self.parts))]
        for path in _parts(self.folder, self.key):
            if path not in kept:
                path.unlink(missing_ok=True)

    @property
    def num_images(self) -> int:
        return sum(len(part.x) for part in self.parts)

    def add(self, columns: tuple[Tensor, ...], broken: Mapping[str, str], next_batch: int) -> None:
        """columns: x and labels of the batches up to next_batch - 1, or nothing where these have no whole image."""
        if columns:
            self._unsaved.append(columns)
        self.broken |= broken
        self.next_batch = next_batch

    def save(self) -> None:
        if not self._unsaved:
            return
        part = self._rest()
        _write(self._path(len(self.parts)), part, self._saved_batches, self.next_batch)
        self.parts.append(part)
        self._saved_batches = self.next_batch

    def joined(self) -> Features:
        parts = [*self.parts, self._rest()] if self._unsaved else self.parts
        if not parts:
            raise ValueError("the data has no images")
        x, labels = torch.cat([part.x for part in parts]), torch.cat([part.labels for part in parts])
        return Features(x, labels, self.broken)

    def _rest(self) -> Features:
        rows, labels = zip(*self._unsaved, strict=True)
        self._unsaved = []
        return Features(torch.cat(rows), torch.cat(labels), dict(self.broken))

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.key}.part-{number:04d}.safetensors"


def _features_of_first(features: Features | None) -> Features | None:
    """Those of the first process, on every process. Collective."""
    if current().size == 1:
        return features
    about = from_first(None if features is None else (dict(features.broken), features.seconds, features.cached))
    if about is None:
        return None
    x, labels = (tensor_of_first(None if features is None else getattr(features, n)) for n in ("x", "labels"))
    return Features(x, labels, *about)


def features_key(model_key: str, loader: EvalLoader, *, autocast: bool = False) -> str:
    """The name under which the features of a loader's images are kept; see the top of this file."""
    config = loader.config
    described = {
        "format": FORMAT,
        "version": __version__,
        "model": model_key,
        "source": config.source,
        "split": config.eval_split,
        "content": source_fingerprint(loader.source),
        "pixels": [config.image_hw, config.in_channels, config.eval_resize, config.max_pixels],
        "batch_size": config.eval_batch_size,
        "bfloat16": autocast,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def model_fingerprint(model: VisionTransformer) -> str:
    """SHA-256 of all parameters and of the config, the routing setting included."""
    digest = hashlib.sha256(json.dumps(to_dict(model.config), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def source_fingerprint(source: Source) -> str:
    """SHA-256 of labels, class names, image names, and of the pixels of a few images over the whole source."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).data)
    digest.update(json.dumps([*source.class_names]).encode())
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape"))
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED_IMAGES).astype(int)):
        try:
            pixels = source.decode(int(index))
            digest.update(f"{pixels.shape}".encode())
            digest.update(np.ascontiguousarray(pixels).data)
        except BrokenImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stored:
    """Features in a file, of batches first_batch .. next_batch - 1."""

    features: Features
    first_batch: int
    next_batch: int


def _parts(folder: Path, key: str) -> list[Path]:
    return sorted(folder.glob(f"{key}.part-*.safetensors"))


def _write(path: Path, features: Features, first_batch: int, next_batch: int) -> None:
    notes = {
        "broken": json.dumps(dict(features.broken)),
        "first_batch": str(first_batch),
        "next_batch": str(next_batch),
    }
    with atomic_write(path) as temporary:
        save_file({"x": features.x.contiguous(), "labels": features.labels.contiguous()}, temporary, metadata=notes)


def _read(path: Path) -> _Stored | None:
    """The features in a file; None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as stored:
            notes = stored.metadata() or {}
            features = Features(stored.get_tensor("x"), stored.get_tensor("labels"), json.loads(notes["broken"]))
            return _Stored(features, int(notes["first_batch"]), int(notes["next_batch"]))
    except (SafetensorError, KeyError, ValueError) as error:
        _log.warning("%s is damaged and made anew: %s", path, error)
        return None
