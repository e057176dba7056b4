"""The peak of tensor memory of a real step, as torch's allocator reports it to the profiler; to check plans by.

    python -m visionmoe.plan.measure '{"config": {...}, "batch_size": 8, ...}' ...

prints one JSON line for each argument: tensor_bytes, the peak of what tensors hold on a CPU, and resident_bytes, that
of the process above what it had before the model.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from visionmoe.config import ModelConfig, from_dict, to_dict
from visionmoe.model.packed import PackedWeights
from visionmoe.model.vit import VisionTransformer, create_model
from visionmoe.plan.work import Work, torch_dtype
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.step import StepSettings, train_step

CALLS = 2  # the second step has the optimizer's state, too


def ask(*works: Work) -> list[dict[str, int]]:
    """Measured one after the other in a fresh process on a CPU; the resident bytes of the first alone mean something.

    RuntimeError with the process' last words where it fails.
    """
    command = [sys.executable, "-m", "visionmoe.plan.measure", *(json.dumps(_question(work)) for work in works)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures failed: {done.stderr.strip()[-600:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _question(work: Work) -> dict[str, Any]:
    return {f.name: getattr(work, f.name) for f in fields(work)} | {"config": to_dict(work.config)}


def peak_bytes(work: Work) -> dict[str, int]:
    """Of the second step or call, which has the optimizer's state, too, in this process."""
    tiny = ModelConfig(image_size=32, num_classes=10, hidden_size=32, num_layers=1, mlp_dim=32, num_heads=1)
    _made(replace(work, config=tiny, batch_size=work.accumulation))[1]()  # loads the libraries
    before = _resident("VmRSS")
    model, call, held = _made(work)
    for _ in range(CALLS):
        call()
    resident = _resident("VmHWM") - before
    model.zero_grad(set_to_none=True)  # as the step does first; the profiler would not see that they go
    sizes = sum(_storages(held()).values()) + _packed(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return {"tensor_bytes": sizes + _highest(profiler), "resident_bytes": resident}


def _made(work: Work) -> tuple[VisionTransformer, Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    """A model, its step or call, and what lives before one."""
    torch.manual_seed(0)
    model = create_model(work.config)
    return model, *(_training(work, model) if work.training else _inference(work, model))


def _training(work: Work, model: VisionTransformer) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    config = model.train().config
    images, labels = _images(work), torch.arange(work.batch_size) % (config.num_classes or 1)
    optimizer = create_optimizer(
        model.named_parameters(), name=work.optimizer, total_steps=10, learning_rate=1e-4, **work.options
    )
    settings = StepSettings(
        create_loss("softmax"), config.num_classes or 1, seed=0, accumulation=work.accumulation,
        precision=work.precision,
    )  # fmt: skip

    def call() -> None:
        train_step(model, optimizer, images, labels, 0, settings)

    def held() -> list[torch.Tensor]:
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return [*model.parameters(), *states, images, labels]

    return call, held


def _inference(work: Work, model: VisionTransformer) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    dtype = torch_dtype(work.precision)
    model = model.eval().to(dtype)
    images = _images(work).to(dtype)

    @torch.no_grad()
    def call() -> None:
        model(images)

    return call, lambda: [*model.parameters(), images]


def _images(work: Work) -> torch.Tensor:
    return torch.randn(work.batch_size, work.config.in_channels, *work.config.image_hw)


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _packed(model: VisionTransformer) -> int:
    """Bytes of weights in oneDNN's layout, which torch's allocator does not see."""
    packed: list[Any] = [getattr(module, "packed", None) for module in model.modules()]
    held = [t for one in packed if isinstance(one, PackedWeights) for t in one._packed]
    return sum(t.numel() * t.element_size() for t in held)


def _highest(profiler: profile) -> int:
    """The highest sum of the allocator's events, which are positive for new and negative for freed memory."""
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == DeviceType.CPU]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not say how much memory the process has (no {name} in /proc/self/status)")


def _work(question: dict[str, Any]) -> Work:
    return Work(config=from_dict(ModelConfig, question.pop("config")), **question)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(peak_bytes(_work(json.loads(argument)))), flush=True)
