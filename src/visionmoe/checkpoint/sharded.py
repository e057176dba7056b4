"""Checkpoints of runs on several processes: every process writes its own parts, and reads what it needs.

The folder is that of `store`, RUN/checkpoints/step_XXXXXXXX, which appears under its name when all processes have
written everything; `stored` describes its files. The number of processes that write, and how their tensors are laid
out, say nothing about those that read: a folder of four processes is read by two, by one, and by four others.

The files are plain safetensors with a line of metadata. torch.distributed.checkpoint is not used: its safetensors
reader takes all files of a folder as one set of names, listed in the manifest or not, concludes a tensor's shape from
the parts that it happens to find, and does not tell a folder of one process from one of several groups; its writer
puts a process's whole part together in memory once more before it writes it.
"""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.parts import Groups, Part, own_parts, to_memory
from visionmoe.checkpoint.ranks import Group, by_first, one_line, rank_of, share_out, size_of, together
from visionmoe.checkpoint.store import (
    begin,
    check_file,
    clear_partial,
    list_checkpoints,
    listed_files,
    publish,
    read_manifest,
)
from visionmoe.checkpoint.stored import PARTS_KEY, SUFFIX, StoredTensors
from visionmoe.distributed.world import TIMEOUT, gather
from visionmoe.files import read_json, sync
from visionmoe.model.tensor_file import memory, plan_file

Entries = dict[str, dict[str, Any]]  # a manifest's: file name -> {"sha256", "bytes"}


def save_sharded(
    run_dir: str | os.PathLike,
    step: int,
    tensors: Groups,
    state: Mapping[str, Any],
    keep_last: int | None = None,
    *,
    group: Group = None,
) -> Path:
    """Writes checkpoint `step` and returns its folder; afterwards only the `keep_last` newest are kept (None: all), and
    this one in any case. Collective: every process of `group` (None: of the job) calls it with its own tensors; plain
    ones are the same everywhere, of DTensors each has a part.

    At no moment is there a folder of that name that is not complete. An older one of the same step is replaced; until
    the new one has its name, `list_checkpoints` finds the old one.

    state: JSON values; those of the first process are written. The run's folder is one that all processes see. An
    error on any process is raised on all, and leaves nothing behind.
    """
    temporary, parts = _begin(run_dir, tensors, keep_last, group)
    return _finish(Path(run_dir), step, temporary, parts, dict(state), keep_last, group)


class AsyncSaver:
    """Saves as `save_sharded` does, while the run goes on.

    `save` returns when the tensors are copied to the CPU's memory; a thread writes the copy. Before the next save, and
    by `wait` (which the end of a run has to call), the one under way is waited for, and what went wrong in it is
    raised. Making one is collective: the threads speak to each other through a group (gloo) of their own.
    """

    def __init__(self) -> None:
        self._group: Group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._step = 0
        self._written: Path | None = None
        self._error: Exception | None = None

    def save(
        self,
        run_dir: str | os.PathLike,
        step: int,
        tensors: Groups,
        state: Mapping[str, Any],
        keep_last: int | None = None,
    ) -> None:
        """Collective; see `save_sharded`."""
        self.wait()
        temporary, parts = _begin(run_dir, tensors, keep_last, self._group)
        copies = {name: dict(zip(own, to_memory(own.values()), strict=True)) for name, own in parts.items()}
        values = json.loads(json.dumps(dict(state)))
        arguments = (Path(run_dir), step, temporary, copies, values, keep_last, self._group)
        self._step = step
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> Path | None:
        """Waits for the save under way and returns the folder of the latest; None before the first.

        Raises its error once: OSError or ValueError, RuntimeError for a process that is gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            kind = (
                OSError if isinstance(error, OSError) else ValueError if isinstance(error, ValueError) else RuntimeError
            )
            raise kind(f"checkpoint of step {self._step} is not written: {one_line(error)}") from error
        return self._written

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, *arguments: Any) -> None:
        try:
            self._written = _finish(*arguments)
        except Exception as error:
            self._error = error


def load_sharded(path: str | os.PathLike, targets: Groups) -> dict[str, Any]:
    """Fills tensors and DTensors of any layout from a checkpoint's folder and returns its state ("step", ...).

    targets: by group and name; groups may be left out, names may not. Every process reads the bytes of its own parts;
    it is not collective. Sizes of files are checked; `latest_good_together` or `verify_together` checks their contents.
    CheckpointError (a ValueError) names what is missing or does not fit.
    """
    path = Path(path)
    open_checkpoint(path).fill(targets)
    return read_json(path / "state.json")


def open_checkpoint(path: str | os.PathLike) -> StoredTensors:
    """The shapes and types of a checkpoint's tensors, and access to parts of them."""
    path = Path(path)
    return StoredTensors.open(path, listed_files(path))


def verify_together(path: str | os.PathLike, *, group: Group = None) -> None:
    """As `store.verify`, but every process hashes its share of the bytes, and all raise the same error. Collective."""
    fault = _fault(Path(path), group)
    if fault is not None:
        raise CheckpointError(fault)


def latest_good_together(run_dir: str | os.PathLike, *, group: Group = None) -> Path | None:
    """The newest checkpoint whose files are all as they were written, None where a run has none yet; the same on all
    processes, which share the hashing. Collective.

    Damaged ones are skipped; the first process warns and names the file. CheckpointError when all are damaged.
    """
    damaged: list[str] = []
    for path in by_first(lambda: [folder for _, folder in reversed(list_checkpoints(run_dir))], group):
        fault = _fault(path, group)
        if fault is not None:
            damaged.append(fault)
            continue
        for message in damaged if rank_of(group) == 0 else ():
            warnings.warn(f"{message}; going on from {path.name}", stacklevel=2)
        return path
    if damaged:
        raise CheckpointError(f"no good checkpoint in {Path(run_dir) / 'checkpoints'}: {damaged[0]}")
    return None


def _begin(
    run_dir: str | os.PathLike, tensors: Groups, keep_last: int | None, group: Group
) -> tuple[Path, dict[str, dict[str, Part]]]:
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be >= 1, got {keep_last}")
    parts = own_parts(tensors, group)
    return by_first(lambda: begin(run_dir), group), parts


def _finish(
    run_dir: Path,
    step: int,
    temporary: Path,
    parts: Mapping[str, Mapping[str, Part]],
    state: dict[str, Any],
    keep_last: int | None,
    group: Group,
) -> Path:
    try:
        entries: Entries = {}
        for own in together(lambda: _write_own(temporary, parts, group), group):
            entries |= own
        return by_first(lambda: publish(run_dir, step, temporary, entries, state, keep_last), group)
    finally:
        if rank_of(group) == 0:
            clear_partial(temporary.parent)


def _write_own(temporary: Path, parts: Mapping[str, Mapping[str, Part]], group: Group) -> Entries:
    """Writes this process's file of every group; the first process writes one even where it has nothing."""
    rank, size = rank_of(group), size_of(group)
    if not temporary.is_dir():
        raise FileNotFoundError(f"{temporary.parent} must be a folder that all processes share")
    entries = {}
    for name, own in parts.items():
        if own or rank == 0:
            path = temporary / (f"{name}{SUFFIX}" if size == 1 else f"{name}-{rank:05d}-of-{size:05d}{SUFFIX}")
            entries[path.name] = _write_file(path, own, whole=size == 1)
    sync(temporary)
    return entries


def _write_file(path: Path, parts: Mapping[str, Part], whole: bool) -> dict[str, Any]:
    """Writes, hashes what is written, and waits for the disk."""
    places = {name: [part.shape, [start for start, _ in part.box]] for name, part in parts.items()}
    metadata = None if whole else {PARTS_KEY: json.dumps(places)}
    start, order = plan_file({n: (part.values.shape, part.values.dtype) for n, part in parts.items()}, metadata)
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for data in _chunks(start, (parts[name].values for name in order)):
            digest.update(data)
            stream.write(data)
        size = stream.tell()
    sync(path)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _chunks(start: bytes, values: Any) -> Any:
    yield start
    for tensor in values:
        yield memory(tensor)


def _fault(path: Path, group: Group) -> str | None:
    """What is wrong with a checkpoint, the same text on all processes; None where it is good."""
    manifest = by_first(lambda: _text_or(lambda: read_manifest(path)["files"]), group)
    if isinstance(manifest, str):
        return manifest
    files = sorted(manifest.items())
    everyone = list(range(size_of(group)))
    chosen = share_out([entry["bytes"] for _, entry in files], [everyone] * len(files), size_of(group))
    own = [
        text if isinstance(text := _text_or(lambda: check_file(path / name, entry)), str) else None  # noqa: B023
        for (name, entry), rank in zip(files, chosen, strict=True)
        if rank == rank_of(group)
    ]
    faults = [fault for theirs in gather(own, group) for fault in theirs if fault is not None]
    return min(faults) if faults else None


def _text_or(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (ValueError, OSError) as error:
        return one_line(error)
