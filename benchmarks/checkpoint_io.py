"""Loading a checkpoint against reading the same bytes, from a warm cache and from the disk, and its peak of memory.

    python benchmarks/checkpoint_io.py --out benchmarks/results/checkpoint_io.json

A V-MoE-B/16 (8 experts in every second block, 1.1 GB of float32) is written to a temporary folder in both formats: as
a directory (config.json, model.safetensors) and as the released format. Times are medians of turns; every turn runs a
way twice and counts the second. For the `cold` ones the system is told to forget the files before every reading
(Linux's posix_fadvise; it does not reach caches of a virtual machine's host). `peak` is what a process of its own holds
at most while loading, in sizes of the model.
Target: `visionmoe.load` of the directory takes at most 1.2 times `numpy.fromfile`, the peak is at most 1.1 sizes.
"""

import argparse
import datetime
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import visionmoe as vm
from visionmoe.checkpoint import params_from_vmoe, params_to_vmoe, read_vmoe, write_vmoe
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json

TIME_TARGET, PEAK_TARGET = 1.2, 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="vmoe_b16_e8_every2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_of_loading(*arguments.peak))
        return
    if arguments.out is None:
        parser.error("--out is required")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments)
    machine = {"cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__}
    command = " ".join(["python", *sys.argv])
    write_json(arguments.out, {"date": str(datetime.date.today()), "machine": machine, "command": command, **results})


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    config = vm.get_config(arguments.model)
    directory, prefix = folder / "model", folder / "released"
    model = vm.create_model(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory)
    write_vmoe(prefix, params_to_vmoe(model.state_dict(), config))
    del model
    flat = read_vmoe(prefix)
    weights = directory / "model.safetensors"
    ways: dict[str, Callable[[], object]] = {
        "numpy.fromfile of model.safetensors": functools.partial(np.fromfile, weights, np.uint8),
        "safetensors load_file, every page touched": functools.partial(mapped_and_touched, weights),
        "visionmoe.load of the directory": functools.partial(vm.load, directory),
        "read_vmoe": functools.partial(read_vmoe, prefix),
        "params_from_vmoe": functools.partial(params_from_vmoe, flat, config),
        "visionmoe.load of the released format": functools.partial(vm.load, prefix, config),
    }
    # uncounted first: some systems take files out of memory while the other ways run
    rows = in_turns(ways, lambda way: way(), arguments.repeats, size)
    read = {name: way for name, way in ways.items() if name.startswith(("numpy", "visionmoe.load"))}
    cold = in_turns(read, lambda way: forget(folder), arguments.repeats, size)
    peaks = {
        "directory": statistics.median(peak_in_a_process([str(directory)]) for _ in range(3)),
        "released format": statistics.median(
            peak_in_a_process([str(prefix), str(directory / "config.json")]) for _ in range(3)
        ),
    }
    for row in (*rows, "cold", *cold, peaks):
        print(row, flush=True)
    return {
        "model": arguments.model,
        "bytes": size,
        "rounds": arguments.repeats,
        "times": rows,
        "cold": cold,
        "peaks": peaks,
        "targets": {"ratio": TIME_TARGET, "peak": PEAK_TARGET},
        "met": rows[2]["ratio"] <= TIME_TARGET and max(peaks.values()) <= PEAK_TARGET,
    }


def in_turns(
    ways: dict[str, Callable[[], object]], prepare: Callable[[Callable[[], object]], object], repeats: int, size: int
) -> list[dict]:
    """Median seconds of each way, made ready by `prepare` every time, and the ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            prepare(way)
            start = time.perf_counter()
            made = way()
            times[name].append(time.perf_counter() - start)
            del made
    seconds = {name: statistics.median(own) for name, own in times.items()}
    raw = next(iter(seconds.values()))
    return [
        {"way": name, "seconds": round(s, 4), "gb_per_second": round(size / s / 1e9, 2), "ratio": round(s / raw, 3)}
        for name, s in seconds.items()
    ]


def forget(folder: Path) -> None:
    """Takes the folder's files out of the system's memory."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mapped_and_touched(path: Path) -> float:
    """safetensors maps the file: nothing is read before a page is touched."""
    return sum(float(tensor.view(-1)[::1024].sum()) for tensor in load_file(path).values())


def peak_in_a_process(where: list[str]) -> float:
    command = [sys.executable, __file__, "--peak", *where]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_of_loading(path: str, config: str | None = None) -> float:
    """Memory at its highest while loading, above what it was before, in sizes of the model. Linux."""
    with tempfile.TemporaryDirectory() as folder:  # everything is imported and warm
        vm.create_model("vit_b32", num_layers=1).save_pretrained(folder)
        vm.load(folder)
    before = memory("VmRSS")
    model = vm.load(path, config)
    return round((memory("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()), 3)


def memory(kind: str) -> int:
    found = re.search(kind + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
