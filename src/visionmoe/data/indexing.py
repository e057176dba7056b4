"""Indexing many files once: several at a time, with a progress line, and where what was found is kept."""

import hashlib
import logging
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


def kept_below(cache: Path, what: str, suffix: str) -> Path:
    """The file in which an index is kept. what: names all that it was made from."""
    return cache.expanduser() / "index" / (hashlib.sha256(what.encode()).hexdigest()[:20] + suffix)
