"""Results of evaluations kept on disk, so that an interrupted comparison of settings goes on where it was.

points.jsonl holds one JSON object a line, {"key": ..., "value": ..., "check": CRC of both}. The key names everything
that the value depends on: fingerprints of the weights and of the images, the batch size, the precision, the version of
this package, and every layer's routing. So one folder may hold results of several models or images and none is ever
taken for another's.
"""

import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmoe import __version__
from visionmoe.config import to_dict
from visionmoe.data.loader import EvalLoader
from visionmoe.distributed.world import current, from_first, gather
from visionmoe.evaluate.adaptive import Evaluate, LayerSettings, layer_settings
from visionmoe.evaluate.fingerprint import data_fingerprint, model_fingerprint
from visionmoe.evaluate.timing import affordable_batch, device_name, how_measured, time_settings
from visionmoe.files import finite
from visionmoe.model.vit import VisionTransformer

NAME = "points.jsonl"
FORMAT = 2  # of the keys and values
_log = logging.getLogger(__name__)


class ResultStore:
    """Values by key in FOLDER/points.jsonl. Lines that were cut or damaged are left out, with a warning.

    Of several processes the first one reads and writes the file, and all get what it holds.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / NAME
        self._values: dict[str, Any] = {}
        self._ends_whole = True
        if current().is_first and self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._ends_whole = text.endswith("\n") or not text
            damaged = 0
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                    if record["check"] != _check(record["key"], record["value"]):
                        raise ValueError("check")
                    self._values[_text(record["key"])] = record["value"]
                except (ValueError, TypeError, KeyError):
                    damaged += 1
            if damaged:
                _log.warning(
                    "%s: %d lines are damaged or of another version; what they held is worked out again",
                    self.path,
                    damaged,
                )

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Mapping[str, Any]) -> Any:
        """The value, or None. Collective."""
        return from_first(self._values.get(_text(key)))

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Appends; on the disk when this returns. Numbers that are not finite become null."""
        if not current().is_first:
            return
        value = finite(value)
        line = json.dumps({"key": key, "value": value, "check": _check(key, value)}, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(("" if self._ends_whole else "\n") + line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._ends_whole = True
        self._values[_text(key)] = json.loads(line)["value"]

    def count(self, part: Mapping[str, Any]) -> int:
        """How many keys hold these entries."""
        wanted = json.loads(_text(part)).items()
        return sum(wanted <= json.loads(key).items() for key in self._values) if part else len(self)


class StoredEvaluator:
    """An evaluator of models that asks the store first. Call with a model, as `ClassificationEvaluator`.

    A loss that is not finite is said in a warning with its setting, and is NaN in the result.

    context: what the result depends on besides the model's routing; see `context_of`.
    on_reuse: called once for every result that was there already.
    evaluated, reused: how many there were of each.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        store: ResultStore,
        context: Mapping[str, Any],
        on_reuse: Callable[[], None] | None = None,
    ) -> None:
        self.evaluate, self.store, self.context, self.on_reuse = evaluate, store, dict(context), on_reuse
        self.evaluated = self.reused = 0

    def __call__(self, model: VisionTransformer) -> dict[str, Any]:
        routing = plain(layer_settings(model))
        key = {**self.context, "routing": routing}
        found = self.store.get(key)
        if found is not None:
            self.reused += 1
            if self.on_reuse is not None:
                self.on_reuse()
        else:
            self.store.put(key, self.evaluate(model))
            self.evaluated += 1
            found = self.store.get(key)
        if None in found.values():
            _log.warning("%s not finite at %s", ", ".join(n for n, v in found.items() if v is None), routing)
        return {name: math.nan if value is None else value for name, value in found.items()}


def stored_timing(
    store: ResultStore,
    context: Mapping[str, Any],
    model: VisionTransformer,
    images: Tensor,
    settings: Sequence[LayerSettings],
    *,
    others: Sequence[tuple[VisionTransformer, Tensor]] = (),
    autocast: bool = False,
    on_run: Callable[[], None] | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """As `timing_of`, but asks the store first.

    Times are only comparable when they were measured in turns, so they are stored and taken together or not at all.
    """
    processes = current().size
    key = {
        **context,
        **({"processes": processes} if processes > 1 else {}),
        "timed": [plain(setting) for setting in settings],
        "others": [[model_fingerprint(other), list(own.shape)] for other, own in others],
        "device_name": device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    found = store.get(key)
    if found is None:
        seconds, how = timing_of(model, images, settings, others=others, autocast=autocast, on_run=on_run)
        found = {"seconds": seconds, "how": how}
        store.put(key, found)
    return found["seconds"], found["how"]


def timing_of(
    model: VisionTransformer,
    images: Tensor,
    settings: Sequence[LayerSettings],
    *,
    others: Sequence[tuple[VisionTransformer, Tensor]] = (),
    autocast: bool = False,
    on_run: Callable[[], None] | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """Seconds per call of every setting, then of the other models (see `time_settings`), and how they were measured.

    The calls are of how["batch_size"] images: of all those given, or as many as the time allows.
    Several processes measure at the same time, each calls of so many images, and their speeds are added: the seconds
    are those in which all together do so many. Collective.
    """
    size = min(gather(affordable_batch(model, images, len(settings) + len(others), autocast=autocast)))
    others = [(other, own[:size]) for other, own in others]
    timing = time_settings(model, images[:size], settings, others=others, autocast=autocast, on_run=on_run)
    seconds = [1 / sum(1 / own for own in of_all) for of_all in zip(*gather(timing.seconds), strict=True)]
    return seconds, how_measured(timing, size, next(model.parameters()).device)


def context_of(model: VisionTransformer, loader: EvalLoader, *, autocast: bool) -> dict[str, Any]:
    """The part of a key that is the same for all settings."""
    parameter = next(model.parameters())
    return {
        "format": FORMAT,
        "version": __version__,
        "model": model_fingerprint(model),
        "data": data_fingerprint(loader),
        "batch_size": loader.config.eval_batch_size,
        "precision": "bfloat16 autocast" if autocast else str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def plain(routing: LayerSettings) -> dict[str, Any]:
    """Settings as JSON has them."""
    return {str(layer): to_dict(setting) for layer, setting in routing.items()}


def _check(key: Any, value: Any) -> int:
    return zlib.crc32(_text([key, value]).encode())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
