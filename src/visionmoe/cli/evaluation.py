"""`visionmoe evaluate`."""

from typing import Any

from visionmoe.cli.options import Evaluate
from visionmoe.cli.shared import evaluation_images, load_model, output_folder, progress
from visionmoe.config import to_dict
from visionmoe.distributed.world import current
from visionmoe.evaluate.classify import evaluate
from visionmoe.files import write_json
from visionmoe.model.flops import count_flops


def run(options: Evaluate) -> None:
    out = output_folder(options.out)
    model = load_model(options.path, options.config, options.device, options.image_size, stream=options.stream)
    changes = (options.num_selected_experts, options.capacity_factor, options.batch_priority)
    if any(change is not None for change in changes):
        model.set_routing(*changes)
    loader = evaluation_images(options, model)
    with progress("evaluating", loader.num_images) as advance:
        result = evaluate(model, loader, autocast=options.bf16, class_names=loader.class_names, on_batch=advance)
    if not current().is_first:
        return
    write_json(
        out / "results.json",
        {
            "command": "evaluate",
            "model": options.path,
            "data": loader.config.source,
            "split": loader.config.eval_split,
            "batch_size": loader.config.eval_batch_size,
            "routing": to_dict(model.config.moe.routing()) if model.moe_layers else None,
            "layer_routing": to_dict(model.config.moe)["layer_routing"],
            "flops_per_image": count_flops(model),
            **result,
        },
    )
    for line in summary(result):
        print(line)
    print(f"everything: {out / 'results.json'}")


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
