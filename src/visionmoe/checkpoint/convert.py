"""Checkpoints from one format to another, bit for bit."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visionmoe.checkpoint.mapping import our_shapes, tensors_to_vmoe
from visionmoe.checkpoint.sources import DirectorySource, Source, open_source
from visionmoe.checkpoint.vmoe_write import write_vmoe
from visionmoe.config import to_dict
from visionmoe.files import write_json
from visionmoe.model.pretrained import CONFIG_NAME, WEIGHTS_NAME, PretrainedConfig, write_pretrained

PREFIX_NAME = "ckpt"


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a checkpoint.

    source: a directory of ours, the PREFIX of a checkpoint in the released format, a dense ViT's .npz, or a published
    name. config: config.json of a PREFIX or .npz, ours or the reference's.
    to: "safetensors" (config.json and model.safetensors) or "vmoe" (ckpt.index, ckpt.data-*, and config.json).
    num_shards: data files of "vmoe".
    """

    source: str
    out: str
    config: str | None = None
    to: Literal["safetensors", "vmoe"] = "safetensors"
    num_shards: int = 1


def run_convert(config: ConvertConfig) -> dict[str, Any]:
    """Writes the checkpoint into `config.out`, with results.json; returns the results.

    Parameters keep their dtype, bfloat16 too.
    """
    if config.to not in ("safetensors", "vmoe"):
        raise ValueError(f"to must be safetensors or vmoe, got {config.to!r}")
    started = time.perf_counter()
    source = open_source(config.source, config.config)
    source.check(())
    state = _stored(source)
    out = Path(config.out)
    results: dict[str, Any] = {"source": config.source, "to": config.to}
    if config.to == "safetensors":
        write_pretrained(out, source.config, state, source.preprocessing, source.class_names)
        files = [CONFIG_NAME, WEIGHTS_NAME]
    else:
        write_vmoe(out / PREFIX_NAME, tensors_to_vmoe(state, source.config), config.num_shards)
        write_json(
            out / CONFIG_NAME, to_dict(PretrainedConfig(source.config, source.preprocessing, source.class_names))
        )
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


def _stored(source: Source) -> dict[str, Tensor]:
    """The parameters in the dtypes that they are stored in: read, or, those of a directory, only mapped."""
    if isinstance(source, DirectorySource):
        return source.mapped()
    state = {name: torch.empty(shape, dtype=source.dtype(name)) for name, shape in our_shapes(source.config).items()}
    source.fill(state)
    return state
