"""Dense ViTs of timm: a model, a folder as timm's are on the Hugging Face hub, or a file with their state_dict."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.checkpoint.foreign import Entry, ForeignSource, Normalization, StateTensors, normalize
from visionmoe.checkpoint.mapping import our_shapes
from visionmoe.config import Activation, ModelConfig
from visionmoe.model.hub import first_line

# What a timm ViT can have and ours has not: names of parameters -> in words.
_UNSUPPORTED = (
    (r"^reg_token", "register tokens"),
    (r"^(dist_token|head_dist\.)", "a distillation token"),
    (r"^norm_pre\.", "a norm before the blocks (as in CLIP)"),
    (r"^fc_norm\.", "a norm after pooling (fc_norm)"),
    (r"\.mlp\.(w12|fc1_g|norm|gate)", "gated or normalised MLPs"),
    (r"\.attn\.(norm|gate)\.", "a norm or gate on the attention's output"),
    (r"rel_pos|relative_position|rope", "relative positions"),
    (r"^patch_embed\.(norm|backbone|conv)", "a patch embedding that is more than one convolution"),
    (r"^attn_pool\.pos_embed", "positions in the attention pooling"),
)
# Of what the config is read from; naflexvit's patch embedding is linear, (D, P).
_AXES = {
    "patch_embed.proj.weight": ("D", "C", "height", "width"),
    "pos_embed": ("1", "T", "D"),
    "blocks.0.mlp.fc1.weight": ("F", "D"),
    "head.weight": ("classes", "D"),
}
_KNOWN_WIDTHS = (192, 384, 768, 1024)  # timm's ViTs of these widths have heads of 64
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class TimmFacts:
    """What the parameters do not say. None: to be derived. checked: a timm model was looked at."""

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-6
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    checked: bool = False


def source_of_timm_model(model: nn.Module, where: str, tensors: StateTensors | None = None) -> ForeignSource:
    """A timm VisionTransformer; ValueError naming what ours has not.

    tensors: its parameters, where the model itself is only a description (on the meta device).
    """
    facts = _inspect(model, where)
    if tensors is not None:
        return timm_source(tensors, facts)
    source = timm_source(StateTensors(model.state_dict(), where), facts)

    def original(images: Tensor) -> Tensor:
        was_training = model.training
        try:
            return model.eval()(normalize(images, source.normalization))
        finally:
            model.train(was_training)

    source.original = original
    return source


def source_of_timm_folder(folder: Path, description: dict[str, Any]) -> ForeignSource:
    """config.json ("architecture", "model_args", "pretrained_cfg") and model.safetensors."""
    given = {k: description[k] for k in ("num_classes", "global_pool") if description.get(k) is not None}
    arguments = {**given, **(description.get("model_args") or {})}
    with torch.device("meta"):
        model = create_timm_model(str(description["architecture"]), pretrained=False, **arguments)
    stated = description.get("pretrained_cfg") or {}
    model.pretrained_cfg = {**dict(getattr(model, "pretrained_cfg", {})), **stated}
    return source_of_timm_model(model, str(folder), StateTensors(folder / "model.safetensors", str(folder)))


def create_timm_model(name: str, **options: Any) -> Any:
    """timm.create_model, with its mistakes as ValueErrors of one line."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ValueError(f"timm {timm.__version__} has no model {name!r}" + (f"; near: {near}" if near else ""))
    try:
        return timm.create_model(name, **options)
    except OSError as error:
        raise ConnectionError(f"timm could not get the weights of {name}: {first_line(error)}") from None
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot make {name} with {options}: {first_line(error)}") from None


def timm_source(tensors: StateTensors, facts: TimmFacts) -> ForeignSource:
    """A state_dict with timm's names; ValueError naming the first thing that ours has not."""
    shapes, where = tensors.shapes, tensors.where
    if "patch_embed.proj.weight" not in shapes or "blocks.0.attn.qkv.weight" not in shapes:
        raise ValueError(f"{where} has no patch_embed.proj.weight and blocks.0.attn.qkv.weight: it is no timm ViT")
    for pattern, words in _UNSUPPORTED:
        if any(re.search(pattern, name) for name in shapes):
            raise ValueError(f"{where} has {words}, which this package's model has not")
    for name, axes in _AXES.items():
        if len(shapes.get(name, axes)) != len(axes):
            raise ValueError(f"{where}: {name} must be ({', '.join(axes)}), got shape {shapes[name]}")
    config = _config(tensors, facts)
    unused = _droppable(tensors, facts) if config.attention_qk_norm else []
    entries = _entries(shapes, config)
    normalization = Normalization(_per_channel(facts.mean, config), _per_channel(facts.std, config))
    return ForeignSource("timm", tensors, config, entries, normalization, unused)


def _config(tensors: StateTensors, facts: TimmFacts) -> ModelConfig:
    shapes, where = tensors.shapes, tensors.where
    hidden, channels, *patch = shapes["patch_embed.proj.weight"]
    if "norm.weight" not in shapes or "norm.bias" not in shapes:
        raise ValueError(f"{where} has no final LayerNorm (norm.weight and norm.bias), which this package's model has")
    token, attention = "cls_token" in shapes, "attn_pool.latent" in shapes
    if token and attention:
        raise ValueError(f"{where} has attention pooling beside a class token, which this package's model has not")
    heads = facts.num_heads
    if heads is None:
        if hidden not in _KNOWN_WIDTHS:
            raise ValueError(f"{where} of width {hidden} does not say its number of heads: give the timm model's name")
        heads = hidden // 64
    size = facts.image_size or _square(tensors, (patch[0], patch[1]))
    return ModelConfig(
        image_size=size[0] if size[0] == size[1] else size,
        patch_size=patch[0] if patch[0] == patch[1] else (patch[0], patch[1]),
        in_channels=channels,
        num_classes=shapes.get("head.weight", (None,))[0],
        hidden_size=hidden,
        num_layers=1 + max(int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if m),
        mlp_dim=shapes.get("blocks.0.mlp.fc1.weight", (1,))[0],
        num_heads=heads,
        pos_embed="learned" if "pos_embed" in shapes else "none",
        pooling="token" if token else "map" if attention else "gap",
        attention_qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        activation=facts.activation,
        layer_norm_eps=facts.layer_norm_eps,
    )


def _square(tensors: StateTensors, patch: tuple[int, int]) -> tuple[int, int]:
    """The image size of a square grid of patches; ValueError where there is none."""
    if "pos_embed" not in tensors.shapes:
        return 224, 224
    length = tensors.shapes["pos_embed"][1]
    for patches in (length - ("cls_token" in tensors.shapes), length):  # some leave the class token out
        side = math.isqrt(max(0, patches))
        if side and side * side == patches:
            return side * patch[0], side * patch[1]
    raise ValueError(f"{tensors.where} has {length} positions, which are no square: give the timm model's name")


def _entries(shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Entry]:
    """timm's names are ours; biases that are not there are zeros, and layer-scales belong to the layer before them."""
    entries = {}
    for name in our_shapes(config):
        if name in shapes:
            entries[name] = Entry((name,))
        elif name.endswith(".bias") and "norm" not in name:
            entries[name] = Entry(())
    for i in range(config.num_layers):
        for gamma, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            scale = f"blocks.{i}.{gamma}.gamma"
            for name in (f"blocks.{i}.{layer}.weight", f"blocks.{i}.{layer}.bias"):
                if scale in shapes and name in entries:
                    entries[name] = dataclasses.replace(entries[name], scale=scale)
    patches = config.grid[0] * config.grid[1]
    if config.pooling == "token" and shapes.get("pos_embed", (0, 0))[1] == patches:
        entries["pos_embed"] = Entry(("pos_embed",), zero_row=True)
    return entries


def _droppable(tensors: StateTensors, facts: TimmFacts) -> list[str]:
    """Biases of the norms of queries and keys, which ours have not: a key's changes all scores of a query alike and so
    nothing, a query's must be zero."""
    names = [name for name in tensors.shapes if re.search(r"attn\.[qk]_norm\.bias$", name)]
    if not names and not facts.checked:
        raise ValueError(f"{tensors.where} does not say how it normalises queries and keys: give the timm model's name")
    for name in names:
        if "q_norm" in name and tensors.read(name).any():
            raise ValueError(f"{tensors.where}: {name} is not zero, and this package's model has no such bias")
    return names


def _inspect(model: nn.Module, where: str) -> TimmFacts:
    """Looks at the parts of a timm model that its parameters do not show."""
    from timm.layers import Mlp, PatchEmbed
    from timm.models import vision_transformer as vit

    def refuse(what: str) -> ValueError:
        return ValueError(f"{where} has {what}, which this package's model has not")

    if type(model) is not vit.VisionTransformer:
        raise ValueError(f"{where} must be a timm VisionTransformer, got {type(model).__name__}")
    if type(model.patch_embed) is not PatchEmbed:
        raise refuse(f"the patch embedding {type(model.patch_embed).__name__}")
    for block in model.blocks:
        if type(block) is not vit.Block or type(block.mlp) is not Mlp:
            raise refuse(f"blocks of {type(block).__name__} with {type(getattr(block, 'mlp', None)).__name__}")
    first: Any = model.blocks[0]
    for norm in (first.norm1, first.attn.q_norm, model.norm):
        if not isinstance(norm, nn.LayerNorm | nn.Identity):
            raise refuse(f"norms of {type(norm).__name__}")
    if model.global_pool not in ("token", "map", "avg") or (model.global_pool == "avg" and model.num_prefix_tokens):
        beside = " beside a class token" if model.global_pool == "avg" else ""
        raise refuse(f"global_pool {model.global_pool!r}{beside}")
    size = model.patch_embed.img_size
    stated = dict(getattr(model, "pretrained_cfg", None) or {})
    return TimmFacts(
        num_heads=first.attn.num_heads,
        image_size=None if size is None else (int(size[0]), int(size[1])),
        activation=_activation(first.mlp.act, refuse),
        layer_norm_eps=first.norm1.eps,
        mean=tuple(stated.get("mean", _HALF)),
        std=tuple(stated.get("std", _HALF)),
        checked=True,
    )


def _activation(act: nn.Module, refuse: Any) -> Activation:
    from timm.layers import activations

    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if type(act) in (activations.GELU, activations.GELUTanh):
        return "gelu" if type(act) is activations.GELU else "gelu_tanh"
    raise refuse(f"the activation {type(act).__name__}")


def _per_channel(values: tuple[float, ...], config: ModelConfig) -> tuple[float, ...]:
    """One number for every channel, also where only one is given or a model of three was made one of fewer."""
    values = tuple(float(v) for v in values)
    return values[:1] * config.in_channels if len(set(values)) == 1 else values
