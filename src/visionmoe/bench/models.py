"""Whole models against the dense ones of the same size: images per second, training steps, one image's latency."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from visionmoe.bench.build import (
    ModelSize,
    build_model,
    check_memory,
    config_of,
    needed_bytes,
    num_parameters,
    settle_gates,
    size_text,
    widen,
    widened,
)
from visionmoe.bench.measure import DTYPES, Case, Row, Setup, Target, Times, in_turns
from visionmoe.config import ModelConfig
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.step import StepSettings, train_step

SIZES = (
    ModelSize("s32", 8, 8, 3.0),
    ModelSize("b32", 8, 8, 4.0),
    ModelSize("b16", 8, 8, 12.0),
    ModelSize("l16", 2, 1, 8.0),
)
QUICK_SIZES = (ModelSize("s16", 2, 2, 2.0, quick=True),)
VARIANTS = ("every2 e8", "last2 e8", "every2 e32", "last2 e32")
QUICK_VARIANTS = ("every2 e8",)
AIMED = ("b16", "every2 e8")
INFERENCE_LIMITS = {"bfloat16": 15.0, "float32": 8.0}
HALF_LIMIT = 20.0  # of bfloat16 with batch-priority routing at C 0.5
TRAINING_LIMITS = {"bfloat16": 4.0, "float32": 1.8}
LATENCY_LIMIT = 1.15
BATCHES = 8  # of different images
ADAM_TRAFFIC = 9  # times that a training step moves a parameter: two reads, gradient, update of it and two moments


def cases(setup: Setup) -> list[Case]:
    sizes, variants = (QUICK_SIZES, QUICK_VARIANTS) if setup.quick else (SIZES, VARIANTS)
    size = "s16" if setup.quick else "s32"
    found = [_latency_case(setup, size, v, dtype) for v in variants if v.endswith("e8") for dtype in DTYPES]
    # what has a target first
    plans = [(s, v) for s in sizes for v in variants]
    plans.sort(key=lambda plan: (plan[0].name, plan[1]) != AIMED)
    for model, variant in plans:
        for dtype in DTYPES:
            for training in (False, True):
                found.append(_speed_case(setup, model, variant, dtype, training))
    return found


def _speed_case(setup: Setup, size: ModelSize, variant: str, dtype: str, training: bool) -> Case:
    work = "training step" if training else "inference"
    if (size.name, variant) == AIMED:  # more rounds for what has a target
        size = replace(size, seconds=2 * size.seconds)
    settings = asdict(size) | {"variant": variant, "dtype": dtype, "work": work}

    def measure() -> list[Row]:
        dense, sparse = (config_of(size.name, v, quick=size.quick) for v in ("dense", variant))
        batch = size.train_batch if training else size.batch
        check_memory(sum(needed_bytes(c, dtype, batch, training=training) for c in (dense, sparse)), setup.device)
        rows = training_rows if training else inference_rows
        return rows(setup, size, {"dense": dense, variant: sparse}, dtype)

    return Case("models", f"{size.text} {variant} {work} {dtype}", settings, measure)


def inference_rows(setup: Setup, size: ModelSize, configs: dict[str, ModelConfig], dtype: str) -> list[Row]:
    """Images per second of forward passes without gradients, weights in `dtype`; the aimed-at model also at C 0.5."""
    batch = size.batch
    models = {name: build_model(config, DTYPES[dtype], setup.device) for name, config in configs.items()}
    images = random_images(configs["dense"], BATCHES * batch, DTYPES[dtype], setup.device).split(batch)
    calls: dict[str, Callable[[], Any]] = {name: _forward(model, images) for name, model in models.items()}
    flops = {name: batch * count_flops(model, batch_size=batch) for name, model in models.items()}
    sparse = settle_gates(models[_sparse(configs)], images[0])
    usual = sparse.config.moe.routing()
    half = f"{_sparse(configs)}, batch-priority at C 0.5"
    if (size.name, _sparse(configs)) == AIMED or setup.quick:
        forward_half = _forward(sparse, images)

        def at_half() -> None:
            sparse.set_routing(capacity_factor=0.5, batch_priority=True)
            forward_half()
            sparse.set_routing(capacity_factor=usual.capacity_factor, batch_priority=usual.batch_priority)

        calls[half] = at_half
        sparse.set_routing(capacity_factor=0.5)
        flops[half] = batch * count_flops(sparse, batch_size=batch)
        sparse.set_routing(capacity_factor=usual.capacity_factor)
    with torch.no_grad():
        times = in_turns(calls, setup.effort(9, size.seconds), setup.device)
    rows = []
    for name in calls:
        target = None
        if (size.name, name) == AIMED:
            target = setup.target(INFERENCE_LIMITS[dtype], at_least=True)
        elif name == half and dtype == "bfloat16":
            target = setup.target(HALF_LIMIT, at_least=True)
        config = configs.get(name, sparse.config)
        moved = DTYPES[dtype].itemsize * num_parameters(config)
        rows.append(_speed_row(size, name, "inference", dtype, batch, times, target, flops[name], moved))
    return rows


def training_rows(setup: Setup, size: ModelSize, configs: dict[str, ModelConfig], dtype: str) -> list[Row]:
    """Images per second of whole training steps as a run makes them: AdamW, float32 weights, bfloat16 by autocast."""
    batch = size.train_batch
    models = {n: build_model(config, torch.float32, setup.device).train() for n, config in configs.items()}
    images = random_images(configs["dense"], batch, torch.float32, setup.device)
    calls = {name: training_call(model, images, dtype) for name, model in models.items()}
    times = in_turns(calls, setup.effort(5, 1.5 * size.seconds), setup.device)
    rows = []
    for name, model in models.items():
        aimed = (size.name, name) == AIMED
        target = setup.target(TRAINING_LIMITS[dtype], at_least=True) if aimed else None
        flops = 3.0 * batch * count_flops(model, batch_size=batch)
        moved = 4 * ADAM_TRAFFIC * num_parameters(configs[name])
        how = "training step (AdamW" + (", autocast)" if dtype == "bfloat16" else ")")
        rows.append(_speed_row(size, name, how, dtype, batch, times, target, flops, moved))
    return rows


def _latency_case(setup: Setup, size: str, variant: str, dtype: str) -> Case:
    settings = {"size": size, "variant": variant, "dtype": dtype, "quick": setup.quick}
    effort = setup.effort(60, 8.0)

    def measure() -> list[Row]:
        sparse, dense = (config_of(size, v, quick=setup.quick) for v in (variant, "dense"))
        models = {
            name: build_model(config, DTYPES[dtype], setup.device)
            for name, config in (("sparse", sparse), ("dense", dense))
        }
        flops = count_flops(models["sparse"], batch_size=1)
        widths = widened(sparse, flops, count_flops(models["dense"]))
        widen(models["dense"], widths)
        images = random_images(dense, BATCHES, DTYPES[dtype], setup.device)
        settle_gates(models["sparse"], images)
        calls = {name: _forward(model, images.split(1)) for name, model in models.items()}
        with torch.no_grad():
            times = in_turns(calls, effort, setup.device)
        text = f"V-MoE-{size_text(size, quick=setup.quick)} {variant}"
        return [
            Row(
                what=f"one image, {text}: latency over a dense ViT of equal FLOPs (MLPs of the sparse places wider)",
                value=times.ratio("sparse", "dense"),
                unit="ratio",
                dtype=dtype,
                ms=times.ms("sparse"),
                reference_ms=times.ms("dense"),
                target=setup.target(LATENCY_LIMIT),
                flops=flops,
                bytes=DTYPES[dtype].itemsize * num_parameters(sparse),
                rounds=times.rounds,
                details={"dense_mlp_width": next(iter(widths.values())), "dense_mlp_width_elsewhere": dense.mlp_dim},
            )
        ]

    return Case("models", f"latency {size} {variant} {dtype}", settings | asdict(effort), measure)


def _speed_row(
    size: ModelSize, variant: str, work: str, dtype: str, batch: int, times: Times, target: Target | None,
    flops: float, moved: float,
) -> Row:  # fmt: skip
    name = f"ViT-{size.text}" if variant == "dense" else f"V-MoE-{size.text} {variant}"
    return Row(
        what=f"{name}, {work}, batch {batch}",
        value=1e3 * batch / times.ms(variant),
        unit="images/s",
        dtype=dtype,
        ms=times.ms(variant),
        reference_ms=times.ms("dense"),
        target=target,
        flops=flops,
        bytes=moved,
        rounds=times.rounds,
        details={
            "size": size.text,
            "variant": variant,
            "work": work,
            "batch_size": batch,
            "time_over_dense": times.ratio(variant, "dense"),
        },
    )


def random_images(config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch, config.in_channels, *config.image_hw, generator=generator)
    return (pixels * 2 - 1).to(device, dtype)


def _forward(model: VisionTransformer, batches: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Calls take the batches one after the other, so that no two in a row route alike."""
    following = itertools.cycle(batches)
    return lambda: model(next(following))


def training_call(model: VisionTransformer, images: torch.Tensor, dtype: str) -> Callable[[], Any]:
    classes = model.config.num_classes
    assert classes is not None
    optimizer = create_optimizer(
        model.named_parameters(), name="adam", total_steps=1_000_000, learning_rate=1e-5, weight_decay=0.1
    )
    labels = torch.randint(classes, (len(images),), generator=torch.Generator().manual_seed(0)).to(images.device)
    precision = "bfloat16" if dtype == "bfloat16" else "float32"
    settings = StepSettings(create_loss("softmax"), classes, seed=0, precision=precision)  # type: ignore[arg-type]
    step = iter(range(1_000_000))
    return lambda: train_step(model, optimizer, images, labels, next(step), settings)


def _sparse(configs: dict[str, ModelConfig]) -> str:
    return next(name for name in configs if name != "dense")
