"""Results of evaluations kept on disk, so that an interrupted comparison of settings goes on where it was.

points.jsonl holds one JSON object a line, {"key": ..., "value": ...}. The key names everything that the value depends
on: fingerprints of the weights and of the images, the batch size, the precision, and every layer's routing. So one
folder may hold results of several models or images and none is ever taken for another's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmoe.config import to_dict
from visionmoe.data.loader import EvalLoader
from visionmoe.evaluate.adaptive import Evaluate, layer_settings
from visionmoe.evaluate.timing import Routing, how_measured, time_settings
from visionmoe.model.vit import VisionTransformer

NAME = "points.jsonl"


class ResultStore:
    """Values by key in FOLDER/points.jsonl. A last line that was cut by a crash is left out."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / NAME
        self._values: dict[str, Any] = {}
        self._ends_whole = True
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._ends_whole = text.endswith("\n") or not text
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                    self._values[_text(record["key"])] = record["value"]
                except (ValueError, TypeError, KeyError):
                    continue  # it is worked out again

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Mapping[str, Any]) -> Any:
        """The value, or None."""
        return self._values.get(_text(key))

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Appends; on the disk when this returns."""
        line = json.dumps({"key": key, "value": value}, allow_nan=False)
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
        key = {**self.context, "routing": _plain(layer_settings(model))}
        found = self.store.get(key)
        if found is not None:
            self.reused += 1
            if self.on_reuse is not None:
                self.on_reuse()
            return found
        result = self.evaluate(model)
        self.store.put(key, result)
        self.evaluated += 1
        return result


def stored_timing(
    store: ResultStore,
    context: Mapping[str, Any],
    model: VisionTransformer,
    images: Tensor,
    settings: Sequence[Routing],
    *,
    others: Sequence[tuple[VisionTransformer, Tensor]] = (),
    autocast: bool = False,
    on_run: Callable[[], None] | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """Seconds per call of every setting, then of the other models (see `time_settings`), and how they were measured.

    Times are only comparable when they were measured in turns, so they are stored and taken together or not at all.
    """
    key = {
        **context,
        "timed": [_plain(setting) for setting in settings],
        "others": [[model_fingerprint(other), list(own.shape)] for other, own in others],
        "threads": torch.get_num_threads(),
    }
    found = store.get(key)
    if found is None:
        timing = time_settings(model, images, settings, others=others, autocast=autocast, on_run=on_run)
        how = how_measured(timing, len(images), next(model.parameters()).device)
        found = {"seconds": list(timing.seconds), "how": how}
        store.put(key, found)
    return found["seconds"], found["how"]


def context_of(model: VisionTransformer, loader: EvalLoader, first: Tensor, *, autocast: bool) -> dict[str, Any]:
    """The part of a key that is the same for all settings. first: the images of the loader's first batch."""
    parameter = next(model.parameters())
    return {
        "model": model_fingerprint(model),
        "data": data_fingerprint(loader, first),
        "batch_size": loader.config.eval_batch_size,
        "precision": "bfloat16 autocast" if autocast else str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def model_fingerprint(model: VisionTransformer) -> str:
    """A digest of the config but for the routing that can be set, and of all weights."""
    config = to_dict(model.config)
    for name in ("num_selected_experts", "capacity_factor", "batch_priority", "layer_routing"):
        del config["moe"][name]
    digest = hashlib.sha256(_text(config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def data_fingerprint(loader: EvalLoader, first: Tensor) -> str:
    """A digest of what is read, of all labels, and of the first batch's pixels (B, C, H, W) as the model sees them."""
    config, source = loader.config, loader.source
    read = [config.source, config.eval_split, config.image_hw, config.eval_resize, source.class_names]
    digest = hashlib.sha256(_text(read).encode())
    digest.update(source.labels.tobytes())
    digest.update(_bytes(first))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor, copied only where it is not on the CPU or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _plain(routing: Routing) -> dict[str, Any]:
    return {str(layer): to_dict(setting) for layer, setting in routing.items()}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
