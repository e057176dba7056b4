"""The peak of tensor memory of a real step, as torch's allocator reports it to the profiler; to check plans by.

    python -m visionmoe.plan.measure '{"config": {...}, "batch_size": 8, ...}'

prints one JSON line: tensor_bytes, the peak of what tensors hold on a CPU, and resident_bytes, that of the process
above what it had before the model.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from visionmoe.config import ModelConfig, from_dict, to_dict
from visionmoe.model.vit import VisionTransformer, create_model
from visionmoe.plan.work import Work
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.step import StepSettings, train_step


def ask(work: Work) -> dict[str, int]:
    """Measured in a fresh process on a CPU. RuntimeError with its last words where that fails."""
    question = {"config": to_dict(work.config) | {"moe": to_dict(work.config.moe)}}
    question |= {name: getattr(work, name) for name in ("batch_size", "accumulation", "mode", "precision", "optimizer")}
    command = [sys.executable, "-m", "visionmoe.plan.measure", json.dumps(question | {"options": work.options})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures failed: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes(work: Work) -> dict[str, int]:
    """Of the second step or call, which has the optimizer's state, too, in this process."""
    before = _resident("VmRSS")
    torch.manual_seed(0)
    model = create_model(work.config)
    call, held = _training(work, model) if work.training else _inference(work, model)
    call()
    sizes = sum(_storages(held()).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return {"tensor_bytes": sizes + _highest(profiler), "resident_bytes": _resident("VmHWM") - before}


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
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [*model.parameters(), *gradients, *states, images, labels]

    return call, held


def _inference(work: Work, model: VisionTransformer) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[work.precision]
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


def _highest(profiler: profile) -> int:
    """The highest sum of the allocator's events, which are positive for new and negative for freed memory."""
    kineto = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in kineto.events() if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
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
    print(json.dumps(peak_bytes(_work(json.loads(sys.argv[1])))))
