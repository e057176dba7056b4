"""Time of forward passes: several ways to run, one after the other in rounds, and the median of each.

Taking turns makes what slows the machine for a while slow all of them, so that they stay comparable.
"""

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.distributed.world import current
from visionmoe.evaluate.adaptive import LayerSettings, apply_routing, restored_routing
from visionmoe.evaluate.forward import autocast_context, evaluation_mode, prepare
from visionmoe.model.routing import logger
from visionmoe.model.vit import VisionTransformer

ROUNDS, SECONDS = 7, 90.0


@dataclass(frozen=True)
class Timing:
    """each: the seconds of every counted call, by what was timed and by round; one uncounted call ran before."""

    each: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Median of one call, for each that was timed."""
        return tuple(statistics.median(own) for own in self.each)

    @property
    def rounds(self) -> int:
        """How often each ran."""
        return len(self.each[0])


def take_turns(
    runs: Sequence[Callable[[], None]],
    *,
    rounds: int = ROUNDS,
    max_seconds: float = SECONDS,
    on_run: Callable[[], None] | None = None,
) -> Timing:
    """Times every run once a round, after one uncounted round.

    Stops before a round that would pass `max_seconds`, but not before the first: large models get fewer rounds.
    """
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for number in range(rounds + 1):
        began = time.perf_counter()
        for run, own in zip(runs, times, strict=True):
            before = time.perf_counter()
            run()
            own.append(time.perf_counter() - before)
            if on_run is not None:
                on_run()
        now = time.perf_counter()
        if number and now - start + (now - began) > max_seconds:
            break
    return Timing(tuple(tuple(own[1:]) for own in times))


def forward_call(model: nn.Module, images: Tensor, *, autocast: bool = False) -> Callable[[], None]:
    """A call that runs the model on the images (moved to its device now) and waits until that is done."""
    images = prepare(model, images)

    def call() -> None:
        with autocast_context(model, autocast):
            model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    return call


def time_settings(
    model: VisionTransformer,
    images: Tensor,
    settings: Sequence[LayerSettings],
    *,
    others: Sequence[tuple[nn.Module, Tensor]] = (),
    autocast: bool = False,
    max_seconds: float = SECONDS,
    on_run: Callable[[], None] | None = None,
) -> Timing:
    """Times the model at every setting, and other models on their own images, in turns. Routing is restored."""
    call = forward_call(model, images, autocast=autocast)

    def at(setting: LayerSettings) -> Callable[[], None]:
        def run() -> None:
            apply_routing(model, setting)
            call()

        return run

    runs = [at(setting) for setting in settings]
    runs += [forward_call(other, own, autocast=autocast) for other, own in others]
    with restored_routing(model), evaluation_mode(model, *(other for other, _ in others)):
        return take_turns(runs, max_seconds=max_seconds, on_run=on_run)


def affordable_batch(
    model: VisionTransformer,
    images: Tensor,
    runs: int,
    *,
    autocast: bool = False,
    max_seconds: float = SECONDS,
) -> int:
    """How many of the images a call can have for the uncounted and one counted round of `runs` calls in max_seconds.

    By the time of calls at the present setting, of one image first: large models on slow machines get fewer images.
    """

    def fits(size: int, timed: int) -> bool:
        return 2 * runs * seconds[timed] * size / timed <= max_seconds

    seconds: dict[int, float] = {}
    size = 1
    with evaluation_mode(model), _without_words():
        while True:
            call = forward_call(model, images[:size], autocast=autocast)
            began = time.perf_counter()
            call()
            seconds[size] = time.perf_counter() - began
            if fits(len(images), size):
                return len(images)
            if not fits(2 * size, size):
                return size
            size = min(2 * size, len(images))


@contextlib.contextmanager
def _without_words() -> Iterator[None]:
    """No word about the rounding of capacities in batches that are only tried."""
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or device.type


def how_measured(timing: Timing, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What a reader of the results needs to know about the times."""
    processes = current().size
    together = "; all processes at the same time, their speeds added up" if processes > 1 else ""
    return {
        "method": "forward passes of one batch held in memory (no decoding); all settings and models in turns, "
        f"one uncounted round before; median of the rounds{together}",
        "processes": processes,
        **{name: value for name, value in asdict(timing).items() if name == "rounds"},
        "batch_size": batch_size,
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
