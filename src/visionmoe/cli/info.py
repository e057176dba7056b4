"""`visionmoe info`: what a model is, without its weights in memory."""

from pathlib import Path
from typing import Any

import torch

from visionmoe.checkpoint.registry import PUBLISHED
from visionmoe.checkpoint.sources import resolve_config
from visionmoe.cli.options import Info
from visionmoe.cli.shared import model_folder, output_folder
from visionmoe.config import ModelConfig, to_dict
from visionmoe.files import write_json
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer
from visionmoe.variants import get_config


def run(options: Info) -> None:
    out = output_folder(options.out)
    config = find_config(options.model)
    overrides = {"image_size": options.image_size, "num_classes": options.num_classes}
    config = config.replace(**{name: value for name, value in overrides.items() if value is not None})
    facts = describe(config)
    write_json(out / "results.json", {"command": "info", "model": options.model, **facts, "config": to_dict(config)})
    print(f"{options.model}: {'V-MoE' if config.moe.layers else 'ViT'}")
    for line in lines(config, facts):
        print(line)
    print(f"everything: {out / 'results.json'}")


def find_config(model: str) -> ModelConfig:
    """The config of a folder, a config.json, a published checkpoint or a model name, in this order."""
    path = Path(model_folder(model))
    if path.exists():
        return resolve_config(path)
    if path.suffix == ".json" or "/" in model:
        raise FileNotFoundError(f"there is no {model}")
    return PUBLISHED[model].config if model in PUBLISHED else get_config(model)


def describe(config: ModelConfig) -> dict[str, Any]:
    """Parameters, those that one token meets, and operations per image."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = {
        layer: sum(p.numel() for p in model.get_submodule(f"blocks.{layer}.mlp.experts").parameters())
        for layer in model.moe_layers
    }
    active = total
    if config.moe.router == "top_k":  # elsewhere a token does not choose a number of experts
        moe = config.moe
        seen = {layer: moe.routing(layer).num_selected_experts * moe.ensemble_size for layer in experts}
        active -= sum(size * (moe.num_experts - seen[layer]) // moe.num_experts for layer, size in experts.items())
    return {
        "parameters": total,
        "parameters_per_token": active,
        "parameters_of_experts": sum(experts.values()),
        "flops_per_image": count_flops(model),
        "tokens_per_image": config.num_tokens,
    }


def lines(config: ModelConfig, facts: dict[str, Any]) -> list[str]:
    moe = config.moe
    height, width = config.image_hw
    out = [
        f"  parameters       {facts['parameters']:,}",
        f"  operations       {facts['flops_per_image'] / 1e9:.3f} GFLOP per image (a multiply-add counts as two)",
        f"  images           {height} x {width} x {config.in_channels}, patches {config.patch_hw[0]} x "
        f"{config.patch_hw[1]}, {facts['tokens_per_image']} tokens",
        f"  blocks           {config.num_layers}, D {config.hidden_size}, F {config.mlp_dim}, "
        f"{config.num_heads} heads, pooling {config.pooling}",
        f"  classes          {config.num_classes}",
    ]
    if not moe.layers:
        return out
    out.insert(1, f"  per token        {facts['parameters_per_token']:,} parameters")
    others = facts["parameters"] - facts["parameters_of_experts"]
    size, without = 2e-9 * facts["parameters"], 2e-9 * others
    out.insert(2, f"  in bfloat16      {size:.2f} GB, {without:.2f} GB without the experts")
    out.append(f"  experts          {moe.num_experts} in blocks {', '.join(map(str, sorted(moe.layers)))}")
    if moe.router != "top_k":
        return [*out, f"  routing          {moe.router}, capacity factor {moe.capacity_factor:g}"]
    for name, layer in (("routing", None), *((f"  block {layer}", layer) for layer in sorted(moe.layer_routing))):
        setting = moe.routing(layer)
        order = "batch-priority" if setting.batch_priority else "vanilla"
        out.append(
            f"  {name:<16} K {setting.num_selected_experts}, capacity factor {setting.capacity_factor:g}, {order}"
        )
    group = moe.group_size if isinstance(moe.group_size, str) else f"{moe.group_size} tokens"
    out.append(f"  routing group    {group}" + (f", {moe.ensemble_size} members" if moe.ensemble_size > 1 else ""))
    return out
