"""Checkpoints: the released format without JAX, names both ways, our own directories, and downloads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionmoe.checkpoint.mapping import params_from_vmoe, params_to_vmoe
    from visionmoe.checkpoint.random_weights import write_random_pretrained
    from visionmoe.checkpoint.resize import resize_pos_embed
    from visionmoe.checkpoint.streaming import load_streamed
    from visionmoe.checkpoint.vmoe_format import VmoeReader, read_vmoe, write_vmoe

__all__ = [
    "VmoeReader",
    "load_streamed",
    "params_from_vmoe",
    "params_to_vmoe",
    "read_vmoe",
    "resize_pos_embed",
    "write_random_pretrained",
    "write_vmoe",
]

_HOMES = {
    "VmoeReader": "vmoe_format",
    "read_vmoe": "vmoe_format",
    "write_vmoe": "vmoe_format",
    "load_streamed": "streaming",
    "params_from_vmoe": "mapping",
    "params_to_vmoe": "mapping",
    "resize_pos_embed": "resize",
    "write_random_pretrained": "random_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'visionmoe.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"visionmoe.checkpoint.{_HOMES[name]}"), name)
