"""Starting the processes of a job in a test, and what they do."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from visionmoe.distributed.world import joined


def run_job(processes: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """work(*arguments) in so many processes that have joined one job; their results, by rank.

    work: a function of a module, since the processes import it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    context = mp.spawn(_entry, (processes, port, folder, work, arguments), nprocs=processes, join=False)
    assert context is not None
    while not context.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _entry(rank: int, processes: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        with joined():
            torch.save(work(*arguments), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
