"""`visionmoe fewshot`: how well a linear classifier on frozen features does with few images per class."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from visionmoe.cli.options import Fewshot
from visionmoe.cli.shared import load_model, open_loader, output_folder, progress
from visionmoe.config import to_dict
from visionmoe.data.config import DataConfig
from visionmoe.distributed.world import current
from visionmoe.evaluate.features import FeatureCache
from visionmoe.evaluate.fewshot import FewShotData, FewShotEvaluator, FewShotResult
from visionmoe.files import write_json
from visionmoe.model.vit import VisionTransformer


def run(options: Fewshot) -> None:
    from visionmoe.analysis import figures  # before the work: matplotlib may be missing

    out = output_folder(options.out)
    cache = output_folder(options.cache or out / "features")
    model = load_model(options.path, options.config, options.device, options.image_size)
    changes = (options.num_selected_experts, options.capacity_factor, options.batch_priority)
    if any(change is not None for change in changes):
        model.set_routing(*changes)
    data = fewshot_data(options.data, options.train_split, options.test_split, base_data(options, model))
    images = sum(loader.num_images for one in data for loader in (one.train, one.test))
    fits = len(data) * len(options.seeds)
    per_fit = 1 + images // (10 * max(fits, 1))  # on the progress line all fits together are a tenth of the images
    with progress("few-shot", images + fits * per_fit) as advance:
        evaluator = FewShotEvaluator(
            data,
            shots=options.shots,
            seeds=options.seeds,
            autocast=options.bf16,
            cache=FeatureCache(cache, refresh=options.refresh),
            on_batch=advance,
            on_fit=lambda: advance(per_fit),
        )
        results = evaluator.evaluate(model)
    if not current().is_first:
        return
    figures.accuracy_over_shots(out / "fewshot.png", results)
    write_json(out / "results.json", summary(options, model, data, results))
    for line in table(results):
        print(line)
    print(f"everything: {out / 'results.json'}, picture: {out / 'fewshot.png'}")


def base_data(options: Fewshot, model: VisionTransformer) -> DataConfig:
    """Images at the model's size and number of channels, prepared as for `evaluate`."""
    given = {
        "eval_batch_size": options.batch_size,
        "workers": options.workers,
        "eval_resize": options.eval_resize or model.preprocessing.resize_to,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    # Every image is read once, so decoded ones are not kept.
    return DataConfig(image_size=model.config.image_size, in_channels=model.config.in_channels, cache_mb=0, **changes)


def fewshot_data(
    sources: Sequence[str], train_splits: Sequence[str], test_splits: Sequence[str], base: DataConfig
) -> list[FewShotData]:
    """Opens every source; one split serves all of them, else there is one per source. Raises ValueError."""
    if not sources:
        raise ValueError("few-shot evaluation needs at least one source of images")
    trains, tests = (
        _per_source(name, splits, len(sources)) for name, splits in (("train", train_splits), ("test", test_splits))
    )
    data = []
    for source, train, test in zip(sources, trains, tests, strict=True):
        if train == test:
            raise ValueError(f"{source}: the training and the test split must differ, got {train!r} for both")
        loaders = [open_loader(dataclasses.replace(base, source=source, eval_split=split)) for split in (train, test)]
        data.append(FewShotData(source, *loaders))
    return data


def _per_source(name: str, splits: Sequence[str], sources: int) -> list[str]:
    if len(splits) not in (1, sources):
        raise ValueError(f"give one {name} split, or one for each of the {sources} sources, got {len(splits)}")
    return list(splits) * (1 if len(splits) == sources else sources)


def summary(
    options: Fewshot, model: VisionTransformer, data: Sequence[FewShotData], results: Sequence[FewShotResult]
) -> dict[str, Any]:
    """The contents of results.json."""
    return {
        "command": "fewshot",
        "model": options.path,
        "routing": to_dict(model.config.moe.routing()) if model.moe_layers else None,
        "layer_routing": to_dict(model.config.moe)["layer_routing"],
        "image_size": list(model.config.image_hw),
        "batch_size": data[0].train.config.eval_batch_size,
        "feature_dim": results[0].train.x.shape[1],
        "shots": list(options.shots),
        "seeds": list(options.seeds),
        "l2": dict(zip(map(str, results[0].shots), results[0].l2_regs, strict=True)),
        "data": [_of_data(one, result) for one, result in zip(data, results, strict=True)],
    }


def _of_data(data: FewShotData, result: FewShotResult) -> dict[str, Any]:
    parts = {"train": (data.train, result.train), "test": (data.test, result.test)}
    stds: Sequence[float | None] = result.std or [None] * len(result.shots)
    return {
        "name": data.name,
        "num_classes": result.num_classes,
        "splits": {name: loader.config.eval_split for name, (loader, _) in parts.items()},
        "num_images": {name: len(features.x) for name, (_, features) in parts.items()},
        "accuracy": {
            str(shot): {"mean": mean, "std": std, "per_seed": accuracy.tolist()}
            for shot, mean, std, accuracy in zip(result.shots, result.mean, stds, result.accuracy, strict=True)
        },
        "seconds": {"fit": result.fit_seconds} | {f"{name}_features": f.seconds for name, (_, f) in parts.items()},
        "features_from_cache": {name: features.cached for name, (_, features) in parts.items()},
        "broken_images": {key: why for _, features in parts.values() for key, why in features.broken.items()},
    }


def table(results: Sequence[FewShotResult]) -> list[str]:
    """One line per data set, one column per number of shots, and the strengths that were chosen."""
    width = max(len("data"), *(len(result.name) for result in results))
    lines = ["data".ljust(width) + "".join(f"{f'{shot}-shot':>17}" for shot in results[0].shots)]
    for result in results:
        stds = [""] * len(result.shots) if result.std is None else [f" +- {std:.2%}" for std in result.std]
        cells = (f"{mean:.2%}{std}" for mean, std in zip(result.mean, stds, strict=True))
        lines.append(result.name.ljust(width) + "".join(f"{cell:>17}" for cell in cells))
    lines.append("l2".ljust(width) + "".join(f"{strength:>17g}" for strength in results[0].l2_regs))
    return lines
