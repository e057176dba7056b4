"""An exponential moving average of the parameters."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from visionmoe.distributed.tensors import local


class Ema:
    """average <- decay * average + (1 - decay) * parameters, after every update. Starts from the parameters.

    Of a model that is spread over processes each averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be >= 0 and < 1, got {decay}")
        self.decay = decay
        self._parameters = {name: local(p.detach()) for name, p in model.named_parameters()}
        self.average = {name: p.clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1.0 - self.decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model has the averaged parameters (in the same memory: no copy of the model is made)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)
