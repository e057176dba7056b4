"""Dense ViTs of Hugging Face transformers (ViTModel, ViTForImageClassification): config.json and model.safetensors."""

from pathlib import Path
from typing import Any

from visionmoe.checkpoint.foreign import Entry, ForeignSource, Normalization, StateTensors
from visionmoe.config import Activation, ModelConfig
from visionmoe.files import read_json

PREPROCESSOR_NAME = "preprocessor_config.json"
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
# The defaults of transformers' ViTConfig, for what a config.json leaves out.
_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "pooler_act": "tanh",
}  # fmt: skip
# Our layers in a block -> theirs, joined; as published, and as transformers 5 names them.
_PUBLISHED = {
    "norm1": ("layernorm_before",),
    "attn.qkv": tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_SINCE_5 = {
    **_PUBLISHED,
    "attn.qkv": tuple(f"attention.{x}_proj" for x in "qkv"),
    "attn.proj": ("attention.o_proj",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def source_of_transformers_folder(folder: Path, description: dict[str, Any]) -> ForeignSource:
    """description: what config.json holds. ValueError naming what is not a plain ViT.

    A ViTModel's pooler becomes `pre_logits`, so that the model, which has no head, gives its pooler_output.
    """
    if description.get("model_type") != "vit":
        raise ValueError(f"{folder} must be a ViT of transformers (model_type vit), got {description['model_type']!r}")
    tensors = StateTensors(folder / "model.safetensors", str(folder))
    given = {**_DEFAULTS, **{k: v for k, v in description.items() if v is not None}}
    entries = _entries(tensors, int(given["num_hidden_layers"]))
    head = "head.weight" in entries
    pooler = "pre_logits.weight" in entries
    if pooler and given["pooler_act"] != "tanh":
        raise ValueError(f"{folder}: pooler_act must be tanh, got {given['pooler_act']!r}")
    if given["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{folder}: hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {given['hidden_act']!r}")
    config = ModelConfig(
        image_size=_size(given["image_size"]),
        patch_size=_size(given["patch_size"]),
        in_channels=given["num_channels"],
        num_classes=tensors.length(entries["head.weight"].names[0]) if head else None,
        hidden_size=given["hidden_size"],
        num_layers=given["num_hidden_layers"],
        mlp_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        representation_size=tensors.length(entries["pre_logits.weight"].names[0]) if pooler else None,
        activation=_ACTIVATIONS[given["hidden_act"]],
        layer_norm_eps=float(given["layer_norm_eps"]),
    )
    # A classifier does not use the pooler, and nothing but masked training uses the mask token.
    unused = [name for name in tensors.shapes if name.endswith("embeddings.mask_token")]
    unused += [name for name in tensors.shapes if "pooler." in name and head]
    return ForeignSource("transformers", tensors, config, entries, _normalization(folder, config.in_channels), unused)


def _entries(tensors: StateTensors, num_layers: int) -> dict[str, Entry]:
    shapes = tensors.shapes
    prefix = "vit." if any(name.startswith("vit.") for name in shapes) else ""
    published = f"{prefix}encoder.layer.0.layernorm_before.weight" in shapes
    block, layers = ("encoder.layer", _PUBLISHED) if published else ("layers", _SINCE_5)
    whole = {
        "patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection",
        "norm": f"{prefix}layernorm",
        "head": "classifier",
    }
    if "classifier.weight" not in shapes:
        whole["pre_logits"] = f"{prefix}pooler.dense"
    entries = {
        "cls_token": Entry((f"{prefix}embeddings.cls_token",)),
        "pos_embed": Entry((f"{prefix}embeddings.position_embeddings",)),
    }
    for ours, theirs in whole.items():
        if f"{theirs}.weight" in shapes:
            entries |= {f"{ours}.{part}": Entry((f"{theirs}.{part}",)) for part in ("weight", "bias")}
    for i in range(num_layers):
        for ours, names in layers.items():
            for part in ("weight", "bias"):
                found = tuple(f"{prefix}{block}.{i}.{name}.{part}" for name in names)
                absent = ours == "attn.qkv" and part == "bias" and not any(name in shapes for name in found)
                entries[f"blocks.{i}.{ours}.{part}"] = Entry(() if absent else found)
    return entries


def _normalization(folder: Path, channels: int) -> Normalization:
    """Of preprocessor_config.json; without one, ViT's usual 0.5 and 0.5."""
    path = folder / PREPROCESSOR_NAME
    given = read_json(path) if path.is_file() else {}
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a table of options")
    if given.get("do_normalize") is False:
        return Normalization((0.0,) * channels, (1.0,) * channels)
    mean, std = (given.get(f"image_{name}") or [0.5] * channels for name in ("mean", "std"))
    try:
        return Normalization(tuple(float(v) for v in mean), tuple(float(v) for v in std))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: image_mean and image_std must be lists of numbers, got {mean} and {std}") from None


def _size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    if not isinstance(value, int):
        raise ValueError(f"image_size and patch_size must be one number or two, got {value!r}")
    return value
