"""`visionmoe tune`."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from visionmoe.cli.options import Tune
from visionmoe.cli.shared import (
    check_kept,
    data_of_run,
    evaluation_images,
    load_model,
    model_folder,
    output_folder,
    progress,
)
from visionmoe.cli.sweep import first_batch
from visionmoe.data.loader import EvalLoader
from visionmoe.data.sources import Slice, Source, open_source
from visionmoe.data.splits import slice_indices
from visionmoe.distributed.world import current
from visionmoe.evaluate.adaptive import Evaluate, LayerSettings, apply_routing, layer_settings, restored_routing
from visionmoe.evaluate.calibrated import CalibratedEvaluator
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.fingerprint import data_fingerprint
from visionmoe.evaluate.speed import Speed, budget_for_speed
from visionmoe.evaluate.store import (
    ResultStore,
    StoredEvaluator,
    context_of,
    finite,
    plain,
    stored_timing,
    timing_of,
)
from visionmoe.evaluate.tune import Candidate, Tuned, check_budget, check_tunable, most_evaluations, tune
from visionmoe.files import write_json
from visionmoe.model.flops import count_flops
from visionmoe.model.vit import VisionTransformer

_log = logging.getLogger(__name__)
CALIBRATION_IMAGES = 4000
ATTEMPTS = 3  # to meet a speed


@dataclasses.dataclass(frozen=True)
class Images:
    """The two folds of calibration images, and the held-out ones."""

    calibration: EvalLoader
    check: EvalLoader
    held_out: EvalLoader
    calibration_split: str


def run(options: Tune) -> int:
    from visionmoe.analysis import figures  # before the work: matplotlib may be missing

    if (options.flops is None) == (options.images_per_second is None):
        raise ValueError("give --flops or --images-per-second, one of them")
    if options.flops is not None and not math.isfinite(options.flops):
        raise ValueError(f"--flops must be a finite number, got {options.flops}")
    out = output_folder(options.out)
    check_kept(model_folder(options.path), out / "model")
    model = load_model(options.path, options.config, options.device)
    check_tunable(model)
    images = open_images(options, model)
    work = Work(options, model, images, ResultStore(out))
    tuned, budget, speed = work.tuned()
    measured = work.held_out(tuned)
    if not current().is_first:
        return 0 if speed is None or speed.met else 1
    apply_routing(model, tuned.chosen.routing)
    model.save_pretrained(options.out / "model")  # with the names of classes and the preprocessing that it came with
    routings = {"present": work.present, "uniform": tuned.uniform.routing, "tuned": tuned.chosen.routing}
    chosen = {"uniform": tuned.uniform, "tuned": tuned.chosen}
    figures.tuned_routing(out / "tuned_routing.png", routings, tuned.tried, chosen, budget)
    results = results_of(options, work, tuned, budget, speed, measured)
    write_json(out / "results.json", finite(results))
    for line in summary(results):
        print(line)
    print(f"model: {out / 'model'}, everything: {out / 'results.json'}, picture: {out / 'tuned_routing.png'}")
    return 0 if speed is None or speed.met else 1


class Work:
    """One tuning: the model, its images, and what was worked out before."""

    def __init__(self, options: Tune, model: VisionTransformer, images: Images, store: ResultStore) -> None:
        self.options, self.model, self.images, self.store = options, model, images, store
        self.present = layer_settings(model)
        self.first = max(map(first_batch, (images.calibration, images.held_out)), key=len)  # what is timed
        self.context = context_of(model, images.calibration, autocast=options.bf16)
        self.batch_size = images.held_out.config.eval_batch_size
        self.timing: dict[str, Any] = {}  # how the latest times were measured
        self.flops = count_flops(model, batch_size=self.batch_size)
        self.evaluated = self.reused = 0

    def tuned(self) -> tuple[Tuned, int, Speed | None]:
        """The result, the budget in operations, and the speed where one was asked for."""
        if self.options.flops is not None:
            budget = round(self.options.flops * self.flops)
            return self._tune(budget), budget, None
        wanted = self.options.images_per_second
        assert wanted is not None
        budget = budget_for_speed(self.model, wanted, self.batch_size, self.speeds)
        tuned = None
        for attempt in range(1, ATTEMPTS + 1):
            tuned = self._tune(budget, tuned)
            # The present setting runs beside it: how busy the machine is shows there too.
            reached, present = self.speeds([tuned.chosen.routing, self.present], f"attempt {attempt}")
            speed = Speed(wanted, reached, present, attempt)
            if speed.met or attempt == ATTEMPTS:
                return tuned, budget, speed
            print(f"{reached:.0f} images/s, {wanted:.0f} are wanted: tuning again for less")
            budget = speed.tightened(self.model, budget, tuned.chosen.flops, self.batch_size)
        raise AssertionError("the loop returns")

    def speeds(self, settings: list[LayerSettings], what: str) -> list[float]:
        """Images per second of the model at these settings, measured in turns.

        Those that the budget is made of are kept, so that the same search follows; a result is measured each time.
        """
        with progress("timing", len(settings) * 8) as advance:
            measured = (self.model, self.first, settings)
            how: dict[str, Any] = {"autocast": self.options.bf16, "on_run": lambda: advance(1)}
            if what == "budget":
                seconds, self.timing = stored_timing(self.store, self.context | {"purpose": what}, *measured, **how)
            else:
                seconds, self.timing = timing_of(*measured, **how)
        return [self.timing["batch_size"] / own for own in seconds]

    def held_out(self, tuned: Tuned) -> dict[str, dict[str, Any]]:
        """Accuracy of the present setting, the best uniform one and the chosen one on the held-out images."""
        wanted = {"present": self.present, "uniform": tuned.uniform.routing, "tuned": tuned.chosen.routing}
        loader = self.images.held_out
        results = {}
        with progress("held-out images", 3 * loader.num_images) as advance, restored_routing(self.model):
            classify = ClassificationEvaluator(loader, autocast=self.options.bf16, on_batch=advance)
            evaluate = self._stored(classify, loader, advance)
            for name, routing in wanted.items():
                apply_routing(self.model, routing)
                results[name] = evaluate(self.model)
        self._count(evaluate)
        speeds = self.speeds(list(wanted.values()), "results")
        return {
            name: {"top1": r["top1"], "top5": r["top5"], "loss": r["loss"], "images_per_second": speed}
            for (name, r), speed in zip(results.items(), speeds, strict=True)
        }

    def _tune(self, budget: int, earlier: Tuned | None = None) -> Tuned:
        check_budget(self.model, budget, self.batch_size)
        most = most_evaluations(self.model)
        first, second = self.images.calibration, self.images.check
        print(f"Tuning: at most {most} evaluations of {first.num_images} images, "
              f"then 2 of {second.num_images} others")  # fmt: skip
        with progress("tuning", most * first.num_images + 2 * second.num_images) as advance:
            bf16 = self.options.bf16
            finding = CalibratedEvaluator(first, autocast=bf16, on_batch=advance)
            checking = CalibratedEvaluator(second, autocast=bf16, keep_images=True, on_batch=advance)
            calibrate, check = self._stored(finding, first, advance), self._stored(checking, second, advance)
            tuned = tune(
                self.model, budget, calibrate, check, batch_size=self.batch_size,
                curves=None if earlier is None else earlier.curves,
            )  # fmt: skip
        self._count(calibrate, check)
        return tuned

    def _stored(self, evaluate: Evaluate, loader: EvalLoader, advance: Callable[[int], None]) -> StoredEvaluator:
        measure = {"measure": type(evaluate).__name__, "data": data_fingerprint(loader)}
        return StoredEvaluator(
            evaluate, self.store, self.context | measure, on_reuse=lambda: advance(loader.num_images)
        )

    def _count(self, *evaluators: StoredEvaluator) -> None:
        self.evaluated += sum(evaluator.evaluated for evaluator in evaluators)
        self.reused += sum(evaluator.reused for evaluator in evaluators)


def open_images(options: Tune, model: VisionTransformer) -> Images:
    """Held-out images as for `evaluate`; calibration images from --calibration-split, cut into two folds.

    The folds are every other image, so that both have all classes. ValueError where images are in both parts.
    """
    held_out = evaluation_images(options, model)
    data = held_out.config
    split = options.calibration_split or (
        data_of_run(options.path, required=False).train_split if options.data is None else "train"
    )
    source = open_source(data.source, split)
    if options.calibration_split is None and len(source) > CALIBRATION_IMAGES:
        source = Slice(source, slice_indices(None, str(CALIBRATION_IMAGES), source.labels))
    if len(source) < 2:
        raise ValueError(f"calibration needs at least 2 images, {split} has {len(source)}")
    both = names(source) & names(held_out.source)
    if both:
        raise ValueError(
            f"{len(both)} images of the calibration split {split} are in the held-out split {data.eval_split} too "
            f"(for example {min(both)}): choose parts that share none"
        )
    folds = []
    for start in (0, 1):
        fold = Slice(source, np.arange(start, len(source), 2))
        folds.append(EvalLoader(dataclasses.replace(data, eval_split=f"{split}, fold {start + 1}"), source=fold))
    if folds[1].num_images < data.eval_batch_size:
        _log.warning(
            "the calibration images make two folds of about %d, fewer than a batch of %d: settings are compared on "
            "batches smaller than those that operations are counted for",
            folds[1].num_images, data.eval_batch_size,
        )  # fmt: skip
    return Images(folds[0], folds[1], held_out, split)


def names(source: Source) -> set[str]:
    return {source.name(index) for index in range(len(source))}


def results_of(
    options: Tune, work: Work, tuned: Tuned, budget: int, speed: Speed | None, held_out: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What results.json holds."""

    def of(candidate: Candidate, name: str) -> dict[str, Any]:
        return {
            "routing": plain(candidate.routing),
            "flops": candidate.flops,
            "share_of_present_flops": candidate.flops / work.flops,
            "calibration": {"calibrated_loss": candidate.calibrated_loss, "top1": candidate.top1},
            "held_out": held_out[name],
        }

    images = work.images
    return {
        "command": "tune",
        "model": options.path,
        "data": images.held_out.config.source,
        "calibration_split": images.calibration_split,
        "calibration_images": images.calibration.num_images,
        "check_images": images.check.num_images,
        "split": images.held_out.config.eval_split,
        "num_images": images.held_out.num_images,
        "batch_size": work.batch_size,
        "calibration_batch_size": min(work.batch_size, images.calibration.num_images),
        "timing": work.timing,
        "budget": {"flops": budget, "share_of_present_flops": budget / work.flops, "asked_share": options.flops},
        "speed": None if speed is None else dataclasses.asdict(speed) | {"met": speed.met},
        "kept": tuned.kept,
        "reason": tuned.reason,
        "check": tuned.check,
        "present": {"routing": plain(work.present), "flops": work.flops, "held_out": held_out["present"]},
        "uniform": of(tuned.uniform, "uniform"),
        "tuned": of(tuned.chosen, "tuned"),
        "evaluations": {"new": work.evaluated, "reused": work.reused},
        "tried": [{**dataclasses.asdict(c), "routing": plain(c.routing)} for c in tuned.tried],
    }


def summary(results: dict[str, Any]) -> list[str]:
    """A few lines for people."""
    lines = ["             MFLOP/image  share  top-1   loss    images/s   (held-out images)"]
    for name in ("present", "uniform", "tuned"):
        part, held = results[name], results[name]["held_out"]
        lines.append(
            f"{name:<11}  {part['flops'] / 1e6:11.2f}  {part['flops'] / results['present']['flops']:5.3f}  "
            f"{held['top1']:6.2%}  {held['loss']:.4f}  {held['images_per_second']:8.0f}"
        )
    for layer, setting in results["tuned"]["routing"].items():
        lines.append(
            f"  block {layer}: K {setting['num_selected_experts']}, capacity factor {setting['capacity_factor']:.3g}"
        )
    lines.append(f"kept: {results['kept']} ({results['reason']})")
    speed = results["speed"]
    if speed is not None:
        lines.append(f"{speed['reached']:.0f} images/s measured, {speed['wanted']:.0f} wanted"
                     + ("" if speed["met"] else ": not met"))  # fmt: skip
    return lines
