"""The line that shows how a run goes: a live one on a terminal, else a line for every log record."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_SHOWN_LAYERS = 3  # of a deep model the line shows those that drop most; the log has them all


class ProgressLine:
    """Used as a context; `show` is called after a log record, `advance` after every step."""

    def __init__(self, total: int, done: int = 0, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._plain = enabled and not console.is_terminal
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            columns = (
                TextColumn("train"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[t]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("train", total=total, completed=done, t="")
        self._total = total

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def show(self, record: Mapping[str, Any]) -> None:
        if self._bar is not None and record["kind"] == "train":
            self._bar.update(self._task, t=describe(record))
        elif self._bar is not None:
            self._bar.console.print(f"step {record['step']}: {describe(record)}", highlight=False, markup=False)
        elif self._plain:
            print(f"step {record['step']}/{self._total}: {describe(record)}", file=sys.stderr, flush=True)


def describe(record: Mapping[str, Any]) -> str:
    """One line for a log record."""
    if record["kind"] == "event":
        return record["message"]
    if record["kind"] == "eval":
        shown = {k: v for k, v in record["metrics"].items() if isinstance(v, (int, float)) and k != "num_images"}
        return f"{record['name']}: " + " ".join(f"{name} {value:.4g}" for name, value in shown.items())
    text = (
        f"loss {_number(record['main_loss'])} aux {_number(record['auxiliary_loss'])} "
        f"acc {_number(record['accuracy'])} {record['images_per_second']:.0f} img/s "
        f"ETA {duration(record['eta_seconds'])}"
    )
    layers = {name: layer for name, layer in record["router"].items() if "expert_load" in layer}
    worst = sorted(layers, key=lambda name: layers[name]["dropped"], reverse=True)[:_SHOWN_LAYERS]
    text += "".join(f" | {name} {_health(layers[name])}" for name in layers if name in worst)
    return text + (f" skipped steps {record['skipped_steps']}" if record["skipped_steps"] else "")


def _health(layer: Mapping[str, Any]) -> str:
    """The router of one layer: lowest and highest share of an expert, dropped share, entropy, dead experts."""
    load, dead = layer["expert_load"], layer["dead_experts"]
    text = f"load {min(load):.0%}-{max(load):.0%} dropped {layer['dropped']:.0%} entropy {layer['entropy']:.2f}"
    return text + (f" DEAD EXPERTS {dead}" if dead else "")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
