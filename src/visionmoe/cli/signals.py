"""Ctrl-C, SIGTERM and a lost terminal end a command with one line and the shell's exit code, never a traceback.

Training asks for these signals itself while it runs, so as to save (`visionmoe.train.signals`).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ends the command. number: which one."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def exit_code(number: int) -> int:
    """The shell's: 130 for Ctrl-C, 143 for SIGTERM, 129 for a lost terminal."""
    return 128 + number


def say(number: int) -> None:
    """The line; a progress line may stand before it."""
    what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):  # of a lost terminal
        os.write(2, f"\nvisionmoe: {what}\n".encode())  # in a handler a stream may be busy


@contextlib.contextmanager
def ended_by_signals(speaks: bool) -> Iterator[Callable[[], None]]:
    """Within it the signals end the process at once, imports and all; yields a function after whose call they raise
    Stopped. A lost terminal that is ignored, as under nohup, stays so; outside the main thread nothing changes.

    speaks: with a line; else in silence and by the system, even while the process waits for others in torch.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def end(number: int, frame: FrameType | None) -> None:
        say(number)
        os._exit(exit_code(number))

    def stop(number: int, frame: FrameType | None) -> None:
        handle(end if speaks else signal.SIG_DFL)  # of somebody who does not want to wait
        raise Stopped(number)

    def handle(how: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        for number in before:
            signal.signal(number, how)

    handle(end if speaks else signal.SIG_DFL)
    try:
        yield lambda: handle(stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
