"""Running a model that is larger than the memory: its experts stay in the file and are read when tokens need them."""

import os
from typing import Any

import torch

from visionmoe.checkpoint.load import empty_model, fill
from visionmoe.checkpoint.sources import DirectorySource, open_source
from visionmoe.model.pretrained import empty_tensor
from visionmoe.model.streaming import READ_AHEAD, ExpertStream, Traffic, open_streams
from visionmoe.model.vit import VisionTransformer


def load_streamed(
    path_or_name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    read_ahead: int = READ_AHEAD,
    cache_dir: str | os.PathLike | None = None,
    new_head: bool = False,
    **overrides: Any,
) -> VisionTransformer:
    """A model in evaluation mode whose expert weights stay in the memory-mapped model.safetensors.

    For inference: outputs, `set_routing` and metrics are those of `visionmoe.load(...).to(dtype)`, gradients there are
    none. Every MoE layer reads the experts that got tokens, ahead of their use, and drops them after it. All other
    parameters are in memory. `model.to(another device)` ends the streaming: it copies the experts, one layer at a time.

    path_or_name: a directory that `save_pretrained` wrote, or "hf-hub:USER/NAME". dtype: of the computation and of the
    parameters in memory (None: that of the stored experts); experts stored in another dtype are converted one by one.
    device: where the model computes; on CUDA the experts are copied there one by one, through pinned memory.
    read_ahead: bytes of experts that may be in memory at once, one expert at least. new_head, overrides: as in
    `visionmoe.load`.
    """
    source = open_source(path_or_name, None, cache_dir)
    if not isinstance(source, DirectorySource):
        raise ValueError(
            f"{path_or_name} is no directory with a model.safetensors; `visionmoe convert` makes one of it"
        )
    if read_ahead < 0:
        raise ValueError(f"read_ahead must be at least 0 bytes, got {read_ahead}")
    model, fresh = empty_model(source, new_head, overrides)
    streams = open_streams(source.weights, model.moe_layers, read_ahead)
    kept = {f"blocks.{layer}.mlp.experts.{part}.weight" for layer in streams for part in ("fc1", "fc2")}
    if dtype is None:
        dtype = source.dtype(min(kept)) if kept else torch.float32
    state = {name: empty_tensor(tensor.shape, dtype) for name, tensor in model.state_dict().items() if name not in kept}
    fill(state, source, model.config, fresh)
    placed = {name: tensor.to(device) for name, tensor in state.items()}
    for layer, stream in streams.items():
        model.moe_layer(layer).experts.stream = stream
        placed |= {f"blocks.{layer}.mlp.experts.{part}.weight": getattr(stream, part) for part in ("fc1", "fc2")}
    model.load_state_dict(placed, assign=True)
    return model.eval().requires_grad_(False)


def expert_streams(model: VisionTransformer) -> list[ExpertStream]:
    """The streams of a model that `load_streamed` made, one per MoE layer; of others none."""
    found = (model.moe_layer(layer).experts.stream for layer in model.moe_layers)
    return [stream for stream in found if stream is not None]


def traffic(model: VisionTransformer) -> Traffic:
    """What a streamed model has read so far. ValueError for a model that is not streamed."""
    streams = expert_streams(model)
    if not streams:
        raise ValueError("the model's experts are not streamed from a file")
    return streams[0].ahead.traffic
