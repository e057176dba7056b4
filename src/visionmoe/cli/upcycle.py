"""`visionmoe upcycle`."""

import dataclasses
import logging
import time
from typing import Any

import torch
from torch import Tensor

from visionmoe.checkpoint.dense_sources import TIMM, open_dense, source_kind
from visionmoe.checkpoint.sources import HUB, Source
from visionmoe.checkpoint.upcycle import Upcycling, dense_outputs, differences, upcycled
from visionmoe.cli.options import Upcycle
from visionmoe.cli.shared import check_kept, model_folder, output_folder
from visionmoe.config import ModelConfig, to_dict
from visionmoe.data.config import DataConfig
from visionmoe.data.loader import EvalLoader
from visionmoe.files import write_json
from visionmoe.model.flops import count_flops

_SEED = 0  # of the random images


def run(options: Upcycle) -> None:
    upcycling = _upcycling(options)
    if options.images < 1:
        raise ValueError(f"images must be >= 1, got {options.images}")
    if options.split is not None and options.data is None:
        raise ValueError(f"--split {options.split} is a part of --data: give both")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2^63 - 1, got {options.seed}")
    path = options.path if options.path.startswith((TIMM, HUB)) else model_folder(options.path)
    check_kept(path, options.out)
    out = output_folder(options.out)
    started = time.perf_counter()
    source = open_dense(path, options.config, timm_model=options.timm_model)
    config = upcycling.sparse(source.config)  # before the work: its mistakes are cheap to find
    images = check_images(options, source.config)
    expected = dense_outputs(source, images)
    model = upcycled(source, upcycling)
    measured = differences(model, images, expected)
    model.save_pretrained(out)
    own = getattr(source, "original", None) is not None
    results = {
        "command": "upcycle",
        "source": options.path,
        "format": source_kind(source),
        "upcycling": to_dict(upcycling),
        "layers": list(config.moe.layers),
        "images": options.data or "random",
        "num_images": len(images),
        "compared_with": "the source's own implementation" if own else "the dense model",
        "differences": [dataclasses.asdict(difference) for difference in measured],
        "max_abs_output": expected.abs().max().item(),
        **_sizes(source, config, sum(p.numel() for p in model.parameters()), count_flops(model)),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(out / "results.json", results)
    for line in lines(results):
        print(line)
    print(f"model: {out}, everything: {out / 'results.json'}")


def check_images(options: Upcycle, config: ModelConfig) -> Tensor:
    """Images to compare on, (N, C, H, W) in [-1, 1]: the first of --data, or random ones."""
    if options.data is None:
        shape = (options.images, config.in_channels, *config.image_hw)
        return torch.rand(shape, generator=torch.Generator().manual_seed(_SEED)) * 2 - 1
    data = DataConfig(
        source=options.data,
        eval_split="test" if options.split is None else options.split,
        image_size=config.image_size,
        in_channels=config.in_channels,
        eval_batch_size=options.images,
    )
    return next(iter(EvalLoader(data)))[0]


def lines(results: dict[str, Any]) -> list[str]:
    out = [
        f"{results['format']} ViT, {results['parameters_dense']:,} parameters -> V-MoE, {results['parameters']:,} "
        f"({results['upcycling']['num_experts']} experts in blocks {', '.join(map(str, results['layers']))})"
    ]
    if results["normalization"] is not None:
        mean, std = results["normalization"]["mean"], results["normalization"]["std"]
        out.append(f"its images' mean {mean} and std {std} are folded into the patch embedding")
    for d in results["differences"]:
        out.append(
            f"capacity factor {d['capacity_factor']:g}: largest difference {d['max_abs_difference']:.2e} from "
            f"{results['compared_with']} on {results['num_images']} images ({results['images']}; outputs up to "
            f"{results['max_abs_output']:.3g}), {d['dropped']:.1%} of the requests dropped"
        )
    return out


def _upcycling(options: Upcycle) -> Upcycling:
    if options.normalize_weights and options.num_selected_experts == 1:
        logging.getLogger(__name__).warning(
            "with one expert per token and normalised weights every weight is 1: the routers learn from the auxiliary "
            "losses alone (--no-normalize-weights keeps their gradient)"
        )
    names = [f.name for f in dataclasses.fields(Upcycling) if f.name != "layers"]
    return Upcycling(layers=options.layers or None, **{name: getattr(options, name) for name in names})


def _sizes(source: Source, config: ModelConfig, parameters: int, flops: int) -> dict[str, Any]:
    """Parameters, what one image costs, and what was read from (or taken for granted about) the source."""
    from visionmoe.cli.info import describe

    dense = describe(source.config)
    normalization = getattr(source, "normalization", None)
    return {
        "parameters_dense": dense["parameters"],
        "parameters": parameters,
        "flops_per_image_dense": dense["flops_per_image"],
        "flops_per_image": flops,
        "normalization": None if normalization is None else to_dict(normalization),
        "model": to_dict(config),
    }
