"""Indexing many files once: several at a time, by one process, with a progress line; and where the index is kept."""

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)
_THREADS = 16  # they wait for the disk or the network

Item = TypeVar("Item")
Found = TypeVar("Found")


def each(title: str, items: Sequence[Item], work: Callable[[Item], Found]) -> Iterator[tuple[Item, Found]]:
    """(item, work(item)) in order, several worked on at a time; the first error ends it."""
    _log.info("%s: %d files", title, len(items))
    console = Console(stderr=True)
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with bar:
            yield from zip(items, bar.track(pool.map(work, items), total=len(items)), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def alone(places: Sequence[Path]) -> Iterator[None]:
    """Waits until no other process is here. places: files to lock, the first that can be.

    A lock ends with its process. Where a file system has no locks nobody waits: then work may be done twice.
    """
    with contextlib.ExitStack() as stack:
        for place in places:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
                break
        yield


def kept_below(cache: Path, what: str, suffix: str) -> Path:
    """The file in which an index is kept. what: names all that it was made from."""
    return cache.expanduser() / "index" / (hashlib.sha256(what.encode()).hexdigest()[:20] + suffix)
