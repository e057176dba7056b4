"""`visionmoe evaluate` and `visionmoe sweep`."""

import dataclasses
from typing import Any

from visionmoe.cli.options import Evaluate, Sweep
from visionmoe.cli.shared import evaluation_images, load_model, output_folder, progress
from visionmoe.config import to_dict
from visionmoe.evaluate.adaptive import SweepPoint, routing_grid, sweep
from visionmoe.evaluate.classify import ClassificationEvaluator, evaluate
from visionmoe.files import write_json
from visionmoe.model.flops import count_flops


def run(options: Evaluate | Sweep) -> None:
    if isinstance(options, Sweep):
        run_sweep(options)
    else:
        run_evaluate(options)


def run_evaluate(options: Evaluate) -> None:
    out = output_folder(options.out)
    model = load_model(options.path, options.config, options.device, options.image_size)
    changes = (options.num_selected_experts, options.capacity_factor, options.batch_priority)
    if any(change is not None for change in changes):
        model.set_routing(*changes)
    loader = evaluation_images(options, model)
    with progress("evaluating", loader.num_images) as advance:
        result = evaluate(model, loader, autocast=options.bf16, class_names=loader.class_names, on_batch=advance)
    write_json(
        out / "results.json",
        {
            "command": "evaluate",
            "model": options.path,
            "data": loader.config.source,
            "split": loader.config.eval_split,
            "batch_size": loader.config.eval_batch_size,
            "routing": to_dict(model.config.moe.routing()) if model.moe_layers else None,
            "flops_per_image": count_flops(model),
            **result,
        },
    )
    for line in summary(result):
        print(line)
    print(f"everything: {out / 'results.json'}")


def run_sweep(options: Sweep) -> None:
    from visionmoe.analysis import figures  # before the work: matplotlib may be missing

    out = output_folder(options.out)
    model = load_model(options.path, options.config, options.device)
    loader = evaluation_images(options, model)
    orders = {"vanilla": (False,), "batch-priority": (True,), "both": (False, True)}[options.order]
    experts = options.num_selected_experts or (model.config.moe.num_selected_experts,)
    settings = routing_grid(experts, options.capacity_factors, orders)
    if not settings:
        raise ValueError("capacity_factors must name at least one factor")
    with progress("sweeping", len(settings) * loader.num_images) as advance:
        evaluator = ClassificationEvaluator(loader, autocast=options.bf16, on_batch=advance)
        points = sweep(model, evaluator, settings)
    figures.accuracy_against_compute(out / "accuracy_vs_compute.png", points)
    write_json(
        out / "results.json",
        {
            "command": "sweep",
            "model": options.path,
            "data": loader.config.source,
            "split": loader.config.eval_split,
            "batch_size": loader.config.eval_batch_size,
            "num_images": loader.num_images,
            "points": [dataclasses.asdict(point) for point in points],
            "broken_images": loader.broken,
        },
    )
    for line in table(points):
        print(line)
    print(f"everything: {out / 'results.json'}, picture: {out / 'accuracy_vs_compute.png'}")


def summary(result: dict[str, Any]) -> list[str]:
    """The result of an evaluation in a few lines."""
    lines = [
        f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   loss {result['loss']:.4f}   "
        f"{result['num_images']} images, {result['images_per_second']:.0f} images/s"
    ]
    if result["per_class_accuracy"]:
        worst = sorted(result["per_class_accuracy"].items(), key=lambda item: item[1])[:3]
        lines.append("hardest classes: " + ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in worst))
    if result["broken_images"]:
        lines.append(f"left out {len(result['broken_images'])} broken images, named in results.json")
    return lines


def table(points: list[SweepPoint]) -> list[str]:
    """One line per setting."""
    lines = ["K  order           capacity  top-1   loss    MFLOP/image  dropped"]
    for p in points:
        order = "batch-priority" if p.batch_priority else "vanilla"
        lines.append(
            f"{p.num_selected_experts}  {order:<14}  {p.capacity_factor:8.2f}  {p.top1:6.2%}  {p.loss:.4f}  "
            f"{p.flops / 1e6:11.2f}  {p.dropped:7.1%}"
        )
    return lines
