"""`visionmoe analyze`."""

import time
from typing import Any

from visionmoe.analysis.analyze import Analysis, AnalysisConfig, check_routes
from visionmoe.analysis.explain import write_report
from visionmoe.analysis.pictures import FRAMES, draw_capacities, draw_galleries, draw_statistics, orders_of
from visionmoe.analysis.summary import summarise_layer
from visionmoe.cli.options import Analyze
from visionmoe.cli.shared import evaluation_images, load_model, output_folder, progress
from visionmoe.config import to_dict
from visionmoe.distributed.world import current
from visionmoe.files import write_json


def run(options: Analyze) -> None:
    from visionmoe.analysis import figures  # before the work: matplotlib may be missing

    config = AnalysisConfig(options.seeds, options.permutations, options.gallery, options.bf16)
    out = output_folder(options.out)
    model = load_model(options.path, options.config, options.device)
    check_routes(model.config)
    loader = evaluation_images(options, model)
    analysis = Analysis(model, loader, out, config)
    statistics = analysis.load_statistics()
    with progress("statistics", loader.num_images) as advance:
        advance(statistics.num_images)
        analysis.run_statistics(statistics, advance)
    done = analysis.load_evaluations()
    with progress("random routers", analysis.missing(done) * loader.num_images) as advance:
        random = analysis.run_random_routers(done, advance)
    if not current().is_first:
        return
    with progress("pictures", len(statistics.layers) + 1 + len(FRAMES) * len(orders_of(model))) as advance:
        layers = {n: summarise_layer(t, statistics.shapes[n], loader.class_names)
                  for n, t in statistics.layers.items()}  # fmt: skip
        draw_statistics(out, model, statistics, layers, loader.class_names)
        if random["seeds"]:
            figures.random_routers(out / "random_routers.png", random, "Accuracy with experts drawn at random")
        advance(1)
        draw_galleries(out, model, statistics, loader, on_layer=lambda: advance(1))
        kept = draw_capacities(out, model, loader, autocast=options.bf16, on_frame=lambda: advance(1))
    results: dict[str, Any] = {
        "command": "analyze",
        "model": options.path,
        "data": loader.config.source,
        "split": loader.config.eval_split,
        "batch_size": loader.config.eval_batch_size,
        "num_images": statistics.num_images,
        "class_names": list(loader.class_names),
        "model_config": to_dict(model.config),
        "fingerprint": analysis.fingerprint,
        "top1": random["trained"]["top1"],
        "random_routers": random,
        "kept_patches": kept,
        "layers": {str(n): layer for n, layer in layers.items()},
        "broken_images": statistics.broken,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    results["pictures"] = write_report(out, results)
    write_json(out / "results.json", results)
    for line in table(results):
        print(line)
    print(f"report: {out / 'report.html'}, everything: {out / 'results.json'}")


def table(results: dict[str, Any]) -> list[str]:
    """One line per sparse layer."""
    random = results["random_routers"]
    lines = [f"top-1 {results['top1']:.2%} as trained, {results['num_images']} images",
             "block  bits about class  about position  entropy  dropped  top-1 with a random router"]  # fmt: skip
    for n, layer in results["layers"].items():
        about = {kind: layer["information"][kind]["first"]["excess"] for kind in ("class", "position")}
        alone = f"{random['alone'][n]['mean']:.2%}" if random["seeds"] else "not evaluated"
        lines.append(
            f"{n:>5}  {about['class']:16.3f}  {about['position']:14.3f}  {layer['entropy_bits']['mean']:7.2f}  "
            f"{layer['load']['dropped']:7.1%}  {alone}"
        )
    return lines
