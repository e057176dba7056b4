"""`visionmoe sweep`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visionmoe.analysis.compute_per_image import CAPACITY, draw_compute_per_image
from visionmoe.cli.options import Sweep
from visionmoe.cli.shared import evaluation_images, load_model, output_folder, progress
from visionmoe.config import RoutingSetting, to_dict
from visionmoe.data.loader import EvalLoader
from visionmoe.distributed.world import current, from_first
from visionmoe.evaluate.adaptive import (
    DensePoint,
    LayerSettings,
    SweepPoint,
    check_sweep,
    layer_settings,
    most_selected_experts,
    pareto_frontier,
    restored_routing,
    routing_grid,
    set_routing,
    sweep,
)
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.store import ResultStore, StoredEvaluator, context_of, plain, stored_timing
from visionmoe.files import finite, sha256, write_json
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Dense:
    """The dense model, the same images at its size, and the first batch of them."""

    model: VisionTransformer
    loader: EvalLoader
    first: Tensor


def run(options: Sweep) -> None:
    from visionmoe.analysis import figures  # before the work: matplotlib may be missing

    out = output_folder(options.out)
    model = load_model(options.path, options.config, options.device)
    settings, layers = grid(options, model)
    loader = evaluation_images(options, model)
    dense = None if options.dense is None else open_dense(options, loader)
    check_batches(model, loader, settings, layers)
    first = first_batch(loader)
    store = ResultStore(out)
    context = context_of(model, loader, autocast=options.bf16)
    dense_context = None if dense is None else context_of(dense.model, dense.loader, autocast=options.bf16)
    say_others(store, [c for c in (context, dense_context) if c is not None])
    points = evaluate_points(options, model, loader, len(first), settings, layers, store, context)
    dense_point = None
    if dense is not None and dense_context is not None:
        dense_point = evaluate_dense(options, dense, store, dense_context)
    points, dense_point, timing = with_times(options, model, first, points, layers, dense, dense_point, store, context)
    per_image = compute_per_image(options, model, loader, store, context)
    if not current().is_first:
        return
    figures.accuracy_against_compute(out / "accuracy_vs_compute.png", points, dense=dense_point)
    figures.accuracy_against_time(out / "accuracy_vs_time.png", points, dense=dense_point)
    frontier = pareto_frontier(points)
    write_json(
        out / "results.json",
        finite(
            {
                "command": "sweep",
                "model": options.path,
                "data": loader.config.source,
                "split": loader.config.eval_split,
                "batch_size": loader.config.eval_batch_size,
                "num_images": loader.num_images,
                "own_routing": {str(layer): to_dict(s) for layer, s in layer_settings(model).items()},
                "layers": sorted(layers or model.moe_layers),
                "points": [described(point, best) for point, best in zip(points, frontier, strict=True)],
                "pareto_frontier": sorted(
                    (described(point, True) for point, best in zip(points, frontier, strict=True) if best),
                    key=lambda point: point["flops"],
                ),
                "dense": None if dense_point is None else {"model": options.dense, **described(dense_point)},
                "timing": timing,
                "per_image_compute": per_image,
                "broken_images": loader.broken,
            }
        ),
    )
    for line in table(points, dense_point):
        print(line)
    print(f"everything: {out / 'results.json'}, pictures: {out}/accuracy_vs_compute.png, accuracy_vs_time.png, "
          "per_image_compute.png")  # fmt: skip


def grid(options: Sweep, model: VisionTransformer) -> tuple[tuple[RoutingSetting, ...], tuple[int, ...] | None]:
    """The settings to try, and the layers that get them (None: all); ValueError before any work is done."""
    orders = {"vanilla": (False,), "batch-priority": (True,), "both": (False, True)}[options.order]
    if model.config.moe.router == "expert_choice":  # experts choose: there is no order of tokens
        orders = (False,)
    experts = options.num_selected_experts
    if not experts:
        check_sweep(model)
        experts = (most_selected_experts(model),)
    settings = tuple(dict.fromkeys(routing_grid(experts, options.capacity_factors, orders)))
    if not settings:
        raise ValueError("capacity_factors must name at least one factor")
    layers = options.layers or None
    check_sweep(model, settings, layers)
    return settings, layers


def check_batches(
    model: VisionTransformer,
    loader: EvalLoader,
    settings: Sequence[RoutingSetting],
    layers: tuple[int, ...] | None,
) -> None:
    """ValueError where a capacity rounds to no place in a whole batch or in the last one, before any work is done."""
    size = min(loader.config.eval_batch_size, loader.num_images)
    of_images = RoutingSetting(most_selected_experts(model), CAPACITY, True)
    for batch_size in {size, loader.num_images % size or size}:
        check_sweep(model, settings, layers, batch_size)
        check_sweep(model, [of_images], None, batch_size)


def say_others(store: ResultStore, contexts: Sequence[dict[str, Any]]) -> None:
    """One line where the folder holds what is not of these models and images."""
    own = {(context["model"], context["data"]) for context in contexts}
    others = len(store) - sum(store.count({"model": model, "data": data}) for model, data in own)
    if others:
        print(f"{store.path} also holds {others} results of other models or images; they are left alone")


def first_batch(loader: EvalLoader) -> Tensor:
    """Images (B, C, H, W) of the first batch."""
    for images, _, _ in loader:
        return images
    raise ValueError("the data has no images")


def open_dense(options: Sweep, loader: EvalLoader) -> Dense:
    """The model to compare with, on the same images. ValueError for one with experts or too few classes."""
    assert options.dense is not None
    model = load_model(options.dense, options.dense_config, options.device)
    config = model.config
    if model.moe_layers:
        raise ValueError(f"--dense must be a model without experts, {options.dense} has some in {model.moe_layers}")
    if config.num_classes is None or config.num_classes < loader.num_classes:
        raise ValueError(f"--dense has {config.num_classes} classes, {loader.config.source} has {loader.num_classes}")
    data = dataclasses.replace(loader.config.at_size(config.image_size), in_channels=config.in_channels)
    own = EvalLoader(data, source=loader.source)
    return Dense(model, own, first_batch(own))


def evaluate_points(
    options: Sweep,
    model: VisionTransformer,
    loader: EvalLoader,
    batch_size: int,
    settings: Sequence[RoutingSetting],
    layers: tuple[int, ...] | None,
    store: ResultStore,
    context: dict[str, Any],
) -> list[SweepPoint]:
    """Every setting on all images; those in the store are not evaluated again."""
    with progress("sweeping", len(settings) * loader.num_images) as advance:
        evaluator = StoredEvaluator(
            ClassificationEvaluator(loader, autocast=options.bf16, on_batch=advance),
            store,
            context,
            on_reuse=lambda: advance(loader.num_images),
        )
        points = sweep(model, evaluator, settings, layers=layers, batch_size=batch_size)
    if evaluator.reused:
        print(f"{evaluator.reused} of {len(settings)} settings were evaluated before")
    return points


def evaluate_dense(options: Sweep, dense: Dense, store: ResultStore, context: dict[str, Any]) -> DensePoint:
    with progress("dense model", dense.loader.num_images) as advance:
        classify = ClassificationEvaluator(dense.loader, autocast=options.bf16, on_batch=advance)
        result = StoredEvaluator(classify, store, context)(dense.model)
    return DensePoint(result["top1"], result["loss"], count_flops(dense.model), result["model_images_per_second"])


def compute_per_image(
    options: Sweep, model: VisionTransformer, loader: EvalLoader, store: ResultStore, context: dict[str, Any]
) -> dict[str, Any]:
    """The picture and its numbers, which are kept as an evaluation is; not made again while the picture is there."""
    path = options.out / "per_image_compute.png"
    key = context | {"measure": "compute per image", "capacity": CAPACITY, "routing": plain(layer_settings(model))}
    found = store.get(key)
    if from_first(found is None or not path.is_file() or found["sha256"] != sha256(path)):
        with progress("what each image gets", loader.num_images) as advance:
            numbers = draw_compute_per_image(
                path, model, loader, loader.class_names, autocast=options.bf16, on_batch=advance
            )
        if current().is_first:
            store.put(key, {"sha256": sha256(path), "numbers": numbers})
        found = store.get(key)
    return found["numbers"]


def with_times(
    options: Sweep,
    model: VisionTransformer,
    first: Tensor,
    points: Sequence[SweepPoint],
    layers: tuple[int, ...] | None,
    dense: Dense | None,
    dense_point: DensePoint | None,
    store: ResultStore,
    context: dict[str, Any],
) -> tuple[list[SweepPoint], DensePoint | None, dict[str, Any]]:
    """The points with speeds that were measured in turns, and how."""
    others = [] if dense is None else [(dense.model, dense.first)]
    with progress("timing", (len(points) + len(others)) * 8) as advance:
        seconds, how = stored_timing(
            store, context, model, first, [settings_of(model, point, layers) for point in points],
            others=others, autocast=options.bf16, on_run=lambda: advance(1),
        )  # fmt: skip
    speeds = [how["batch_size"] / own for own in seconds]
    timed = [dataclasses.replace(p, images_per_second=s) for p, s in zip(points, speeds, strict=False)]
    if dense is not None and dense_point is not None:
        dense_point = dataclasses.replace(dense_point, images_per_second=speeds[-1])
    return timed, dense_point, how


def settings_of(model: VisionTransformer, point: SweepPoint, layers: tuple[int, ...] | None) -> LayerSettings:
    """What every layer does at a point of the sweep."""
    with restored_routing(model):
        setting = RoutingSetting(point.num_selected_experts, point.capacity_factor, point.batch_priority)
        set_routing(model, setting, layers)
        return layer_settings(model)


def described(point: SweepPoint | DensePoint, on_frontier: bool | None = None) -> dict[str, Any]:
    """A point as results.json has it. A loss that is not finite is null there, and finite false."""
    extra = {} if on_frontier is None else {"on_pareto_frontier": on_frontier}
    extra |= {"finite": math.isfinite(point.loss)}
    return {**dataclasses.asdict(point), "milliseconds_per_image": 1000 / point.images_per_second, **extra}


def table(points: Sequence[SweepPoint], dense: DensePoint | None = None) -> list[str]:
    """One line per setting."""
    lines = ["K  order           capacity  top-1   loss    MFLOP/image  dropped  images/s"]
    for p in points:
        order = "batch-priority" if p.batch_priority else "vanilla"
        lines.append(
            f"{p.num_selected_experts}  {order:<14}  {p.capacity_factor:8.2f}  {p.top1:6.2%}  {p.loss:.4f}  "
            f"{p.flops / 1e6:11.2f}  {p.dropped:7.1%}  {p.images_per_second:8.0f}"
        )
    if dense is not None:
        lines.append(
            f"   {'dense model':<14}  {'':8}  {dense.top1:6.2%}  {dense.loss:.4f}  {dense.flops / 1e6:11.2f}  "
            f"{'':7}  {dense.images_per_second:8.0f}"
        )
    return lines
