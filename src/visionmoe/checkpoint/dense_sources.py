"""Dense ViTs to start from, wherever they are: timm's, those of Hugging Face transformers, .npz files, our own."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.checkpoint.foreign import StateTensors
from visionmoe.checkpoint.npz import NpzReader
from visionmoe.checkpoint.sources import HUB, ReferenceSource, Source, open_source
from visionmoe.checkpoint.timm_vit import (
    TimmFacts,
    create_timm_model,
    source_of_timm_folder,
    source_of_timm_model,
    timm_source,
)
from visionmoe.checkpoint.transformers_vit import PREPROCESSOR_NAME, source_of_transformers_folder
from visionmoe.config import ModelConfig
from visionmoe.files import read_json
from visionmoe.model.hub import fetch, split_name
from visionmoe.model.pretrained import CONFIG_NAME, FORMAT
from visionmoe.model.vit import VisionTransformer

TIMM = "timm:"
Config = ModelConfig | str | os.PathLike | None


class ModelSource:
    """A model of ours in memory."""

    def __init__(self, model: VisionTransformer) -> None:
        self.config, self.preprocessing = model.config, model.preprocessing
        self.class_names = model.class_names
        self._state = model.state_dict()

    def check(self, left_out: Iterable[str]) -> None:
        """A model fits its own config."""

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def fill(self, state: Mapping[str, Tensor]) -> None:
        for name, target in state.items():
            target.copy_(self._state[name])


def open_dense(
    model_or_path: nn.Module | str | os.PathLike, config: Config = None, *, timm_model: str | None = None
) -> Source:
    """The parameters of a dense ViT; ValueError for a model that has sparse layers or what ours has not.

    model_or_path: a model of this package or of timm; "timm:NAME" (pretrained weights, downloaded by timm);
    "hf-hub:USER/NAME[@REVISION]"; a folder that save_pretrained wrote, here or in transformers, or timm's; a
    .safetensors file with timm's names; a .npz of vision_transformer; a checkpoint PREFIX or published name.
    config: for a .npz or PREFIX, as `visionmoe.load` takes it. timm_model: the timm model whose state_dict a
    .safetensors file is; without it heads of 64, exact GELU and images in [-1, 1] are taken for granted. ValueError
    for one of these that the source does not need.
    """
    where = f"this {type(model_or_path).__name__}" if isinstance(model_or_path, nn.Module) else os.fspath(model_or_path)
    if timm_model is not None and not where.endswith(".safetensors"):
        raise ValueError(f"timm_model is for .safetensors files with timm's names, got {where}")
    if isinstance(model_or_path, nn.Module):
        if config is not None:
            raise _own_config(where)
        source = _of_module(model_or_path)
    else:
        source = _of_path(where, config, timm_model)
    if source.config.moe.layers:
        raise ValueError(f"{where} has sparse layers already, {list(source.config.moe.layers)}: give a dense ViT")
    source.check(())
    return source


def source_kind(source: Source) -> str:
    """Whose format it was: "timm", "transformers" or "visionmoe"."""
    return getattr(source, "kind", "visionmoe")


def npz_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
    """The config of a dense ViT's .npz from its shapes, for square images; ValueError where they do not say it."""
    try:
        height, width, channels, hidden = shapes["embedding/kernel"]
        _, heads, _ = shapes["Encoder/encoderblock_0/SelfAttention/query/kernel"]
        mlp_dim = shapes["Encoder/encoderblock_0/Mlp/Dense_0/kernel"][1]
        length = shapes["Encoder/posembed_input/pos_embedding"][1]
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{where} does not have a ViT's arrays: give config=, a ModelConfig or a config.json"
        ) from None
    patches = length - ("cls" in shapes)
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{where} has {patches} patches, which are no square: give config=, with the image_size")
    blocks = (re.match(r"Encoder/encoderblock_(\d+)/", name) for name in shapes)
    head = shapes.get("head/kernel", (0, None))[1]
    return ModelConfig(
        image_size=side * height if height == width else (side * height, side * width),
        patch_size=height if height == width else (height, width),
        in_channels=channels,
        num_classes=head,
        hidden_size=hidden,
        num_layers=1 + max(int(block[1]) for block in blocks if block),
        mlp_dim=mlp_dim,
        num_heads=heads,
        pooling="token" if "cls" in shapes else "map" if "MapHead/probe" in shapes else "gap",
        representation_size=shapes.get("pre_logits/kernel", (0, None))[1],
    )


def _of_module(model: nn.Module) -> Source:
    if isinstance(model, VisionTransformer):
        return ModelSource(model)
    return source_of_timm_model(model, f"this {type(model).__name__}")


def _of_path(path: str, config: Config, timm_model: str | None) -> Source:
    if config is not None and (path.startswith((TIMM, HUB)) or path.endswith(".safetensors")):
        raise _own_config(path)
    if path.startswith(TIMM):
        name = path.removeprefix(TIMM)
        return source_of_timm_model(create_timm_model(name, pretrained=True), path)
    if path.startswith(HUB):
        path = str(fetch(*split_name(path.removeprefix(HUB)), optional=(PREPROCESSOR_NAME,)))
    if path.endswith(".safetensors"):
        return _of_state_file(Path(path), timm_model)
    if path.endswith(".npz") and config is None:
        reader = NpzReader(path)
        return ReferenceSource(reader, npz_config(reader.shapes, path))
    description = _description(Path(path) / CONFIG_NAME)
    if config is not None and {"architecture", "model_type"} & {*description}:
        raise _own_config(path)
    if "architecture" in description:
        return source_of_timm_folder(Path(path), description)
    if "model_type" in description:
        return source_of_transformers_folder(Path(path), description)
    return open_source(path, config)


def _own_config(where: str) -> ValueError:
    return ValueError(f"{where} says its config itself; config is for checkpoint prefixes and .npz files")


def _of_state_file(path: Path, timm_model: str | None) -> Source:
    tensors = StateTensors(path, str(path))
    if any(name.endswith("embeddings.cls_token") for name in tensors.shapes):
        raise ValueError(f"{path} is of Hugging Face transformers: give its folder, with config.json")
    if timm_model is None:
        return timm_source(tensors, TimmFacts())
    classes = tensors.length("head.weight") if "head.weight" in tensors.shapes else 0
    with torch.device("meta"):
        model = create_timm_model(timm_model, pretrained=False, num_classes=classes)
    return source_of_timm_model(model, str(path), tensors)


def _description(path: Path) -> dict[str, Any]:
    """A config.json that is not ours; empty where there is none."""
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, dict) and data.get("format") != FORMAT else {}
