"""All pictures of an analysis, from its statistics, its ablations and a batch of photographs to files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionmoe.analysis.collect import Statistics
from visionmoe.analysis.gallery import crops_of
from visionmoe.analysis.record import kept_patches
from visionmoe.analysis.report import FACTORS, draw_masks, spread_examples
from visionmoe.config import RoutingSetting
from visionmoe.data.loader import EvalLoader
from visionmoe.data.sources import Slice
from visionmoe.data.transforms import to_uint8
from visionmoe.evaluate.adaptive import most_selected_experts
from visionmoe.model.vit import VisionTransformer

Batch = tuple[Tensor, Tensor, Tensor]
FRAMES = tuple(round(1.0 - 0.05 * number, 2) for number in range(19))  # capacity factors 1.0 ... 0.1
SHOWN = 6  # photographs


def draw_statistics(
    out: Path, model: VisionTransformer, statistics: Statistics, layers: Mapping[int, Mapping[str, Any]],
    class_names: Sequence[str],
) -> None:  # fmt: skip
    """Everything that the tables of the statistics show. layers: of `summary.summarise_layer`."""
    from visionmoe.analysis import figures

    def of_each(*keys: str) -> dict[int, Any]:
        found = {}
        for layer, summary in layers.items():
            found[layer] = summary
            for key in keys:
                found[layer] = found[layer][key]
        return found

    tables, config = statistics.layers, model.config
    patches = config.grid[0] * config.grid[1]
    shares = {n: np.array(share) for n, share in of_each("experts_by_class", "share").items()}
    orders = {n: (np.array(e["class_order"]), np.array(e["expert_order"]))
              for n, e in of_each("experts_by_class").items()}  # fmt: skip
    figures.experts_by_class(out / "experts_by_class.png", shares, class_names,
                             "Share of each class's tokens that ask for each expert, in %", orders)  # fmt: skip
    maps = {n: np.array(share)[-patches:].T.reshape(-1, *config.grid)
            for n, share in of_each("experts_by_position", "share").items()}  # fmt: skip
    figures.experts_by_position(out / "experts_by_position.png", maps,
                                "Share of the tokens at each place that ask for each expert")  # fmt: skip
    figures.combine_weights(out / "combine_weights.png", {n: t.weights for n, t in tables.items()},
                            "The router's probabilities of the chosen experts")  # fmt: skip
    figures.expert_load(out / "expert_load.png", {n: t.asked.sum(0) for n, t in tables.items()},
                        {n: t.kept.sum(0) for n, t in tables.items()}, "Load of the experts")  # fmt: skip
    figures.entropies(out / "entropy.png", {n: t.entropies for n, t in tables.items()},
                      next(iter(layers.values()))["entropy_bits"]["highest"], "Entropy of the router")  # fmt: skip
    figures.mutual_information(
        out / "mutual_information.png",
        {kind: of_each("information", kind, "first") for kind in ("class", "position")},
        "What a token's expert tells about its class and its place",
    )
    figures.position_maps(
        out / "entropy_by_position.png",
        {
            name: [(n, np.array(e[key])[-patches:].reshape(config.grid)) for n, e in of_each("entropy_bits").items()]
            for name, key in (("entropy, bits", "by_position"), ("share processed", "served_by_position"))
        },
        "Where the router is undecided, and what is processed",
        shares=("share processed",),
    )


def draw_galleries(
    out: Path,
    model: VisionTransformer,
    statistics: Statistics,
    loader: EvalLoader,
    on_layer: Callable[[], None] = lambda: None,
) -> None:
    """gallery_block<i>.png of every sparse layer; on_layer is called after each."""
    from visionmoe.analysis import figures

    config = model.config
    front = config.num_tokens - config.grid[0] * config.grid[1]
    for layer, table in statistics.layers.items():
        patches = table.best_token - front
        crops = crops_of(
            loader.source,
            loader.config,
            config.patch_hw,
            table.best_weight,
            table.best_image,
            patches,
            table.best_label,
        )
        load = table.asked.sum(0) / max(1, table.asked.sum())
        labels = [f"expert {expert}\n{share:.1%} of requests" for expert, share in enumerate(load)]
        title = f"Block {layer}: the patches that each expert likes most"
        figures.gallery(out / f"gallery_block{layer}.png", crops, labels, title)
        on_layer()


def spread_batch(loader: EvalLoader) -> Batch:
    """One batch of images from everywhere in the data, in an order drawn once: sources are often sorted by class."""
    count = min(len(loader.source), loader.config.eval_batch_size)
    chosen = np.unique(np.linspace(0, len(loader.source) - 1, count).round().astype(np.int64))
    chosen = np.random.default_rng(0).permutation(chosen)
    config = dataclasses.replace(loader.config, workers=0, max_broken=1.0)  # of the whole data, not of these few
    return next(iter(EvalLoader(config, source=Slice(loader.source, chosen))))


def orders_of(model: VisionTransformer) -> dict[str, bool]:
    """The orders of tokens that are drawn, by name: whether they are batch-priority."""
    if model.config.moe.router == "expert_choice":  # experts choose; there is no order of tokens
        return {"expert choice": False}
    return {"batch-priority routing": True, "vanilla routing": False}


def draw_capacities(
    out: Path,
    model: VisionTransformer,
    loader: EvalLoader,
    *,
    autocast: bool = False,
    on_frame: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Photographs at falling capacity, as pictures and as an animation; the shares of kept patches by order.

    on_frame: called after each of FRAMES, in every order.
    """
    from visionmoe.analysis import figures

    batch = spread_batch(loader)
    images, labels, _ = batch
    present = torch.unique(labels).tolist()
    classes = [present[i] for i in np.unique(np.linspace(0, len(present) - 1, SHOWN).round().astype(int))]
    layer, k = model.moe_layers[-1], most_selected_experts(model)
    rows = spread_examples(labels, classes)
    kept, shares = {}, {}
    for name, priority in orders_of(model).items():
        file = "kept_patches_vanilla.png" if name.startswith("vanilla") else "kept_patches.png"
        settings = [RoutingSetting(k, factor, priority) for factor in FRAMES]
        masks = kept_patches(model, images, settings, autocast=autocast, on_setting=on_frame)[layer]
        by_factor = {factor: mask for factor, mask in zip(FRAMES, masks, strict=True) if factor in FACTORS}
        draw_masks(out / file, batch, by_factor, loader.class_names, classes, f"block {layer}, K={k}, {name}")
        kept[name] = [mask[rows].numpy() for mask in masks]
        shares[name] = [mask.float().mean().item() for mask in masks]
    pictures = to_uint8(images[rows]).permute(0, 2, 3, 1).cpu().numpy()  # (B, C, H, W) -> (B, H, W, C)
    figures.kept_patches_animation(out / "kept_patches.gif", pictures, kept, shares, FRAMES)
    return {
        name: {str(factor): share for factor, share in zip(FRAMES, line, strict=True)} for name, line in shares.items()
    }
