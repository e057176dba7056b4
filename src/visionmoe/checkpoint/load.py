"""Loading a model, wherever its parameters are, at little more memory than the model's own."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visionmoe.checkpoint import engine
from visionmoe.checkpoint.mapping import compare, complain, our_shapes
from visionmoe.checkpoint.resize import resize_pos_embed
from visionmoe.checkpoint.sharded_model import read_into_sharded
from visionmoe.checkpoint.sources import Source, open_source
from visionmoe.config import ModelConfig
from visionmoe.model.pretrained import empty_tensor
from visionmoe.model.skeleton import skeleton
from visionmoe.model.vit import VisionTransformer


def load(
    path_or_name: str | os.PathLike,
    config: ModelConfig | str | os.PathLike | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    new_head: bool = False,
    **overrides: Any,
) -> VisionTransformer:
    """Returns a model with stored parameters (float32), in evaluation mode.

    path_or_name: a directory that `save_pretrained` wrote; a finished run's folder; "hf-hub:USER/NAME[@REVISION]", such
    a directory on the Hugging Face hub, downloaded into its cache (or `cache_dir`); the PREFIX of a checkpoint in the
    released format, or a dense ViT's .npz, with `config` (a ModelConfig, or the path of a config.json, ours or the
    reference's); or the name of a published checkpoint, downloaded once into `cache_dir` (default $VISIONMOE_CACHE or
    ~/.cache/visionmoe).
    new_head: start with a zero-initialised head; so does a changed num_classes.
    overrides: options of ModelConfig and MoEConfig. image_size resizes learned position embeddings;
    representation_size=None drops the layer before the head. Options that change other shapes are ValueErrors.
    """
    source = open_source(path_or_name, config, cache_dir)
    model, fresh = empty_model(source, new_head, overrides)
    state = {name: empty_tensor(t.shape) for name, t in model.state_dict().items()}
    fill(state, source, model.config, fresh)
    model.load_state_dict(state, assign=True)
    return model.eval()


def empty_model(source: Source, new_head: bool, overrides: Mapping[str, Any]) -> tuple[VisionTransformer, set[str]]:
    """The model of a source with `load`'s overrides, on the meta device, and its layers that stored parameters do not
    fill. ValueError where they do not fit."""
    final = source.config.replace(**overrides)
    fresh = _fresh(source.config, final, new_head)
    source.check(fresh)
    complain("the checkpoint with these overrides", _misfits(source.config, final, fresh))
    model = skeleton(VisionTransformer, final)
    model.class_names = None if "head" in fresh else source.class_names
    if (final.image_hw, final.in_channels) == (source.config.image_hw, source.config.in_channels):
        model.preprocessing = source.preprocessing
    return model, fresh


def _fresh(stored: ModelConfig, final: ModelConfig, new_head: bool) -> set[str]:
    """Layers whose stored parameters are not used."""
    changed = final.representation_size != stored.representation_size
    if changed and final.representation_size is not None:
        raise ValueError(
            f"representation_size of stored parameters is {stored.representation_size} and can only become None, "
            f"got {final.representation_size}"
        )
    fresh = {"pre_logits"} if changed else set()
    return fresh | ({"head"} if new_head or changed or final.num_classes != stored.num_classes else set())


def _misfits(stored: ModelConfig, final: ModelConfig, fresh: set[str]) -> list[str]:
    """What overrides would do to shapes, apart from the position embeddings and fresh layers."""
    kept, wanted = (
        {n: s for n, s in our_shapes(config).items() if n.split(".")[0] not in fresh} for config in (stored, final)
    )
    if "pos_embed" in kept and "pos_embed" in wanted:
        del kept["pos_embed"], wanted["pos_embed"]
    return compare(kept, wanted)


def fill(state: Mapping[str, Tensor], source: Source, final: ModelConfig, fresh: set[str]) -> None:
    """Gives these parameters of the model `final` their stored values, resized positions, or those of a new head."""
    stored = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in fresh}
    if "pos_embed" in stored and source.config.grid != final.grid:
        stored.pop("pos_embed").copy_(_resized_positions(source, final))
    source.fill(stored)
    _fill_new_head(state, final, fresh)


def fill_parts(state: Mapping[str, Tensor], source: Source, final: ModelConfig, fresh: set[str]) -> None:
    """As `fill`, of parameters of which this process has parts (DTensors): it reads its own. Not collective."""
    stored = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in fresh}
    if "pos_embed" in stored and source.config.grid != final.grid:
        positions = _resized_positions(source, final)
        engine.load_from({"pos_embed": stored.pop("pos_embed")}, {"pos_embed": positions})
    read_into_sharded(source, None, stored)
    _fill_new_head(state, final, fresh)


def _resized_positions(source: Source, final: ModelConfig) -> Tensor:
    old = torch.empty(our_shapes(source.config)["pos_embed"])
    source.fill({"pos_embed": old})
    return resize_pos_embed(old, final.num_tokens, old_grid=source.config.grid, new_grid=final.grid)


def _fill_new_head(state: Mapping[str, Tensor], final: ModelConfig, fresh: set[str]) -> None:
    if "head" in fresh and "head.weight" in state:
        state["head.weight"].zero_()
        state["head.bias"].fill_(final.head_bias_init)
