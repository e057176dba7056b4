"""Images: sources, preprocessing, augmentation and batches. Names are imported on first use: torch is slow."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionmoe.data.config import DataConfig
    from visionmoe.data.decode import BrokenImageError, decode_image, read_image
    from visionmoe.data.loader import EvalLoader, TrainLoader
    from visionmoe.data.sources import Source, open_source
    from visionmoe.data.transforms import preprocess, to_uint8

__all__ = [
    "BrokenImageError",
    "DataConfig",
    "EvalLoader",
    "Source",
    "TrainLoader",
    "decode_image",
    "open_source",
    "preprocess",
    "read_image",
    "to_uint8",
]
_MODULES = {
    "config": ("DataConfig",),
    "decode": ("BrokenImageError", "decode_image", "read_image"),
    "loader": ("EvalLoader", "TrainLoader"),
    "sources": ("Source", "open_source"),
    "transforms": ("preprocess", "to_uint8"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"visionmoe.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
