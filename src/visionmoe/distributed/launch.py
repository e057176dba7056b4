"""`visionmoe COMMAND --nproc N`: starts the command N times on this machine, as torchrun would."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from visionmoe.distributed import LAUNCHED

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 25  # seconds that ranks get to leave by themselves when one of them has ended


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `python -m visionmoe ARGUMENTS` in so many processes; returns the exit code of the first one that failed, or
    128 + the number of a signal that asked this process, or one of those, to end.

    When one ends, the others are told to, and after 25 seconds made to. When this process is killed itself, they get
    SIGTERM (`world.joined`): no process is left behind.
    """
    _silence()
    os.environ[LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="visionmoe",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_PATIENCE,
        signals_to_handle=",".join(s.name for s in _STOPS if signal.getsignal(s) is not signal.SIG_IGN),
    )
    try:
        with _ctrl_c_blocked_in_ranks():
            elastic_launch(config, sys.executable)("-m", "visionmoe", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        if -failure.exitcode in _STOPS:
            return 128 - failure.exitcode
        reason = f"rank {rank} of {processes} was killed ({failure.signal_name()})"
        print(f"visionmoe: {reason}; the others were stopped", file=sys.stderr)
        return 1
    except SignalException as stop:
        return 128 + stop.sigval.value
    return 0


@contextlib.contextmanager
def _ctrl_c_blocked_in_ranks() -> Iterator[None]:
    """Processes that are started within it get Ctrl-C when `visionmoe.__main__` unblocks it: Python's own start would
    answer it with a traceback. Here another thread takes it meanwhile, for the handler in the main one."""
    over = threading.Event()
    threading.Thread(target=over.wait, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        over.set()


def _silence() -> None:
    """The launcher's own account of processes that end: what a user has to know the processes and `launch` print."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
