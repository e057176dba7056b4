"""Evaluations of tiny models, run by each process of a job, and before by the first one alone: `evaluations.py FOLDER`.

What they gave is left in FOLDER/alone.json and FOLDER/rank-<r>.json. Equal text of a float is equal bits.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import visionmoe as vm
from visionmoe.analysis.analyze import Analysis, AnalysisConfig
from visionmoe.analysis.compute_per_image import record_compute
from visionmoe.cli import main
from visionmoe.config import RoutingSetting
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.data.decode import BrokenImageError
from visionmoe.data.sources import ArraySource
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import current, from_first, joined, requested
from visionmoe.evaluate.calibrated import CalibratedEvaluator
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.features import FeatureCache, extract
from visionmoe.evaluate.fewshot import FewShotData, FewShotEvaluator
from visionmoe.train.parallel import Parallel

CONFIG = vm.ModelConfig(
    image_size=8, patch_size=4, in_channels=1, num_classes=3, hidden_size=16, num_layers=3, mlp_dim=16, num_heads=2,
    moe=vm.MoEConfig(num_experts=4, layers=(1, 2), capacity_factor=0.6, batch_priority=True, capacity_multiple_of=None),
)  # fmt: skip
BATCH = 8
BROKEN = {3, *range(16, 24), 50}  # one of batch 0, all of batch 2, one of the last batch
FSDP = {2: "fsdp=2", 4: "dp=2,fsdp=2"}
EP = {2: "ep=2", 4: "fsdp=2,ep=2"}
LONG, FEW = 91, {3, 20, 90}  # twelve batches, so that each of four processes has three


class Images(ArraySource):
    """Noise in three classes; some images are broken."""

    def __init__(self, count: int, broken: set[int] = frozenset(), seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        super().__init__(pixels, rng.integers(0, 3, count), ("a", "b", "c"))
        self.wrong = broken

    def decode(self, index: int, *rest: int) -> np.ndarray:
        if index in self.wrong:
            raise BrokenImageError("cut")
        return super().decode(index, *rest)


def loader(count: int, broken: set[int] = frozenset(), max_broken: float = 0.3, **changes: Any) -> EvalLoader:
    config = DataConfig(image_size=8, eval_batch_size=BATCH, max_broken=max_broken, **changes)
    return EvalLoader(config, source=Images(count, broken))


def model(**changes: Any) -> vm.VisionTransformer:
    torch.manual_seed(0)
    made = vm.create_model(CONFIG.replace(**changes))
    nn.init.normal_(made.head.weight)
    return made.eval()


def spread(made: vm.VisionTransformer, layouts: Mapping[int, str] = FSDP) -> vm.VisionTransformer:
    """In a job its parameters are shared out, so that every call of it is collective. layouts: by processes."""
    if current().size > 1:
        layout = Layout.parse(layouts[current().size], current().size)
        Parallel(layout, current()).spread(made, torch.device("cpu"))
    return made


def results(folder: Path) -> dict[str, Any]:
    return {
        "classify": classified(model(), loader(51, BROKEN)),
        "one batch": classified(model(), loader(5)),
        "sigmoid": classified(model(), loader(19), loss="sigmoid"),
        "list of batches": classified(model(), list(loader(30))),
        "spread": classified(spread(model()), loader(51, BROKEN)),
        "spread, one batch": classified(spread(model(group_size=10)), loader(5)),
        "experts split": classified(spread(model(), EP), loader(51, BROKEN)),
        "features": features(extract(model(), loader(51, BROKEN))),
        "features of spread": features(extract(spread(model()), loader(51))),
        "features of split": extract(spread(model(), EP), loader(33)).x.tolist(),
        "cache": cached(folder),
        "few-shot": few_shot(),
        "calibrated": CalibratedEvaluator(loader(51, BROKEN), keep_images=True)(model()),
        "per image": per_image(),
        "analysis": analysed(folder),
        "too many broken": too_many_broken(),
        "commands": commands(folder),
    }


def classified(made: vm.VisionTransformer, images: Any, **options: Any) -> dict[str, Any]:
    told: list[int] = []
    result = ClassificationEvaluator(images, on_batch=told.append, **options)(made)
    if current().is_first and isinstance(images, EvalLoader) and not images.broken:
        assert sum(told) == images.num_images  # the first process tells of all
    assert result.pop("images_per_second") > 0 and result.pop("model_images_per_second") > 0
    return result | {"broken in order": list(result["broken_images"])}


def features(made: Any) -> dict[str, Any]:
    text = made.x.numpy().tobytes() + made.labels.numpy().tobytes()
    return {"shape": list(made.x.shape), "sha": hashlib.sha256(text).hexdigest(), "broken": dict(made.broken)}


class Stop(Exception):  # noqa: N818
    """In the place of Ctrl-C."""


def stop_after(calls: int) -> Any:
    left = iter(range(calls - 1))

    def on_batch(images: int) -> None:
        if next(left, None) is None:
            raise Stop

    return on_batch


def cached(folder: Path) -> list[Any]:
    """Extracted, stopped on the way and taken up, then read."""
    place, images = folder / "features", loader(LONG, FEW)
    with contextlib.suppress(Stop):
        FeatureCache(place, save_seconds=0).features(model(), images, on_batch=stop_after(3 if alone() else 2))
    before = sorted(path.name.partition(".")[2] for path in place.iterdir()) if current().is_first else []
    made = FeatureCache(place).features(model(), loader(LONG, FEW))
    again = FeatureCache(place).features(model(), loader(LONG, FEW))
    assert (made.cached, again.cached) == (False, True)
    assert not current().is_first or before[0] == "part-0000.safetensors"
    assert len(list(place.iterdir())) == 1
    return [features(made), features(again)]


def alone() -> bool:
    return current().size == 1


def few_shot() -> list[Any]:
    data = [FewShotData("noise", loader(51, BROKEN), loader(21)), FewShotData("more", loader(33), loader(9))]
    fits: list[int] = []
    evaluator = FewShotEvaluator(data, shots=(1, 4), seeds=(0, 1, 2), on_fit=lambda: fits.append(1))
    made = evaluator.evaluate(model())
    assert not current().is_first or len(fits) == 6
    return [[one.name, one.l2_regs, one.accuracy.tolist(), features(one.test)] for one in made]


def per_image() -> Any:
    compute, fewest, most = record_compute(model(), loader(51, BROKEN), RoutingSetting(2, 0.3, True), examples=4)
    columns = {f.name: getattr(compute, f.name).tolist() for f in dataclasses.fields(compute)}
    shown = [[(e.index, e.share, int(e.picture.sum())) for e in examples] for examples in (fewest, most)]
    return columns, shown


def analysed(folder: Path) -> dict[str, Any]:
    """Stopped on the way and taken up."""
    config = AnalysisConfig(seeds=1, permutations=2, gallery=3, save_seconds=0)
    images = loader(LONG, FEW)
    analysis = Analysis(model(), images, folder / "analysis", config)
    with contextlib.suppress(Stop):
        analysis.run_statistics(analysis.load_statistics(), stop_after(3 if alone() else 2))
    analysis = Analysis(model(), loader(LONG, FEW), folder / "analysis", config)
    statistics = analysis.load_statistics()
    assert 0 < statistics.next_image < LONG
    analysis.run_statistics(statistics, lambda images: None)
    tables = {
        f"{layer} {name}": [list(array.shape), array.tolist()]
        for layer, table in statistics.layers.items()
        for name, array in table.arrays().items()
    }
    random = analysis.run_random_routers(analysis.load_evaluations(), lambda images: None)
    return {"tables": tables, "images": statistics.num_images, "broken": statistics.broken, "random": random}


def too_many_broken() -> list[str]:
    """Four of 33 are 12.1 %: too many only where all processes count together."""
    found = []
    for run in (ClassificationEvaluator(loader(33, {0, 9, 16, 25}, max_broken=0.1)),
                lambda made: extract(made, loader(33, {0, 9, 16, 25}, max_broken=0.1))):  # fmt: skip
        try:
            run(model())
        except ValueError as error:
            found.append(str(error))
    return found


def commands(folder: Path) -> dict[str, Any]:
    """Results of commands but for times, from the embedded images."""
    if current().is_first:
        model(image_size=28, patch_size=14, num_classes=10, num_layers=2, layers=(1,)).save_pretrained(folder / "model")
    from_first(None)
    images = ["--data", "fashion-mnist", "--batch-size", "8", "--device", "cpu"]
    some = [*images, "--split", "test[:35]"]
    analyze = ["--seeds", "1", "--permutations", "2", "--gallery", "2"]
    budget = ["--flops", "0.93", "--calibration-split", "train[:34]"]
    few = ["--train-split", "train[:60]", "--test-split", "test[:20]", "--shots", "1", "2", "--seeds", "0", "1"]
    found = {}
    for name, arguments in {
        "evaluate": some,
        "sweep": [*some, "--capacity-factors", "1.0", "0.5"],
        "tune": [*some, *budget],
        "fewshot": ["--data", "fashion-mnist", *images[2:], *few],
        "analyze": [*some, *analyze],
    }.items():
        out = folder / name
        if main([name, str(folder / "model"), *arguments, "--out", str(out)]) != 0:
            raise RuntimeError(f"{name} failed")
        from_first(None)  # the first process has written
        found[name] = without_times(json.loads((out / "results.json").read_text()))
    return found


TIMES = {"images_per_second", "model_images_per_second", "milliseconds_per_image", "timing", "seconds", "written",
         "model", "sha256"}  # fmt: skip


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(entry) for name, entry in value.items() if name not in TIMES}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    if requested().is_first:
        job = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        (folder / "alone.json").write_text(json.dumps(results(folder / "alone")))
        os.environ.update(job)
    with joined() as world:
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(results(folder / "job")))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
