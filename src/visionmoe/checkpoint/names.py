"""Names and layouts of parameters, the reference's and ours, as one table."""

from dataclasses import dataclass

from visionmoe.config import ModelConfig
from visionmoe.model.soft import slots_per_expert


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Axes are letters: D hidden, F MLP width, H heads, A size of a head, E experts, M ensemble members, N experts of a
    member, P slots, T tokens, R width before the head, K classes, h and w patch, C channels, 1 an axis of size 1.
    ours: our axes, those in brackets merged; reference: the same letters in the reference's order.
    part: (number, of): only this part of axis 0 of our tensor.
    """

    reference_name: str
    our_name: str
    reference: str
    ours: str
    part: tuple[int, int] = (0, 1)


def _dense(reference: str, ours: str, kernel: str) -> list[Rule]:
    inputs, outputs = kernel[0], kernel[1]
    return [
        Rule(f"{reference}/kernel", f"{ours}.weight", f"{inputs}{outputs}", f"{outputs}{inputs}"),
        Rule(f"{reference}/bias", f"{ours}.bias", outputs, outputs),
    ]


def _norm(reference: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{reference}/scale", f"{ours}.weight", "D", "D"),
        Rule(f"{reference}/bias", f"{ours}.bias", "D", "D"),
    ]


def _heads(reference: str, ours: str, part: tuple[int, int] = (0, 1)) -> list[Rule]:
    return [
        Rule(f"{reference}/kernel", f"{ours}.weight", "DHA", "(HA)D", part),
        Rule(f"{reference}/bias", f"{ours}.bias", "HA", "(HA)", part),
    ]


def _out(reference: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{reference}/kernel", f"{ours}.weight", "HAD", "D(HA)"),
        Rule(f"{reference}/bias", f"{ours}.bias", "D", "D"),
    ]


def _qk_norm(reference: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{reference}/query_ln/scale", f"{ours}.q_norm.weight", "A", "A"),
        Rule(f"{reference}/key_ln/scale", f"{ours}.k_norm.weight", "A", "A"),
    ]


# Parts of a model -> rules. "{i}" is the number of a block.
_BLOCK, _OURS = "Encoder/encoderblock_{i}", "blocks.{i}"
_ATTENTION, _MAP, _MAP_ATTENTION = f"{_BLOCK}/SelfAttention", "MapHead", "MapHead/MultiHeadDotProductAttention"
TABLE: dict[str, list[Rule]] = {
    "stem": [
        Rule("embedding/kernel", "patch_embed.proj.weight", "hwCD", "DChw"),
        Rule("embedding/bias", "patch_embed.proj.bias", "D", "D"),
    ],
    "class token": [Rule("cls", "cls_token", "11D", "11D")],
    "learned positions": [Rule("Encoder/posembed_input/pos_embedding", "pos_embed", "1TD", "1TD")],
    "block": [
        *_norm(f"{_BLOCK}/LayerNorm_0", f"{_OURS}.norm1"),
        *_heads(f"{_ATTENTION}/query", f"{_OURS}.attn.qkv", (0, 3)),
        *_heads(f"{_ATTENTION}/key", f"{_OURS}.attn.qkv", (1, 3)),
        *_heads(f"{_ATTENTION}/value", f"{_OURS}.attn.qkv", (2, 3)),
        *_out(f"{_ATTENTION}/out", f"{_OURS}.attn.proj"),
        *_norm(f"{_BLOCK}/LayerNorm_1", f"{_OURS}.norm2"),
    ],
    "q/k norm": _qk_norm(_ATTENTION, f"{_OURS}.attn"),
    "dense MLP": [
        *_dense(f"{_BLOCK}/Mlp/Dense_0", f"{_OURS}.mlp.fc1", "DF"),
        *_dense(f"{_BLOCK}/Mlp/Dense_1", f"{_OURS}.mlp.fc2", "FD"),
    ],
    "experts": [
        Rule(f"{_BLOCK}/Moe/Mlp/Dense_0/kernel", f"{_OURS}.mlp.experts.fc1.weight", "EDF", "EFD"),
        Rule(f"{_BLOCK}/Moe/Mlp/Dense_0/bias", f"{_OURS}.mlp.experts.fc1.bias", "EF", "EF"),
        Rule(f"{_BLOCK}/Moe/Mlp/Dense_1/kernel", f"{_OURS}.mlp.experts.fc2.weight", "EFD", "EDF"),
        Rule(f"{_BLOCK}/Moe/Mlp/Dense_1/bias", f"{_OURS}.mlp.experts.fc2.bias", "ED", "ED"),
    ],
    "router": [Rule(f"{_BLOCK}/Moe/Router/dense/kernel", f"{_OURS}.mlp.router.gate.weight", "DE", "ED")],
    "ensemble router": [Rule(f"{_BLOCK}/Moe/Router/dense/kernel", f"{_OURS}.mlp.router.gate.weight", "DMN", "(MN)D")],
    "soft router": [
        Rule(f"{_BLOCK}/Moe/Router/mu", f"{_OURS}.mlp.router.mu", "DEP", "EPD"),
        Rule(f"{_BLOCK}/Moe/Router/scale", f"{_OURS}.mlp.router.scale", "", ""),
    ],
    "norm": _norm("Encoder/encoder_norm", "norm"),
    "attention pooling": [
        Rule(f"{_MAP}/probe", "attn_pool.latent", "11D", "11D"),
        *_heads(f"{_MAP_ATTENTION}/query", "attn_pool.q"),
        *_heads(f"{_MAP_ATTENTION}/key", "attn_pool.kv", (0, 2)),
        *_heads(f"{_MAP_ATTENTION}/value", "attn_pool.kv", (1, 2)),
        *_out(f"{_MAP_ATTENTION}/out", "attn_pool.proj"),
        *_norm(f"{_MAP}/LayerNorm", "attn_pool.norm"),
        *_dense(f"{_MAP}/Mlp/Dense_0", "attn_pool.mlp.fc1", "DF"),
        *_dense(f"{_MAP}/Mlp/Dense_1", "attn_pool.mlp.fc2", "FD"),
    ],
    "pooling q/k norm": _qk_norm(_MAP_ATTENTION, "attn_pool"),
    "pre_logits": _dense("pre_logits", "pre_logits", "DR"),
    "head": _dense("head", "head", "DK"),
    "head after pre_logits": _dense("head", "head", "RK"),
}


def rules(config: ModelConfig) -> list[Rule]:
    """The lines of the table that a model has, with the numbers of its blocks."""
    mixed = config.moe.router if config.ensemble_size == 1 else "ensemble"
    router = {"soft": "soft router", "ensemble": "ensemble router"}.get(mixed, "router")
    whole = {
        "stem": True,
        "class token": config.pooling == "token",
        "learned positions": config.pos_embed == "learned",
        "norm": True,
        "attention pooling": config.pooling == "map",
        "pooling q/k norm": config.pooling == "map" and config.attention_qk_norm,
        "pre_logits": config.representation_size is not None,
        "head": config.num_classes is not None and config.representation_size is None,
        "head after pre_logits": config.num_classes is not None and config.representation_size is not None,
    }
    found = [rule for part, present in whole.items() if present for rule in TABLE[part]]
    for i in range(config.num_layers):
        sparse = i in config.moe.layers
        parts = ["block", *(["q/k norm"] if config.attention_qk_norm else [])]
        parts += ["experts", router] if sparse else ["dense MLP"]
        for rule in (rule for part in parts for rule in TABLE[part]):
            names = rule.reference_name.format(i=i), rule.our_name.format(i=i)
            found.append(Rule(*names, rule.reference, rule.ours, rule.part))
    return found


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of the axes by letter; those that a model does not have are 0."""
    moe, (height, width) = config.moe, config.patch_hw
    slots = 0
    if moe.layers and moe.router == "soft":
        slots = slots_per_expert(moe, config.num_tokens)
    return {
        "1": 1, "D": config.hidden_size, "F": config.mlp_dim, "H": config.num_heads,
        "A": config.hidden_size // config.num_heads, "E": moe.num_experts, "M": moe.ensemble_size,
        "N": moe.num_experts // moe.ensemble_size, "P": slots, "T": config.num_tokens, "h": height, "w": width,
        "C": config.in_channels, "R": config.representation_size or 0, "K": config.num_classes or 0,
    }  # fmt: skip
