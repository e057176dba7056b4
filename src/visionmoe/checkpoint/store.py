"""The folders of our own checkpoints: written beside, synced, renamed, and verified byte for byte when they are read.

    RUN/checkpoints/step_00000123/
        NAME.safetensors   tensors: the model's, the optimizer's, their average's
        state.json         everything else: the step, counters, the optimizer's scalars
        manifest.json      SHA-256 and size of every other file, and a SHA-256 of itself

A folder of that name is complete: it was renamed into place after everything in it had reached the disk. A file that
changed since (one flipped bit) is found by its checksum and named. No pickle anywhere.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmoe.checkpoint.errors import CheckpointError, MissingFileError
from visionmoe.checkpoint.stored import StoredTensors
from visionmoe.files import read_json, sha256, sync, write_json

FOLDER = "checkpoints"
MANIFEST_NAME = "manifest.json"
_OLD = "old-"  # prefix of one that is being replaced; it sorts before its successor
_STEP_NAME = re.compile(rf"(?:{_OLD})?step_(\d{{8,}})$")
_NOT_YET = ".partial-"  # prefix of folders that are being written


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on: groups of tensors by name (as "model", "optimizer", "ema"), and plain JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def step_path(run_dir: str | os.PathLike, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return Path(run_dir) / FOLDER / f"step_{step:08d}"


def begin(run_dir: str | os.PathLike) -> Path:
    """A new folder in which the files of a checkpoint can be written before it has its name."""
    parent = Path(run_dir) / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    clear_partial(parent)
    temporary = parent / f"{_NOT_YET}{uuid.uuid4().hex}"
    temporary.mkdir()
    return temporary


def publish(
    run_dir: str | os.PathLike,
    step: int,
    temporary: Path,
    entries: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
    keep_last: int | None,
) -> Path:
    """Gives the folder `temporary`, whose files of tensors (entries: the manifest's, by name) have reached the disk,
    its state, its manifest and its name, and removes older checkpoints; see `sharded.save_sharded`."""
    write_json(temporary / "state.json", {"step": step, **state})
    manifest = {"step": step, "files": {**entries, "state.json": _entry(temporary / "state.json")}}
    write_json(temporary / MANIFEST_NAME, {**manifest, "sha256": _own_digest(manifest)})
    final = step_path(run_dir, step)
    old = temporary.parent / f"{_OLD}{final.name}"
    if final.exists():
        if old.exists():
            _remove(old)
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    if old.exists():
        _remove(old)
    if keep_last is not None:
        for _, path in list_checkpoints(run_dir)[:-keep_last]:
            if path != final:
                _remove(path)
    return final


def list_checkpoints(run_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints of a run, oldest first, good or damaged."""
    parent = Path(run_dir) / FOLDER
    names = parent.iterdir() if parent.is_dir() else ()
    found = [(int(m[1]), path) for path in names if (m := _STEP_NAME.fullmatch(path.name))]
    return sorted(found)


def verify(path: str | os.PathLike) -> list[Path]:
    """Compares every file of a checkpoint with its manifest; returns the files, the manifest left out.

    CheckpointError (a ValueError) names the first file that is missing or not as it was written.
    """
    path = Path(path)
    files = read_manifest(path)["files"]
    for name, entry in files.items():
        check_file(path / name, entry)
    return [path / name for name in files]


def check_file(path: Path, entry: Mapping[str, Any], contents: bool = True) -> None:
    """Compares a file with its entry in the manifest (contents=False: only its size). CheckpointError names it."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes, expected {entry['bytes']}")
    if contents and sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one that was written")


def listed_files(path: Path) -> list[Path]:
    """The files of a checkpoint, the manifest left out; all are there, and as long as they were written."""
    files = read_manifest(path)["files"]
    for name, entry in files.items():
        check_file(path / name, entry, contents=False)
    return [path / name for name in files]


def load_run_state(path: str | os.PathLike, device: str | torch.device = "cpu") -> RunState:
    """Verifies and reads one checkpoint folder, by one process or several written; tensors are whole.

    CheckpointError (a ValueError) names a damaged file.
    """
    path = Path(path)
    stored = StoredTensors.open(path, verify(path))
    state = read_json(path / "state.json")
    tensors = {
        group: {
            name: torch.empty(whole.size, dtype=whole.properties.dtype, device=device) for name, whole in own.items()
        }
        for group, own in stored.groups.items()
    }
    stored.fill(tensors)
    return RunState(step=state.pop("step"), tensors=tensors, state=state)


def remove_newer(path: str | os.PathLike) -> list[Path]:
    """Removes the checkpoints of the same run that are newer than `path` and returns what their folders were.

    For a run that goes on from `path` because they are damaged: they would be in the way of those that it writes.
    """
    checkpoints = [folder for _, folder in list_checkpoints(Path(path).parent.parent)]
    newer = checkpoints[checkpoints.index(Path(path)) + 1 :]
    for folder in newer:
        _remove(folder)
    return newer


def split_optimizer_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A torch optimizer's state_dict as tensors ("3.mu") and JSON values; `join_optimizer_state` is the inverse."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, values in state_dict["state"].items():
        scalars[str(number)] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                scalars[str(number)][name] = value
    return tensors, {"scalars": scalars, "param_groups": list(state_dict["param_groups"])}


def join_optimizer_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict whose two parts `split_optimizer_state` gave."""
    state: dict[int, dict[str, Any]] = {int(number): dict(own) for number, own in values["scalars"].items()}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state[int(number)][name] = tensor
    return {"state": state, "param_groups": values["param_groups"]}


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest.json; CheckpointError where it is missing or changed."""
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise MissingFileError(f"{file} is missing")
    try:
        manifest = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    digest = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    if digest is None or digest != _own_digest(manifest):
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one that was written")
    return manifest


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Removes a checkpoint. It loses its name first, so that a kill half-way leaves no folder that looks whole."""
    nameless = path.with_name(f"{_NOT_YET}{uuid.uuid4().hex}")
    path.rename(nameless)
    shutil.rmtree(nameless)


def clear_partial(parent: Path) -> None:
    """Removes what a process that was killed while it wrote has left. One process writes to a run at a time."""
    for path in parent.glob(f"{_NOT_YET}*"):
        shutil.rmtree(path, ignore_errors=True)
