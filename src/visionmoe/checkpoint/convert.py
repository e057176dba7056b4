"""Checkpoints from one format to another, bit for bit."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visionmoe.checkpoint.mapping import our_shapes, tensors_to_vmoe
from visionmoe.checkpoint.sharded_model import export_pretrained
from visionmoe.checkpoint.sources import DirectorySource, Source, open_source
from visionmoe.checkpoint.store import MANIFEST_NAME
from visionmoe.checkpoint.vmoe_write import write_vmoe
from visionmoe.config import to_dict
from visionmoe.files import write_json
from visionmoe.model.pretrained import CONFIG_NAME, WEIGHTS_NAME, PretrainedConfig, write_pretrained

PREFIX_NAME = "ckpt"


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a checkpoint.

    source: a directory of ours, the PREFIX of a checkpoint in the released format, a dense ViT's .npz, a published
    name, or a run's checkpoint (RUN/checkpoints/step_XXXXXXXX), of however many processes. config: config.json of a
    PREFIX or .npz, ours or the reference's.
    to: "safetensors" (config.json and model.safetensors) or "vmoe" (ckpt.index, ckpt.data-*, and config.json).
    num_shards: data files of "vmoe". averaged: of a run's checkpoint, its averaged parameters.
    """

    source: str
    out: str
    config: str | None = None
    to: Literal["safetensors", "vmoe"] = "safetensors"
    num_shards: int = 1
    averaged: bool = False


def run_convert(config: ConvertConfig) -> dict[str, Any]:
    """Writes the checkpoint into `config.out`, with results.json; returns the results.

    Parameters keep their dtype, bfloat16 too. Of a directory or a run's checkpoint only a slice is in memory at a time.
    """
    if config.to not in ("safetensors", "vmoe"):
        raise ValueError(f"to must be safetensors or vmoe, got {config.to!r}")
    started = time.perf_counter()
    out = Path(config.out)
    results: dict[str, Any] = {"source": config.source, "to": config.to}
    with _opened(config) as source:
        source.check(())
        state = _stored(source)
        if config.to == "safetensors":
            if not _is_checkpoint(config.source):
                write_pretrained(out, source.config, state, source.preprocessing, source.class_names)
            files = [CONFIG_NAME, WEIGHTS_NAME]
        else:
            write_vmoe(out / PREFIX_NAME, tensors_to_vmoe(state, source.config), config.num_shards)
            written = PretrainedConfig(source.config, source.preprocessing, source.class_names)
            write_json(out / CONFIG_NAME, to_dict(written))
            results["prefix"] = str(out / PREFIX_NAME)
            shards = [f"{PREFIX_NAME}.data-{i:05d}-of-{config.num_shards:05d}" for i in range(config.num_shards)]
            files = [CONFIG_NAME, f"{PREFIX_NAME}.index", *shards]
        results |= {
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "files": {name: (out / name).stat().st_size for name in files},
            "seconds": round(time.perf_counter() - started, 3),
        }
    write_json(out / "results.json", results)
    return results


def _is_checkpoint(path: str) -> bool:
    return (Path(path) / MANIFEST_NAME).is_file()


@contextlib.contextmanager
def _opened(config: ConvertConfig) -> Iterator[Source]:
    """The source. A run's checkpoint becomes a directory of ours first: the one to be written, or one for a while."""
    if not _is_checkpoint(config.source):
        if config.averaged:
            raise ValueError(f"averaged is for a run's checkpoint (a folder with {MANIFEST_NAME}), got {config.source}")
        yield open_source(config.source, config.config)
        return
    if config.config is not None:
        raise ValueError(f"{config.source} has a config of its own; config is for checkpoint prefixes")
    out = Path(config.out)
    with contextlib.ExitStack() as stack:
        if config.to == "vmoe":
            out.mkdir(parents=True, exist_ok=True)
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out, prefix=".directory-")))
        export_pretrained(config.source, out, group="ema" if config.averaged else "model")
        yield open_source(out)


def _stored(source: Source) -> dict[str, Tensor]:
    """The parameters in the dtypes that they are stored in: read, or, those of a directory, only mapped."""
    if isinstance(source, DirectorySource):
        return source.mapped()
    state = {name: torch.empty(shape, dtype=source.dtype(name)) for name, shape in our_shapes(source.config).items()}
    source.fill(state)
    return state
