"""Checkpoints of runs on several processes: every process writes its own parts, and reads what it needs.

The folder is that of `store`, RUN/checkpoints/step_XXXXXXXX, which appears under its name when all processes have
written everything; `stored` describes its files. The number of processes that write, and how their tensors are laid
out, say nothing about those that read: a folder of four processes is read by two, by one, and by four others.

The work is done by torch.distributed.checkpoint (`engine`). Its own storages are not used: they describe a checkpoint
by a pickle, or take all safetensors files of a folder as one set of names, listed in the manifest or not.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist

from visionmoe.checkpoint import engine
from visionmoe.checkpoint.engine import Groups, Part
from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.store import (
    FOLDER,
    begin,
    check_file,
    clear_partial,
    list_checkpoints,
    listed_files,
    publish,
    read_manifest,
    step_path,
)
from visionmoe.checkpoint.stored import PARTS_KEY, SUFFIX, StoredTensors
from visionmoe.distributed.world import TIMEOUT, Group, gather, rank_of, size_of
from visionmoe.files import one_line, read_json, sync
from visionmoe.model.tensor_file import memory, plan_file

Entries = dict[str, dict[str, Any]]  # a manifest's: file name -> {"sha256", "bytes"}
_log = logging.getLogger(__name__)


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
    writer = _RunWriter(run_dir, step, tensors, state, keep_last)
    try:
        engine.save(tensors, writer, group)
    finally:
        writer.clear(group)
    return writer.path


class AsyncSaver:
    """Saves as `save_sharded` does, while the run goes on.

    `save` returns when the tensors are copied to the CPU's memory; a thread writes the copy. Before the next save, and
    by `wait` (which the end of a run has to call), the one under way is waited for, and what went wrong in it is
    raised. Making one is collective: the threads speak to each other through a group (gloo) of their own.
    """

    def __init__(self) -> None:
        self._group: Group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # type: ignore[assignment]
        self._last = engine.LastPlan()
        self._under_way: tuple[Future, _RunWriter] | None = None
        self._written: Path | None = None

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
        writer = _RunWriter(run_dir, step, tensors, json.loads(json.dumps(dict(state))), keep_last)
        self._under_way = engine.save_in_thread(tensors, writer, self._group, self._last), writer

    def wait(self) -> Path | None:
        """Waits for the save under way and returns the folder of the latest; None before the first.

        Raises its error once: OSError or ValueError, RuntimeError for a process that is gone.
        """
        if self._under_way is None:
            return self._written
        future, writer = self._under_way
        error, self._under_way = future.exception(), None
        if error is not None:
            writer.clear(self._group)
            fault = engine.cause(error, self._group)
            text = f"checkpoint of step {writer.step} is not written: {one_line(fault)}"
            raise engine.same_kind(fault, text) from error
        self._written = writer.path
        return self._written


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

    Damaged ones are skipped; the first process's log names the file. CheckpointError when all are damaged.
    """
    damaged: list[str] = []
    for path in gather([folder for _, folder in reversed(list_checkpoints(run_dir))], group)[0]:
        fault = _fault(path, group)
        if fault is not None:
            damaged.append(fault)
            continue
        for message in damaged if rank_of(group) == 0 else ():
            _log.warning("%s; going on from %s", message, path.name)
        return path
    if damaged:
        raise CheckpointError(f"no good checkpoint in {Path(run_dir) / FOLDER}: {damaged[0]}")
    return None


class _RunWriter(engine.Writer):
    """A checkpoint's folder. Every process writes one file of each group of which it has parts; the first one where it
    has none, too, so that empty groups are there."""

    def __init__(
        self,
        run_dir: str | os.PathLike,
        step: int,
        groups: Collection[str],
        state: Mapping[str, Any],
        keep_last: int | None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self.step, self.path = step, step_path(run_dir, step)
        self._run_dir, self._groups, self._state, self._keep_last = Path(run_dir), list(groups), state, keep_last

    def begin(self) -> Path:
        self._folder = begin(self._run_dir)
        return self._folder

    def write(self, path: Path, rank: int, size: int, parts: list[Part]) -> Entries:
        if not path.is_dir():
            raise FileNotFoundError(f"{path.parent} must be a folder that all processes share")
        suffix = SUFFIX if size == 1 else f"-{rank:05d}-of-{size:05d}{SUFFIX}"
        entries = {}
        for group in self._groups:
            own = {p.name.removeprefix(f"{group}."): p for p in parts if p.name.startswith(f"{group}.")}
            if own or rank == 0:
                entries[f"{group}{suffix}"] = _write_file(path / f"{group}{suffix}", own, whole=size == 1)
        sync(path)
        return entries

    def end(self, results: list[Entries]) -> None:
        entries = {name: entry for own in results for name, entry in own.items()}
        publish(self._run_dir, self.step, self._folder, entries, self._state, self._keep_last)

    def clear(self, group: Group) -> None:
        """Removes what was begun; after the end of it, or when it has failed."""
        if rank_of(group) == 0:
            clear_partial(self.path.parent)


def _write_file(path: Path, parts: Mapping[str, Part], whole: bool) -> dict[str, Any]:
    """Writes, hashes what is written, and waits for the disk."""
    places = {name: [part.shape, [start for start, _ in part.box]] for name, part in parts.items()}
    metadata = None if whole else {PARTS_KEY: json.dumps(places)}
    start, order = plan_file({n: ([b - a for a, b in part.box], part.dtype) for n, part in parts.items()}, metadata)
    digest = hashlib.sha256(start)
    with open(path, "wb") as stream:
        stream.write(start)
        for name in order:
            data = memory(parts[name].values())
            digest.update(data)
            stream.write(data)
        size = stream.tell()
    sync(path)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _fault(path: Path, group: Group) -> str | None:
    """What is wrong with a checkpoint, the same text on all processes; None where it is good."""
    fault = None
    try:
        files = sorted(read_manifest(path)["files"].items(), key=lambda file: -file[1]["bytes"])
        for name, entry in files[rank_of(group) :: size_of(group)]:
            check_file(path / name, entry)
    except (ValueError, OSError) as error:
        fault = one_line(error)
    return min((theirs for theirs in gather(fault, group) if theirs is not None), default=None)
