"""The 15-billion model of the paper on this machine: forward passes with experts streamed from the disk.

    python benchmarks/vmoe_15b.py --dir /tmp/vmoe15b --out benchmarks/results/vmoe_15b.json

Writes vmoe_15b in bfloat16 with random parameters into --dir where it is not there yet (29.4 GB, one block in memory at
a time) and removes it at the end, unless --keep. A process of its own loads it with `load_streamed` and makes forward
passes, each from a cold cache of the file: images/s, bytes that crossed the disk, time in which the computation waited
for experts, and the process' memory at its highest. A random router sends most tokens to few experts; the first,
uncounted pass takes the mean token out of each router's weights, after which nearly all experts get tokens, as a
trained model's do. On a GPU (--device cuda) the experts cross to it one by one, or stay there with --resident.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visionmoe as vm
from visionmoe.bench.memory import resident
from visionmoe.checkpoint import load_streamed, write_random_pretrained
from visionmoe.checkpoint.streaming import traffic
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json
from visionmoe.model.pretrained import WEIGHTS_NAME
from visionmoe.model.streaming import READ_AHEAD

GIB = 2**30
LIMIT = 24 * GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="vmoe_15b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--lower-batches", type=int, nargs="+", default=[32, 64], help="those at capacity factor 0.5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resident", action="store_true", help="all experts on the device: for a GPU that holds them")
    parser.add_argument("--read-ahead", type=int, default=READ_AHEAD)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    if arguments.out is None:
        parser.error("--out is required")
    made = make(arguments.dir, arguments.model)
    try:
        command = [sys.executable, *sys.argv, "--measure"]
        rows = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                rows.append(json.loads(line))
                print(rows[-1], flush=True)
                write_json(arguments.out, report(made, rows))  # what was measured is kept, should the rest fail
        if process.returncode:
            raise RuntimeError(f"the process that measures ended with {process.returncode}")
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.dir)


def report(made: dict, rows: list[dict]) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = max(row["peak_resident_gib"] for row in rows)
    machine = {
        "cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "memory_gib": round(memory / GIB, 2),
    }  # fmt: skip
    return {
        "date": str(datetime.date.today()), "machine": machine, "command": " ".join(["python", *sys.argv]),
        "written": made, "loading": rows[0], "rows": rows[1:], "peak_resident_gib": peak,
        "target": "peak resident memory, pages of the file included, below 24 GiB", "met": peak < LIMIT / GIB,
    }  # fmt: skip


def make(directory: Path, name: str) -> dict[str, Any]:
    """Writes the model where it is not there yet. Every expert has values of its own."""
    config = vm.get_config(name).replace(split_rngs=True)
    path = directory / WEIGHTS_NAME
    seconds = None
    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(directory).free, 31 * 10**9
        if name == "vmoe_15b" and free < needed:
            raise OSError(f"{directory} has {free / 1e9:.0f} GB free, the model takes {needed / 1e9:.0f}")
        start = time.perf_counter()
        write_random_pretrained(config, directory, torch.bfloat16)
        seconds = round(time.perf_counter() - start, 1)
    return {"model": name, "dtype": "bfloat16", "file_bytes": path.stat().st_size, "seconds": seconds}


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> None:
    """Prints a line of JSON for the loading and for every setting."""
    device = torch.device(arguments.device)
    start = time.perf_counter()
    model = load_streamed(arguments.dir, device=device, read_ahead=arguments.read_ahead)
    if arguments.resident:
        model.to(device)
    memory = Memory()
    loaded = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_parameters": sum(p.numel() for n, p in model.named_parameters() if ".experts." in n),
        "seconds": round(time.perf_counter() - start, 2),
        "read_ahead_bytes": arguments.read_ahead,
    }
    print(json.dumps(loaded | memory.row()), flush=True)
    hooks = [model.moe_layer(layer).router.register_forward_pre_hook(balance) for layer in model.moe_layers]
    model(images(model, 16, device))
    for hook in hooks:
        hook.remove()
    settings = [(batch, 1.05, False) for batch in arguments.batches]
    settings += [(batch, 0.5, True) for batch in arguments.lower_batches]
    for batch, capacity_factor, priority in settings:
        model.set_routing(capacity_factor=capacity_factor, batch_priority=priority)
        row = forward(model, arguments.dir / WEIGHTS_NAME, batch, device)
        routing = {"batch": batch, "capacity_factor": capacity_factor, "batch_priority": priority}
        print(json.dumps(routing | row | memory.row()), flush=True)


def forward(model: vm.VisionTransformer, path: Path, batch: int, device: torch.device) -> dict[str, Any]:
    """One pass, with nothing of the file in the system's cache before it."""
    given = images(model, batch, device)
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    streamed = model.moe_layer(model.moe_layers[0]).experts.stream is not None
    before = dict(vars(traffic(model))) if streamed else {}
    disk, cpu, start = disk_bytes(), time.process_time(), time.perf_counter()
    features = model.forward_features(given)
    spread = features.float().std().item()  # also waits for a GPU
    seconds = time.perf_counter() - start
    if not spread > 0:
        raise RuntimeError(f"the features are of no use: their standard deviation is {spread}")
    after = vars(traffic(model)) if streamed else {}
    done = {name: after[name] - before[name] for name in before}
    flops = vm.count_flops(model, batch_size=batch)
    read = disk_bytes() - disk
    return {
        "seconds": round(seconds, 2), "images_per_second": round(batch / seconds, 4),
        "cpu_seconds": round(time.process_time() - cpu, 2), "gflop_per_image": round(flops / 1e9, 1),
        "tflop_per_second": round(flops * batch / seconds / 1e12, 3), "disk_bytes": read,
        "disk_gb_per_second": round(read / seconds / 1e9, 2), "experts_read": done.get("experts", 0),
        "experts_bytes": done.get("bytes", 0), "experts_read_in_vain": done.get("unused", 0),
        "waited_share": round(done.get("waited", 0.0) / seconds, 4), "features_std": round(spread, 4),
    }  # fmt: skip


def balance(router: nn.Module, inputs: tuple[Tensor, Any]) -> None:
    """Takes the mean token out of the router's weights: a hook, before the router's own forward pass."""
    mean = inputs[0].float().flatten(0, 1).mean(dim=0)
    gate: Any = router.gate
    gate.weight.sub_(((gate.weight.float() @ mean)[:, None] * mean / (mean @ mean)).to(gate.weight.dtype))


def images(model: vm.VisionTransformer, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, model.config.in_channels, *model.config.image_hw)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(device, torch.bfloat16)


class Memory:
    """The process' memory at its highest so far; its anonymous part by looking 20 times a second."""

    def __init__(self) -> None:
        self.anonymous = 0
        threading.Thread(target=self._look, daemon=True).start()

    def row(self) -> dict[str, float]:
        peak = {"peak_resident_gib": round(resident("VmHWM") / GIB, 3)}
        peak["peak_anonymous_gib"] = round(max(self.anonymous, resident("RssAnon")) / GIB, 3)
        if torch.cuda.is_available():
            peak["peak_device_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        return peak

    def _look(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, resident("RssAnon"))
            time.sleep(0.05)


def disk_bytes() -> int:
    """Bytes that the disk gave to this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    main()
