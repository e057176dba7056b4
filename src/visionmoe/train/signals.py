"""SIGTERM, Ctrl-C and a lost terminal ask a run to finish its step, save and leave; a later signal ends it at once."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE = 1.0  # seconds in which other signals say the same: launchers and the system repeat theirs


class StopRequest:
    """Whether somebody asked the run to stop. name: of the signal ("SIGTERM"), None before one came."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


def exit_code(name: str | None) -> int:
    """128 + the signal's number, the shell's convention (143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP); else 0."""
    return 128 + signal.Signals[name].value if name else 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it the signals only set the request; a lost terminal does not where it is ignored, as under nohup.

    Outside the main thread it changes nothing (Python's rule).
    """
    request, first = StopRequest(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not request:
            request.name, first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - first > _PATIENCE:  # impatient: it is as if there were no handler
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {n: signal.signal(n, handle) for n in _SIGNALS if not (n is signal.SIGHUP and ignored)}
    try:
        yield request
    finally:
        restore()
