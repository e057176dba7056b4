"""What a run writes down: log.jsonl, one JSON object a line, and TensorBoard's files.

A line has "kind": "train" (means over the steps since the last one, and "router": block -> health), "eval"
("name", "metrics") or "event" ("message"), always with the "step" that was just finished, 1, 2, ...
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from visionmoe.files import atomic_write, finite

_log = logging.getLogger(__name__)


class Means:
    """Means of tensors over steps, kept on their device until asked for (so that no step waits for it)."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, mean: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """The means, on the CPU; starts anew. mean: over all processes of a job, of which each has its own values."""
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        if means:
            flat = mean(torch.cat([value.reshape(-1).float() for value in means.values()])).cpu()
            parts = flat.split([value.numel() for value in means.values()])
            means = {name: part.view(means[name].shape) for name, part in zip(means, parts, strict=True)}
        self._sums, self._counts = {}, {}
        return means


def router_health(metrics: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Per block ("blocks.3"): expert_load (list, share of requests per expert), dead_experts (how many got none),
    dropped, entropy (nats), and the losses, from a model's metrics by "blocks.3.name"."""
    health: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        block, _, key = name.rpartition(".")
        layer = health.setdefault(block, {})
        if key == "expert_load":
            layer[key] = value.tolist()
            layer["dead_experts"] = int((value == 0).sum())
        else:
            layer[key] = value.float().mean().item()
    return health


class RunLog:
    """Appends to OUT/log.jsonl and, where tensorboard is installed and wanted, to OUT/tensorboard.

    start_step: a resumed run's first step; what an earlier life of the run logged after it is removed.
    silent: writes nothing, for all processes of a job but the first.
    """

    def __init__(
        self, out: str | os.PathLike, start_step: int = 0, tensorboard: bool = True, *, silent: bool = False
    ) -> None:
        self.path = Path(out) / "log.jsonl"
        self._stream: TextIO | None = None
        self._board = None
        if silent:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        truncate_log(self.path, start_step)
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._board = _summary_writer(Path(out) / "tensorboard", start_step) if tensorboard else None

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Writes one line and returns it. Numbers that are not finite become null."""
        record = {"kind": kind, "step": step, **finite(values)}
        if self._stream is not None:
            self._stream.write(json.dumps(record, allow_nan=False) + "\n")
            self._stream.flush()
        if self._board is not None:
            for name, number in _scalars(kind, record):
                self._board.add_scalar(name, number, step)
        return record

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; one that a kill cut in the middle is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


@dataclass
class History:
    """What a run has reported so far: the last "train" record, metrics and step of every evaluator's last evaluation,
    and the best value of each evaluator's "top1" (metric -> [value, step])."""

    train: dict[str, Any] | None = None
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    eval_steps: dict[str, int] = field(default_factory=dict)
    best: dict[str, list[float]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a line of the log into account; lines come in the order in which they were written."""
        if record["kind"] == "train":
            self.train = dict(record)
        elif record["kind"] == "eval":
            name, metrics, step = record["name"], record["metrics"], record["step"]
            self.evals[name], self.eval_steps[name] = metrics, step
            key, top1 = f"{name}/top1", metrics.get("top1")
            if top1 is not None and (key not in self.best or top1 > self.best[key][0]):
                self.best[key] = [float(top1), step]


def truncate_log(path: Path, step: int) -> None:
    """Keeps the lines up to `step`."""
    if path.exists():
        kept = [record for record in read_log(path) if record["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _summary_writer(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("tensorboard is not installed: the log is log.jsonl alone (pip install 'visionmoe[tensorboard]')")
        return None
    return SummaryWriter(str(folder), purge_step=start_step + 1)


def _scalars(kind: str, record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Numbers of a line by the names that TensorBoard shows, nested tables joined by "/"."""
    prefix = f"{kind}/{record['name']}" if kind == "eval" else kind
    table = record.get("metrics", {}) if kind == "eval" else record
    return [(f"{prefix}/{name}", number) for name, number in _leaves(table) if name not in ("step", "kind")]


def _leaves(value: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [(name, value)]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [leaf for key, inner in items for leaf in _leaves(inner, f"{name}/{key}" if name else str(key))]
