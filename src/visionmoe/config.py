"""Typed configuration of a model, and the strict conversion between dataclasses and JSON.

Axes, used in the whole package (one legend):
B images, T tokens per image, G groups, S tokens per group, E experts, C capacity (buffer places per
expert and group), K experts selected per token, D hidden size, F MLP width, M ensemble members, P slots.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")

Activation = Literal["gelu_tanh", "gelu"]
# activation -> the `approximate` of torch's GELU
GELU_APPROXIMATION: dict[str, str] = {"gelu_tanh": "tanh", "gelu": "none"}


@dataclass(frozen=True)
class RoutingSetting:
    """What of the routing can be changed on trained weights (arXiv 2106.05974, sections 3 and 5)."""

    num_selected_experts: int
    capacity_factor: float
    batch_priority: bool


@dataclass(frozen=True)
class MoEConfig:
    """The sparse layers of a V-MoE: where they are, their experts, and how tokens are routed.

    group_size: tokens per routing group as the reference counts them (ensemble copies included), or
    "batch": all tokens of a call are one group, or "image": one group per image.
    router: "top_k" (noisy top-K experts per token, arXiv 2106.05974), "expert_choice" (top-C tokens per
    expert, arXiv 2202.09368) or "soft" (Soft MoE, arXiv 2308.00951).
    noise_std: router noise in training, divided by the number of experts (not so in Soft MoE); None: 1, Soft MoE 0.
    num_slots: Soft MoE's slots per expert; None derives them from capacity_factor and one image's tokens.
    split_rngs: False starts all experts of a layer from the same weights, as the reference does.
    normalize_combine_weights: the weights of each token's kept experts are divided by their sum (sparse upcycling,
    arXiv 2212.05055, section 3); with K=1 the router then learns from the auxiliary losses alone. Not for "soft".
    layer_routing: settings of single layers (block index -> setting) that replace the common ones.
    """

    num_experts: int = 8
    layers: tuple[int, ...] = ()
    num_selected_experts: int = 2
    capacity_factor: float = 1.05
    batch_priority: bool = False
    capacity_ceil_or_round: Literal["ceil", "round"] = "ceil"
    capacity_multiple_of: int | None = 4
    group_size: int | Literal["batch", "image"] = "batch"
    router: Literal["top_k", "expert_choice", "soft"] = "top_k"
    noise_std: float | None = None
    importance_loss_weight: float = 0.005
    load_loss_weight: float = 0.005
    gshard_loss_weight: float = 0.0
    expert_dropout_rate: float = 0.0
    ensemble_size: int = 1
    num_slots: int | None = None
    split_rngs: bool = False
    normalize_combine_weights: bool = False
    layer_routing: dict[int, RoutingSetting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_experts", "num_selected_experts", "ensemble_size")
        _at_least(self, 0, "importance_loss_weight", "load_loss_weight", "gshard_loss_weight")
        _one_of(self, "router", ("top_k", "expert_choice", "soft"))
        _one_of(self, "capacity_ceil_or_round", ("ceil", "round"))
        _rate(self, "expert_dropout_rate")
        if isinstance(self.group_size, str):
            _one_of(self, "group_size", ("batch", "image"))
        else:
            _at_least(self, 1, "group_size")
        if self.num_slots is not None:
            _at_least(self, 1, "num_slots")
        if self.noise_std is not None:
            _at_least(self, 0, "noise_std")
        if self.num_experts % self.ensemble_size:
            raise ValueError(
                f"num_experts must be a multiple of ensemble_size, got {self.num_experts} and {self.ensemble_size}"
            )
        if self.normalize_combine_weights and self.router == "soft":
            raise ValueError("normalize_combine_weights needs router 'top_k' or 'expert_choice', got 'soft'")
        if self.ensemble_size > 1 and self.router != "top_k":
            raise ValueError(f"ensemble_size > 1 needs router 'top_k', got {self.router!r}")
        for layer in (None, *self.layer_routing):
            self.check_routing(self.routing(layer))

    @property
    def router_noise(self) -> float:
        """noise_std, with its default by router."""
        if self.noise_std is None:
            return 0.0 if self.router == "soft" else 1.0
        return self.noise_std

    def routing(self, layer: int | None = None) -> RoutingSetting:
        """The setting that block `layer` uses (None: the common one)."""
        common = RoutingSetting(self.num_selected_experts, self.capacity_factor, self.batch_priority)
        return common if layer is None else self.layer_routing.get(layer, common)

    def check_routing(self, setting: RoutingSetting) -> None:
        """Raises ValueError when `setting` cannot be used with these experts."""
        from_dict(RoutingSetting, to_dict(setting))  # types
        experts_seen = self.num_experts // self.ensemble_size
        if not 1 <= setting.num_selected_experts <= experts_seen:
            raise ValueError(
                f"num_selected_experts must be between 1 and {experts_seen}, got {setting.num_selected_experts}"
            )
        if not 0 < setting.capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor must be > 0 and finite, got {setting.capacity_factor}")


@dataclass(frozen=True)
class ModelConfig:
    """A Vision Transformer; with `moe.layers`, a V-MoE (arXiv 2106.05974; defaults: ViT-B/16).

    num_classes None: the model returns features. pooling: "token" (class token), "gap" (mean over tokens) or
    "map" (attention pooling). representation_size: width of the tanh layer before the head, None: no such layer.
    image_size and patch_size are one number or (height, width), in pixels. activation: GELU in its tanh form, as the
    reference has it, or exact ("gelu"), as timm and Hugging Face have it. layer_norm_eps: of every LayerNorm.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    num_classes: int | None = 1000
    hidden_size: int = 768
    num_layers: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    pos_embed: Literal["learned", "sincos2d", "none"] = "learned"
    pooling: Literal["token", "gap", "map"] = "token"
    representation_size: int | None = None
    head_bias_init: float = 0.0
    attention_qk_norm: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: Activation = "gelu_tanh"
    layer_norm_eps: float = 1e-6
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "in_channels", "hidden_size", "num_layers", "mlp_dim", "num_heads")
        _one_of(self, "pos_embed", ("learned", "sincos2d", "none"))
        _one_of(self, "pooling", ("token", "gap", "map"))
        _one_of(self, "activation", tuple(GELU_APPROXIMATION))
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps must be > 0 and < 1, got {self.layer_norm_eps}")
        _rate(self, "dropout_rate", "attention_dropout_rate")
        for name in ("num_classes", "representation_size"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)
        for image, patch in zip(self.image_hw, self.patch_hw, strict=True):
            if patch < 1 or image < 1 or image % patch:
                raise ValueError(
                    f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}"
            )
        if self.pos_embed == "sincos2d" and (self.hidden_size % 4 or self.hidden_size < 8):
            raise ValueError(f"sincos2d needs a hidden_size that is a multiple of 4 and >= 8, got {self.hidden_size}")
        wrong = [layer for layer in (*self.moe.layers, *self.moe.layer_routing) if not 0 <= layer < self.num_layers]
        if wrong:
            raise ValueError(f"MoE layers must be between 0 and {self.num_layers - 1}, got {wrong}")

    @property
    def image_hw(self) -> tuple[int, int]:
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        return _pair(self.patch_size)

    @property
    def gelu_approximate(self) -> str:
        """The activation as torch's GELU names it: "tanh" or "none"."""
        return GELU_APPROXIMATION[self.activation]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def num_tokens(self) -> int:
        """Tokens per image, the class token included."""
        return self.grid[0] * self.grid[1] + (self.pooling == "token")

    @property
    def ensemble_size(self) -> int:
        """Rows of logits per image: M with ensemble routing, else 1."""
        return self.moe.ensemble_size if self.moe.layers else 1

    def copies(self, layer: int) -> int:
        """Of an image in block `layer`: those of an ensemble's members begin with the first block that has experts."""
        return self.ensemble_size if layer >= min(self.moe.layers, default=self.num_layers) else 1

    def replace(self, **overrides: Any) -> Self:
        """A copy with some options changed; names of `MoEConfig` go to `moe`. Unknown names are ValueErrors.

        A changed routing setting is that of all blocks, those of `layer_routing` too, unless that is given as well.
        """
        own = {f.name for f in dataclasses.fields(self)}
        moe_names = {f.name for f in dataclasses.fields(MoEConfig)}
        check_names("model", overrides, own | moe_names)
        moe = {k: overrides.pop(k) for k in list(overrides) if k in moe_names}
        if moe:
            moe["layers"] = tuple(moe.get("layers", self.moe.layers))
            base = overrides.get("moe", self.moe)
            setting = {f.name: moe[f.name] for f in dataclasses.fields(RoutingSetting) if f.name in moe}
            single = {layer: dataclasses.replace(own, **setting) for layer, own in base.layer_routing.items()}
            overrides["moe"] = dataclasses.replace(base, **{"layer_routing": single, **moe})
        return dataclasses.replace(self, **overrides)

    @classmethod
    def from_reference(cls, reference: Mapping[str, Any], image_size: int | tuple[int, int] | None = None) -> Self:
        """Translates the reference's own model config (a dict). See `visionmoe.reference_config`."""
        from visionmoe.reference_config import translate

        return from_dict(cls, translate(reference, image_size))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types (tuples become lists, integer keys strings)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Builds dataclass `cls` from plain JSON types; unknown options and wrong types are ValueErrors."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or cls.__name__} must be a table of options, got {data!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    check_names(where or cls.__name__, data, names)
    try:
        return cls(**{k: _typed(hints[k], v, f"{where}.{k}" if where else k) for k, v in data.items()})
    except TypeError as error:
        raise ValueError(f"{where or cls.__name__}: {error}") from None


def check_names(what: str, given: Any, allowed: Any) -> None:
    """Raises ValueError naming the first of `given` that is not in `allowed`, with the nearest allowed name."""
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), list(allowed), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(allowed))}"
            raise ValueError(f"unknown option {name!r} for {what}; {hint}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to the annotated type `hint`, or raises ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tables = [option for option in args if dataclasses.is_dataclass(option)]
        if len(tables) == 1 and isinstance(value, Mapping):  # its own error names the option that is wrong
            return _typed(tables[0], value, where)
        for option in args:
            try:
                return _typed(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) == len(value):
            return tuple(_typed(h, v, where) for h, v in zip(inner, value, strict=True))
    elif origin is list and isinstance(value, (list, tuple)):
        return [_typed(args[0], v, where) for v in value]
    elif origin is dict and isinstance(value, Mapping):
        return {_key(args[0], k): _typed(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    allowed = getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
    raise ValueError(f"{where} must be {allowed}, got {value!r}")


def _key(hint: type, key: Any) -> Any:
    return int(key) if hint is int else key


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _at_least(config: Any, lowest: float, *names: str) -> None:
    for name in names:
        if not lowest <= getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be >= {lowest} and finite, got {getattr(config, name)}")


def _one_of(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


def _rate(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be >= 0 and < 1, got {getattr(config, name)}")
