"""The stages of an analysis, each of which leaves its result in the folder and is not done again.

state/statistics.npz: the tables of one pass over the images, saved on the way; state/random_routers.json: the finished
evaluations with random routers. Both carry a fingerprint of model, images and options; one of something else is
replaced, never continued. Pictures and report follow from them and are drawn each time. Of several processes all
share the batches, and the first one keeps the files.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionmoe.analysis.collect import Keeping, Statistics, collect, statistics_of_first
from visionmoe.analysis.random_router import ablations, run_ablations, summarise
from visionmoe.config import ModelConfig, to_dict
from visionmoe.data.loader import EvalLoader
from visionmoe.distributed.world import current, from_first
from visionmoe.evaluate.adaptive import layer_settings
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.evaluate.fingerprint import data_fingerprint, model_fingerprint
from visionmoe.files import one_line, read_json, write_json
from visionmoe.model.vit import VisionTransformer

_log = logging.getLogger(__name__)
FORMAT = 3  # of the files in state/


@dataclass(frozen=True)
class AnalysisConfig:
    """seeds: draws of random routers. permutations: shuffles of the labels. gallery: patches per expert. autocast:
    bfloat16. save_seconds: how often the pass saves itself."""

    seeds: int = 3
    permutations: int = 10
    gallery: int = 12
    autocast: bool = False
    save_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name, lowest in (("seeds", 0), ("permutations", 0), ("gallery", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")


class Analysis:
    """A model, labelled images and a folder; its stages in the order in which they are to run.

    ValueError for a model without layers that route tokens to experts.
    """

    def __init__(self, model: VisionTransformer, loader: EvalLoader, out: Path, config: AnalysisConfig) -> None:
        check_routes(model.config)
        self.model, self.loader, self.out, self.config = model, loader, out, config
        routing = {str(layer): to_dict(setting) for layer, setting in layer_settings(model).items()}
        self.fingerprint = _hash([FORMAT, model_fingerprint(model), routing, data_fingerprint(loader), config.autocast])

    def load_statistics(self) -> Statistics:
        """The tables as far as an earlier start of the same analysis filled them. Collective."""
        path, config = self._statistics_file(), self.config
        stored = Statistics.load(path, self._statistics_fingerprint()) if current().is_first else None
        stored = statistics_of_first(stored)
        if stored is not None:
            return stored
        return Statistics.empty(self.model.config, self.loader.num_classes, config.permutations, config.gallery)

    def run_statistics(self, statistics: Statistics, on_batch: Callable[[int], None]) -> None:
        """Fills the tables; on_batch gets the number of images of every batch."""
        keeping = Keeping(self._statistics_file(), self._statistics_fingerprint(), self.config.save_seconds)
        collect(self.model, self.loader, statistics, autocast=self.config.autocast, on_batch=on_batch, keeping=keeping)

    def load_evaluations(self) -> dict[str, dict[str, float]]:
        """The evaluations with random routers that an earlier start finished. Collective."""
        return from_first(self._stored_evaluations() if current().is_first else {})

    def _stored_evaluations(self) -> dict[str, dict[str, float]]:
        path = self.out / "state" / "random_routers.json"
        if not path.is_file():
            return {}
        try:
            stored = read_json(path)
            evaluations = stored["evaluations"] if stored["fingerprint"] == self.fingerprint else {}
            return {name: {"top1": float(e["top1"]), "loss": float(e["loss"])} for name, e in evaluations.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s does not hold evaluations (%s); they are made anew", path, one_line(error))
            return {}

    def missing(self, done: dict[str, dict[str, float]]) -> int:
        """How many evaluations `run_random_routers` would make."""
        return sum(one.name not in done for one in ablations(self.model.moe_layers, self.config.seeds))

    def run_random_routers(self, done: dict[str, dict[str, float]], on_batch: Callable[[int], None]) -> dict[str, Any]:
        """Makes the evaluations that are missing, keeps each, and returns their summary."""
        layers, seeds = self.model.moe_layers, self.config.seeds
        evaluator = ClassificationEvaluator(self.loader, autocast=self.config.autocast, on_batch=on_batch)

        def keep() -> None:
            if current().is_first:
                path = self.out / "state" / "random_routers.json"
                write_json(path, {"fingerprint": self.fingerprint, "evaluations": done})

        run_ablations(self.model, evaluator, ablations(layers, seeds), done, keep)
        return summarise(layers, seeds, done)

    def _statistics_file(self) -> Path:
        return self.out / "state" / "statistics.npz"

    def _statistics_fingerprint(self) -> str:
        return _hash([self.fingerprint, self.config.permutations, self.config.gallery])


def check_routes(config: ModelConfig) -> None:
    """ValueError for a model without layers that route tokens to experts."""
    if not config.moe.layers:
        raise ValueError("the model is dense: it has no routers to analyze")
    if config.moe.router == "soft":
        raise ValueError("the model is a Soft MoE, which mixes tokens instead of routing them: no routers to analyze")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
