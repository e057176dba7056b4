"""Seconds of a training step of several models, measured in turns, so that they can be compared."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from runs import Run

from visionmoe.data.loader import TrainLoader
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.step import StepSettings, train_step

WARM_UP, ROUNDS = 2, 12


def seconds_per_step(compared: Mapping[str, Run]) -> dict[str, float]:
    """Median over the rounds, each a step of every run's model on one batch of its images, after some that do not
    count. From the trained parameters, whose routing is balanced; images are prepared before. The runs stay as they
    are."""
    steps = {name: stepper(run) for name, run in compared.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with torch.random.fork_rng([]):
        for number in range(WARM_UP + ROUNDS):
            for name, step in steps.items():
                start = time.perf_counter()
                step(number)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own[WARM_UP:]) for name, own in times.items()}


def stepper(run: Run) -> Callable[[int], None]:
    """A function that makes one step of the run's training in memory."""
    config, model = run.config, run.model().train()
    assert config.steps is not None and model.config.num_classes is not None
    optimizer = create_optimizer(model.named_parameters(), total_steps=config.steps, **config.optimizer.arguments())
    settings = StepSettings(create_loss(config.loss, config.label_smoothing), model.config.num_classes, config.seed)
    images, labels = next(iter(TrainLoader(config.data, config.seed)))

    def step(number: int) -> None:
        train_step(model, optimizer, images, labels, number, settings)

    return step
