"""Weak and strong scaling of a training step over processes of this machine, and the share of communication.

    python benchmarks/scaling.py --out benchmarks/results/scaling_cpu.json

Every layout runs in a job of its own (gloo, one thread per process); the layouts take turns, --rounds times, medians
count. weak: --batch images per process; strong: --batch images together. exposed: the part of a step's time that
vanishes when nothing is sent (messages are replaced by local copies, gradients not averaged), so what overlap with the
computation has not hidden (not measured for FSDP). in_four_messages: experts' rows in four, as between GPUs.
Where there are more processes than cores, they compete for these and not only for the network.
"""

import argparse
import contextlib
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import visionmoe as vm
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import barrier, current, joined
from visionmoe.evaluate.timing import device_name
from visionmoe.files import read_json, write_json
from visionmoe.model.experts import Experts
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.parallel import Parallel
from visionmoe.train.step import StepSettings, train_step

LAYOUTS = ("dp=1", "dp=2", "ep=2", "fsdp=2", "dp=4", "ep=4", "fsdp=4", "dp=2,ep=2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="vmoe_s32_e8_every2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed in every round, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--worker", nargs=2, metavar=("LAYOUT", "BATCH"), help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.worker:
        with joined():
            worker(arguments, arguments.worker[0], int(arguments.worker[1]))
        return
    jobs = [(layout, kind) for layout in arguments.layouts for kind in ("weak", "strong")]
    found: dict[tuple[str, str], list[dict]] = {job: [] for job in jobs}
    for _ in range(arguments.rounds):
        for layout, kind in jobs:
            size = Layout.parse(layout).size
            if kind == "strong" and size == 1:
                continue
            found[layout, kind].append(job(arguments, layout, arguments.batch * (size if kind == "weak" else 1)))
    rows = [summary(*key, measured) for key, measured in found.items() if measured]
    one = next((row["images_per_second"] for row in rows if row["layout"] == "dp=1"), None)
    for row in rows:
        row["speedup"] = None if one is None else round(row["images_per_second"] / one, 3)
        print(row, flush=True)
    machine = {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(), "torch": torch.__version__}
    command = " ".join(["python", *sys.argv])
    write_json(
        arguments.out,
        {
            "date": str(datetime.date.today()),
            "machine": machine,
            "command": command,
            "model": arguments.model,
            "rows": rows,
        },
    )


def job(arguments: argparse.Namespace, layout: str, batch: int) -> dict:
    """Starts the processes of one layout; what the first of them measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        own = ["--out", str(out), "--model", arguments.model, "--image-size", str(arguments.image_size),
               "--steps", str(arguments.steps), "--worker", layout, str(batch)]  # fmt: skip
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, str(Layout.parse(layout).size), __file__, *own], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return read_json(out)


def summary(layout: str, kind: str, measured: list[dict]) -> dict:
    names = ("step_ms", "in_four_messages_ms", "silent_ms")
    medians = {name: statistics.median(one[name] for one in measured) if measured[0][name] else None for name in names}
    step, silent_step, batch = medians["step_ms"], medians["silent_ms"], measured[0]["batch"]
    assert step is not None
    return {
        "layout": layout,
        "scaling": kind,
        "batch": batch,
        **{name: value and round(value, 1) for name, value in medians.items()},
        "images_per_second": round(1e3 * batch / step, 2),
        "exposed_share": silent_step and round(max(0.0, 1 - silent_step / step), 3),
    }


def worker(arguments: argparse.Namespace, layout: str, batch: int) -> None:
    world = current()
    torch.manual_seed(0)
    model = vm.create_model(arguments.model, num_classes=1000, image_size=arguments.image_size, group_size="image")
    device = torch.device("cpu")
    parallel = Parallel(Layout.parse(layout, world.size), world)
    parallel.spread(model, device)
    optimizer = create_optimizer(model.named_parameters(), name="sgd", total_steps=10_000, learning_rate=1e-3)
    forward = parallel.wrap(model, device)
    settings = StepSettings(create_loss("softmax"), 1000, 0)
    images = torch.randn(batch // world.size, 3, arguments.image_size, arguments.image_size)
    labels = torch.zeros(len(images), dtype=torch.int64)

    def step() -> None:
        train_step(forward, optimizer, images, labels, 0, settings, parallel)

    model.train()
    step()
    contexts = {"step_ms": contextlib.nullcontext}
    if parallel.layout.ep > 1:
        contexts["in_four_messages_ms"] = lambda: four_messages(model)
    if parallel.layout.fsdp == 1 and world.size > 1:
        contexts["silent_ms"] = lambda: silent(parallel)
    times: dict[str, list[float]] = {name: [] for name in ("step_ms", "in_four_messages_ms", "silent_ms")}
    for _ in range(arguments.steps):
        for name, context in contexts.items():
            with context():
                times[name].append(milliseconds(step))
    if world.is_first:
        medians = {name: statistics.median(own) if own else None for name, own in times.items()}
        write_json(arguments.out, {"batch": batch, **medians})


@contextlib.contextmanager
def four_messages(model: vm.VisionTransformer) -> Iterator[None]:
    """Within it the rows of the experts travel in four messages, each beside the computation of another part."""
    exchanges = [m.exchange for m in model.modules() if isinstance(m, Experts) and m.exchange is not None]
    before = [exchange.parts for exchange in exchanges]
    for exchange in exchanges:
        exchange.parts = 4
    try:
        yield
    finally:
        for exchange, parts in zip(exchanges, before, strict=True):
            exchange.parts = parts


@contextlib.contextmanager
def silent(parallel: Parallel) -> Iterator[None]:
    """Within it nothing is sent: messages are copied in the process, and gradients are not averaged."""

    class Done:
        def wait(self) -> None:
            pass

    def copy(out: Tensor, x: Tensor, **options: Any) -> Done:
        out.copy_(x)
        return Done()

    def nothing(x: Tensor, *arguments: Any, **options: Any) -> Done:
        return Done()

    before = dist.all_to_all_single, dist.all_reduce, parallel.part
    dist.all_to_all_single, dist.all_reduce = copy, nothing  # type: ignore[assignment]
    parallel.part = lambda last: before[2](last=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.all_to_all_single, dist.all_reduce, parallel.part = before  # type: ignore[method-assign]


def milliseconds(run: Callable[[], Any]) -> float:
    """Time of one call, every process starting together, the slowest counting."""
    barrier()
    start = time.perf_counter()
    run()
    barrier()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
