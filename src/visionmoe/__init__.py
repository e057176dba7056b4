"""V-MoE, Vision Transformers with a sparse mixture of experts, in PyTorch (arXiv 2106.05974)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionmoe.checkpoint.load import load
    from visionmoe.config import ModelConfig, MoEConfig, RoutingSetting
    from visionmoe.model.flops import count_flops
    from visionmoe.model.vit import ModelOutput, VisionTransformer, create_model
    from visionmoe.variants import get_config, list_models

__version__ = "0.1.0"

# Names are imported when they are first used: `import visionmoe` alone does not load torch.
_HOMES = {
    "ModelConfig": "config",
    "MoEConfig": "config",
    "RoutingSetting": "config",
    "ModelOutput": "model.vit",
    "VisionTransformer": "model.vit",
    "create_model": "model.vit",
    "count_flops": "model.flops",
    "get_config": "variants",
    "list_models": "variants",
    "load": "checkpoint.load",
}
__all__ = [
    "MoEConfig",
    "ModelConfig",
    "ModelOutput",
    "RoutingSetting",
    "VisionTransformer",
    "count_flops",
    "create_model",
    "get_config",
    "list_models",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'visionmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"visionmoe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
