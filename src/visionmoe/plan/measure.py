"""The memory of real steps, to check plans by: the peak of what tensors hold, and that of the process.

    python -m visionmoe.plan.measure LAYOUT '{"config": {...}, "batch_size": 8, ...}' ...

prints one JSON line for each argument, of the process with the most: resident_bytes, the process' peak above what it
had before the model, and, of one process, tensor_bytes, as torch's allocator reports it to the profiler. Of several it
cannot report it, because gloo's threads free tensors, too: there `ask` measures the process once more, with every
block in a mapping of its own, so that the system gets freed ones back at once.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from visionmoe.allocation import keep_freed_memory
from visionmoe.config import ModelConfig, from_dict, to_dict
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import current, gather, joined
from visionmoe.model.skeleton import materialise, skeleton
from visionmoe.model.vit import VisionTransformer
from visionmoe.plan.work import Work, torch_dtype
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.parallel import Parallel
from visionmoe.train.step import StepSettings, train_step

CALLS = 3  # from the second on there is the optimizer's state, and the heap hardly grows
_MARK = 1_234_567  # bytes that nothing else has: where the profiler's events of the last call begin
_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}  # glibc's; smaller blocks in its heap


def ask(*works: Work, layout: Layout | None = None, heap: bool = True) -> list[dict[str, int]]:
    """Measured one after the other in fresh processes on a CPU; the resident bytes of the first alone mean something.

    Where the layout has several processes, that goes for both numbers; heap=False leaves out the resident bytes there.
    RuntimeError with the processes' last words where they fail.
    """
    layout = layout or Layout()
    if layout.size == 1:
        return _run(layout, works, {})
    once = {"OMP_NUM_THREADS": "1"}
    tensors = [{"tensor_bytes": found["resident_bytes"]} for found in _run(layout, works, once | _MAPPINGS)]
    return [one | other for one, other in zip(_run(layout, works, once), tensors, strict=True)] if heap else tensors


def _run(layout: Layout, works: Sequence[Work], environment: dict[str, str]) -> list[dict[str, int]]:
    start = [sys.executable, "-m"]
    if layout.size > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.size), "-m"]
    command = [*start, "visionmoe.plan.measure", str(layout), *(json.dumps(_question(work)) for work in works)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"the processes that measure failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _question(work: Work) -> dict[str, Any]:
    return {f.name: getattr(work, f.name) for f in fields(work)} | {"config": to_dict(work.config)}


def peak_bytes(work: Work, layout: Layout) -> dict[str, int]:
    """In this process; first what the process holds at most in CALLS steps or calls, then what tensors hold in one."""
    _made(_tiny(work, layout), layout)()  # loads the libraries
    before = _resident("VmRSS")
    call = _made(work, layout)
    for _ in range(CALLS):
        call()
    found = {"resident_bytes": _resident("VmHWM") - before}
    del call
    return found if layout.size > 1 else found | {"tensor_bytes": _tensors(work, layout)}


def _tensors(work: Work, layout: Layout) -> int:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call = _made(work, layout)
        call()  # packs weights, makes the optimizer's state
        torch.empty(_MARK, dtype=torch.uint8)
        call()
    return _highest(profiler)


def _tiny(work: Work, layout: Layout) -> Work:
    config = ModelConfig(image_size=32, num_classes=10, hidden_size=32, num_layers=1, mlp_dim=32, num_heads=1)
    if work.config.moe.layers:
        config = config.replace(num_experts=2 * layout.ep, num_selected_experts=1, layers=(0,))
    return replace(work, config=config, batch_size=work.accumulation * layout.size)


def _made(work: Work, layout: Layout) -> Callable[[], None]:
    """The step or call of a model, made as a run makes them: no process ever holds what it does not keep."""
    torch.manual_seed(0)
    return _training(work, layout) if work.training else _inference(work)


def _training(work: Work, layout: Layout) -> Callable[[], None]:
    device, parallel = torch.device("cpu"), Parallel(layout, current())
    model = skeleton(VisionTransformer, work.config).train()
    parallel.spread(model, device)
    materialise(model.to_empty(device=device))
    classes, own = model.config.num_classes or 1, work.batch_size // layout.size
    images, labels = _images(work, own), torch.arange(own) % classes
    optimizer = create_optimizer(
        model.named_parameters(), name=work.optimizer, total_steps=10, learning_rate=1e-4, **work.options
    )
    forward = parallel.wrap(model, device)
    settings = StepSettings(
        create_loss("softmax"), classes, seed=0, accumulation=work.accumulation, precision=work.precision
    )

    def call() -> None:
        train_step(forward, optimizer, images, labels, 0, settings, parallel)

    return call


def _inference(work: Work) -> Callable[[], None]:
    dtype = torch_dtype(work.precision)
    model = skeleton(VisionTransformer, work.config).eval().to(dtype)
    materialise(model.to_empty(device="cpu"))
    images = _images(work, work.batch_size).to(dtype)

    @torch.no_grad()
    def call() -> None:
        model(images)

    return call


def _images(work: Work, number: int) -> torch.Tensor:
    return torch.randn(number, work.config.in_channels, *work.config.image_hw)


def _highest(profiler: profile) -> int:
    """The highest sum, behind the mark, of the allocator's events, positive for new and negative for freed memory."""
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    events = sorted((e for e in events if e.device_type() == DeviceType.CPU), key=lambda e: e.start_ns())
    now = highest = 0
    for event in events:
        now += event.nbytes()
        highest = 0 if event.nbytes() == -_MARK else max(highest, now)
    return highest


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not say how much memory the process has (no {name} in /proc/self/status)")


def _work(question: dict[str, Any]) -> Work:
    return Work(config=from_dict(ModelConfig, question.pop("config")), **question)


def main(layout: Layout, questions: list[str]) -> None:
    for question in questions:
        work = _work(json.loads(question))
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            keep_freed_memory()  # as every command does
        found = gather(peak_bytes(work, layout))
        if current().is_first:
            print(json.dumps({name: max(one[name] for one in found) for name in found[0]}), flush=True)


if __name__ == "__main__":
    with joined():
        main(Layout.parse(sys.argv[1]), sys.argv[2:])
