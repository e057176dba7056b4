"""The model sizes of the paper (arXiv 2106.05974, appendix B) and the names of their combinations."""

import difflib

from visionmoe.config import ModelConfig, MoEConfig

# size: (layers, D, F, heads)
SIZES = {
    "s": (8, 512, 2048, 8),
    "b": (12, 768, 3072, 12),
    "l": (24, 1024, 4096, 16),
    "h": (32, 1280, 5120, 16),
    "15b": (48, 1408, 6400, 16),
}
PATCHES = (32, 16, 14)
EXPERTS = (8, 16, 32)
PLACEMENTS = ("every2", "last2", "last5")
EXAMPLES = ("vit_b16", "vmoe_b16_e8_every2", "eee_s32_e8_m2_last2", "softmoe_s16_e32_last2", "vmoe_15b")


def moe_layers(placement: str, num_layers: int) -> tuple[int, ...]:
    """Blocks with experts, counted from 0: "every2" is 1, 3, 5, ..., "lastN" the last N of those."""
    every_second = tuple(range(1, num_layers, 2))
    return every_second if placement == "every2" else every_second[-int(placement.removeprefix("last")) :]


def list_models() -> list[str]:
    """All names that `get_config` knows."""
    return list(_table())


def get_config(name: str) -> ModelConfig:
    """The config of a named model: vit_b16, vmoe_b16_e8_every2, vmoe_h14_e32_last5, vmoe_15b, eee_s32_e8_m2_last2, ...

    Image size 224, 1000 classes (vmoe_15b: 29,593), class token. ValueError with the nearest names otherwise.
    """
    table = _table()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"near ones: {', '.join(near)}" if near else f"names are like {', '.join(EXAMPLES)}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return table[name]


def _table() -> dict[str, ModelConfig]:
    table = {}
    for size in ("s", "b", "l", "h"):
        for patch in PATCHES:
            dense = _vit(size, patch)
            table[f"vit_{size}{patch}"] = dense
            for placement in PLACEMENTS:
                layers = moe_layers(placement, dense.num_layers)
                for experts in EXPERTS:
                    table[f"vmoe_{size}{patch}_e{experts}_{placement}"] = dense.replace(
                        moe=MoEConfig(num_experts=experts, layers=layers)
                    )
                table[f"eee_{size}{patch}_e8_m2_{placement}"] = dense.replace(
                    moe=MoEConfig(num_experts=8, layers=layers, ensemble_size=2, num_selected_experts=1)
                )
                table[f"softmoe_{size}{patch}_e32_{placement}"] = dense.replace(
                    pooling="gap",
                    moe=MoEConfig(num_experts=32, layers=layers, router="soft", capacity_factor=1.0,
                                  num_selected_experts=1, noise_std=0.0, capacity_ceil_or_round="round",
                                  capacity_multiple_of=None),
                )  # fmt: skip
    largest = _vit("15b", 14)
    layers = moe_layers("every2", largest.num_layers)
    table["vmoe_15b"] = largest.replace(num_classes=29_593, moe=MoEConfig(num_experts=32, layers=layers))
    return table


def _vit(size: str, patch: int) -> ModelConfig:
    layers, hidden_size, mlp_dim, heads = SIZES[size]
    return ModelConfig(patch_size=patch, num_layers=layers, hidden_size=hidden_size, mlp_dim=mlp_dim, num_heads=heads)
