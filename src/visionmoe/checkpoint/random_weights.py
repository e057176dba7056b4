"""A new model's random parameters written to disk part by part: models larger than the memory can be made so."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from visionmoe.config import ModelConfig, to_dict
from visionmoe.files import atomic_write, write_json
from visionmoe.model.layers import Attention, AttentionPool, Mlp
from visionmoe.model.moe import MoE, SoftMoE
from visionmoe.model.pretrained import CONFIG_NAME, WEIGHTS_NAME, Preprocessing, PretrainedConfig
from visionmoe.model.skeleton import skeleton
from visionmoe.model.vit import VisionTransformer

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 4096  # of the first tensor in the file: a page, so that large tensors start on their own


def write_random_pretrained(
    config: ModelConfig, directory: str | os.PathLike, dtype: torch.dtype = torch.float32, seed: int = 0
) -> int:
    """Writes config.json and model.safetensors of a newly initialised model; returns the bytes of its parameters.

    The values are distributed as those of `visionmoe.create_model`: initialised in float32, rounded to `dtype`. In
    memory is one block at a time. dtype: float32, bfloat16 or float16. Written beside and renamed, config.json last.
    """
    if dtype not in _NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _NAMES))}, got {dtype}")
    directory = Path(directory)
    model = skeleton(VisionTransformer, config)
    offsets, header = _header(model.state_dict(), dtype)
    with (
        torch.random.fork_rng(devices=[]),
        atomic_write(directory / WEIGHTS_NAME) as path,
        open(path, "wb") as stream,
    ):
        torch.manual_seed(seed)
        stream.write(header)
        for name, tensor in _initialised(model):
            stream.seek(len(header) + offsets[name])
            _write(stream, tensor.to(dtype))
        (directory / CONFIG_NAME).unlink(missing_ok=True)  # new weights must not be read with another model's config
    write_json(directory / CONFIG_NAME, to_dict(PretrainedConfig(config, Preprocessing.of(config))))
    return sum(math.prod(tensor.shape) for tensor in model.state_dict().values()) * dtype.itemsize


def _header(state: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, int], bytes]:
    """Where each tensor starts behind the header, and the header: its length in 8 bytes, then JSON."""
    offsets, end = {}, 0
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, tensor in state.items():
        offsets[name], end = end, end + tensor.numel() * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return offsets, len(text).to_bytes(8, "little") + text


@torch.no_grad()
def _initialised(model: VisionTransformer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model on the meta device, by name, with the initial values of a new one, block by block."""
    for number, block in enumerate(model.blocks):
        block.to_empty(device="cpu")
        for module in block.modules():
            if isinstance(module, Attention | Mlp | MoE | SoftMoE | nn.LayerNorm):
                module.reset_parameters()
        yield from block.state_dict(prefix=f"blocks.{number}.").items()
        block.to("meta")
    for name, child in model.named_children():
        if name != "blocks":
            child.to_empty(device="cpu")
    for name, parameter in list(model.named_parameters(recurse=False)):
        setattr(model, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.reset_parameters()  # the blocks are empty again: for them it does nothing
    norms = [model.norm, *(m for m in model.modules() if isinstance(m, AttentionPool))]
    for norm in (module for part in norms for module in part.modules() if isinstance(module, nn.LayerNorm)):
        norm.reset_parameters()
    for name, tensor in model.state_dict().items():
        if not name.startswith("blocks."):
            yield name, tensor


def _write(stream: BinaryIO, tensor: Tensor) -> None:
    stream.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
