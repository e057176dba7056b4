"""Translation of the model configs of the JAX reference (google-research/vmoe) to `ModelConfig`."""

from collections.abc import Mapping
from typing import Any

from visionmoe.config import check_names

# Options that only say how the reference computes or starts, not what: accepted, without effect here.
_HINTS = {
    *("partition_spec", "einsum_precision", "precision", "bfloat16", "dtype", "compute_similarity_metrics"),
    *("deterministic", "head_kernel_zero_init"),
}
_MODEL_OPTIONS = "num_classes patch_size hidden_size representation_size head_bias_init"
_ENCODER_OPTIONS = "num_layers mlp_dim num_heads dropout_rate attention_dropout_rate attention_qk_norm"
_ROUTER_OPTIONS = (
    "num_selected_experts noise_std importance_loss_weight load_loss_weight gshard_loss_weight num_slots "
    "capacity_factor"
)
_DISPATCHER_OPTIONS = "capacity_factor batch_priority capacity_ceil_or_round capacity_multiple_of"
_MODEL_CLASSES = ("VisionTransformerMoe", "VisionTransformerMoeEnsemble")
_ROUTERS = {
    "NoisyTopExpertsPerItemRouter": "top_k",
    "NoisyTopExpertsPerItemEnsembleRouter": "top_k",
    "NoisyTopItemsPerExpertRouter": "expert_choice",
    "SoftRouter": "soft",
}
# The reference's own defaults, where they differ from ours (its routers weigh the losses with 1).
_ROUTER_DEFAULTS: dict[str, dict[str, Any]] = {
    "top_k": {"num_selected_experts": 1, "importance_loss_weight": 1.0, "load_loss_weight": 1.0},
    "expert_choice": {"num_selected_experts": 1},
    "soft": {"num_selected_experts": 1, "capacity_factor": 1.0, "noise_std": 0.0},
}


def translate(reference: Mapping[str, Any], image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """Returns the options of `ModelConfig` as a dict.

    image_size: pixels, where the reference's config, which has none, is not enough (learned positions).
    Raises ValueError for an option that is not known or that this package cannot honour.
    """
    model = dict(reference)
    name = str(model.pop("name", _MODEL_CLASSES[0])).rpartition(".")[2]
    if name not in _MODEL_CLASSES:
        raise ValueError(f"the reference's model must be one of {', '.join(_MODEL_CLASSES)}, got {name!r}")
    image_size = model.pop("image_size", image_size)
    if image_size is None:
        raise ValueError("the reference's config has no image_size: give image_size=PIXELS")
    model["num_classes"] = model.get("num_classes") or None  # 0 is no head, too
    encoder = _table("encoder", model.pop("encoder", {}))
    out = {
        "image_size": image_size,
        "pooling": model.get("classifier", "token"),
        **_take(model, _MODEL_OPTIONS),
        **_take(encoder, _ENCODER_OPTIONS),
        "pos_embed": _position(_table("position_emb", encoder.pop("position_emb", None))),
        "moe": _moe(
            _table("moe", encoder.pop("moe", None)),
            ensemble=name.endswith("Ensemble"),
            dropout_rate=encoder.get("dropout_rate", 0.0),
        ),
    }
    _finish("the reference's model", model, f"{_MODEL_OPTIONS} classifier")
    _finish("the reference's encoder", encoder, _ENCODER_OPTIONS)
    return out


def _position(position: dict[str, Any]) -> str:
    name = position.pop("name", "learned")
    _must_be(position, "temperature", 10_000)
    _finish("position_emb", position, "temperature h w")
    return name


def _moe(moe: dict[str, Any], *, ensemble: bool, dropout_rate: float) -> dict[str, Any]:
    if not moe:
        return {}
    router = _table("router", moe.pop("router", None))
    full_name = router.pop("name", "NoisyTopExpertsPerItemRouter")
    kind = _ROUTERS.get(str(full_name).rpartition(".")[2])
    if kind is None:
        raise ValueError(f"the reference's router must be one of {', '.join(_ROUTERS)}, got {full_name!r}")
    dispatcher = _table("dispatcher", router.pop("dispatcher", None))
    if not isinstance(moe.get("split_rngs", False), bool):  # or the names of what is split
        moe["split_rngs"] = "params" in moe["split_rngs"]
    if router.get("deterministic"):
        router["noise_std"] = 0.0
    _must_be(router, "deterministic", True)
    out = {
        "router": kind,
        **_ROUTER_DEFAULTS[kind],
        "expert_dropout_rate": moe.pop("dropout_rate", dropout_rate),
        **_take(moe, "num_experts layers split_rngs"),
        **({} if kind == "soft" else _take(moe, "group_size")),
        **_take(router, _ROUTER_OPTIONS),
        **_take(dispatcher, _DISPATCHER_OPTIONS),
    }
    if kind == "soft":  # slots come from the group: the reference rounds, without a multiple
        out |= {"capacity_ceil_or_round": "round", "capacity_multiple_of": None}
        out["capacity_factor"] = out["capacity_factor"] or 1.0
        out["group_size"] = moe.get("group_size") or "image"
    if kind == "expert_choice":
        out["num_selected_experts"] = 1
    if ensemble:
        if "ensemble_size" not in moe:
            raise ValueError("the reference's moe of an ensemble must say ensemble_size")
        out["ensemble_size"] = moe.pop("ensemble_size")
    _finish("the reference's moe", moe, "num_experts layers group_size split_rngs")
    _finish("the reference's router", router, _ROUTER_OPTIONS)
    _finish("the reference's dispatcher", dispatcher, f"name {_DISPATCHER_OPTIONS}")
    return out


def _table(what: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"the reference's {what} must be a table of options, got {value!r}")
    return dict(value or {})


def _take(options: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split() if name in options}


def _must_be(options: dict[str, Any], name: str, value: Any) -> None:
    if options.get(name, value) != value:
        raise ValueError(f"{name} must be {value} (the only value that is supported), got {options[name]!r}")


def _finish(what: str, options: dict[str, Any], known: str) -> None:
    check_names(what, options, {*known.split(), *_HINTS})
