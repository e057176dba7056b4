"""How much the router's choice is worth: accuracy when experts are drawn at random (arXiv 2106.05974, appendix E)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionmoe.config import RoutingSetting
from visionmoe.model.moe import MoE
from visionmoe.model.router import Router
from visionmoe.model.routing import Routing
from visionmoe.model.vit import VisionTransformer


class RandomRouter(Router):
    """A trained router whose probabilities are dealt to the experts in a random order, anew for every token.

    The order follows from the seed, the number of the batch (see `start`) and the place in it alone.
    So the K experts of a token are drawn uniformly without replacement, while its K weights, largest first, its
    priority, the capacity and K stay what the trained router gave. With expert choice, experts choose by such dealt
    probabilities.
    """

    def __init__(self, trained: Router, seed: Sequence[int]) -> None:
        nn.Module.__init__(self)  # not Router's: the weights are those of the trained one
        self.config, self.gate = trained.config, trained.gate
        self.seed, self.generator = tuple(seed), torch.Generator()
        self.start(0)
        self.train(trained.training)

    def start(self, batch: int) -> None:
        """The next call is of batch number `batch`."""
        self.generator.manual_seed(int(np.random.SeedSequence([*self.seed, batch]).generate_state(1)[0]))

    def _route(self, probs: Tensor, setting: RoutingSetting) -> Routing:
        order = torch.rand(probs.shape, generator=self.generator).argsort(-1).to(probs.device)
        return super()._route(probs.gather(-1, order), setting)


@contextlib.contextmanager
def random_routers(model: VisionTransformer, layers: Sequence[int], seed: int) -> Iterator[Callable[[int], None]]:
    """While the body runs, the routers of these blocks choose at random; afterwards they are the trained ones again.

    Yields a function to be called with the number of a batch before it runs.
    """
    trained: list[tuple[MoE, Router]] = []
    random: list[RandomRouter] = []
    try:
        for layer in layers:
            sparse = model.moe_layer(layer)
            if not isinstance(sparse, MoE):
                raise ValueError("the model has no layers that route tokens to experts")
            trained.append((sparse, sparse.router))
            random.append(RandomRouter(sparse.router, [seed, layer]))
            sparse.router = random[-1]

        def start(batch: int) -> None:
            for router in random:
                router.start(batch)

        yield start
    finally:
        for sparse, router in trained:
            sparse.router = router


@dataclass(frozen=True)
class Ablation:
    """One evaluation: the blocks whose routers choose at random (none: as trained), and the seed of the choices."""

    layers: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        return f"blocks {','.join(map(str, self.layers))} seed {self.seed}" if self.layers else "trained"


def ablations(layers: Sequence[int], seeds: int) -> list[Ablation]:
    """The trained model; then for every seed each sparse layer by itself, and all of them up to it from the bottom."""
    groups: list[tuple[int, ...]] = [(layer,) for layer in layers]
    groups += [tuple(layers[: count + 1]) for count in range(1, len(layers))]
    return [Ablation((), 0), *(Ablation(group, seed) for seed in range(seeds) for group in groups)]


def run_ablations(
    model: VisionTransformer,
    evaluate: Callable[[VisionTransformer, Callable[[int], None]], dict[str, Any]],
    wanted: Sequence[Ablation],
    done: dict[str, dict[str, float]],
    on_done: Callable[[], None],
) -> None:
    """Evaluates what `done` lacks; puts {"top1", "loss"} of each into it by its name, then calls on_done.

    evaluate: calls its second argument with the number of every batch before it runs, as `ClassificationEvaluator`.
    """
    for ablation in wanted:
        if ablation.name in done:
            continue
        with random_routers(model, ablation.layers, ablation.seed) as start:
            result = evaluate(model, start)
        done[ablation.name] = {"top1": result["top1"], "loss": result["loss"]}
        on_done()


def summarise(layers: Sequence[int], seeds: int, done: dict[str, dict[str, float]]) -> dict[str, Any]:
    """{"trained": {...}, "alone": {block: {...}}, "cumulative": {block: {...}}}, means and deviations over seeds.

    "cumulative" of a block is with every sparse layer up to and including it at random. std is 0 for one seed.
    """
    alone = {str(layer): _over_seeds((layer,), seeds, done) for layer in layers}
    cumulative = {str(layer): _over_seeds(tuple(layers[: i + 1]), seeds, done) for i, layer in enumerate(layers)}
    return {"trained": done[Ablation((), 0).name], "seeds": seeds,
            "alone": alone if seeds else {}, "cumulative": cumulative if seeds else {}}  # fmt: skip


def _over_seeds(layers: tuple[int, ...], seeds: int, done: dict[str, dict[str, float]]) -> dict[str, Any]:
    top1 = [done[Ablation(layers, seed).name]["top1"] for seed in range(seeds)]
    loss = [done[Ablation(layers, seed).name]["loss"] for seed in range(seeds)]
    return {
        "top1": top1,
        "mean": float(np.mean(top1)) if top1 else None,
        "std": float(np.std(top1, ddof=1)) if len(top1) > 1 else 0.0,
        "loss": float(np.mean(loss)) if loss else None,
    }
