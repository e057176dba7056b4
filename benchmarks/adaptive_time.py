"""Time of whole models at lower capacity and K: whether the time falls with the operations.

    python benchmarks/adaptive_time.py --out benchmarks/results/adaptive_time_cpu.json

V-MoE-B/16 (E 8, every 2) at batch 8, and a small model, forward only: share of the time against share of the operations
at K = 2 and 1, batch-priority. Every setting in turns with K = 2, C = 1 (neighbours in time), medians over the
repetitions; `ratio` is the median of the ratios to it of the same round. Target: within 5 points. (The layer alone is
measured by `visionmoe bench --sections adaptive`.)

Routers of random models prefer some experts. So that C = 1 keeps nearly all requests, as in a trained model, gates get
weights that choose evenly (`visionmoe.bench.build.settle_gates`).
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import visionmoe as vm
from visionmoe.bench.build import settle_gates
from visionmoe.config import MoEConfig, RoutingSetting
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json

MODEL_TARGET = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")
    arguments = parser.parse_args()
    models = model_rows(arguments)
    for row in models:
        print(row, flush=True)
    machine = {"cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(
        arguments.out,
        {
            "date": str(datetime.date.today()),
            "machine": machine,
            "command": " ".join(["python", *sys.argv]),
            "repeats": arguments.repeats,
            "models": models,
        },
    )


def model_rows(arguments: argparse.Namespace) -> list[dict]:
    small = vm.ModelConfig(
        image_size=32, patch_size=4, hidden_size=192, num_layers=6, mlp_dim=768, num_heads=3, num_classes=10,
        moe=MoEConfig(num_experts=8, layers=(1, 3, 5)),
    )  # fmt: skip
    models = {"small (D 192, 6 blocks, every 2), batch 64": (small, 64)}
    if not arguments.small:
        models["V-MoE-B/16 e8 every2, batch 8"] = (vm.get_config("vmoe_b16_e8_every2"), 8)
    settings = {(k, c): RoutingSetting(k, c, True) for k, c in ((2, 1.0), (2, 0.5), (2, 0.15), (1, 1.0), (1, 0.5))}
    rows = []
    for name, (config, batch) in models.items():
        torch.manual_seed(0)
        images = torch.rand(batch, 3, *config.image_hw) * 2 - 1
        model = settle_gates(vm.create_model(config), images)
        flops = {}
        calls = {}
        for key, setting in settings.items():
            change(model, setting)
            flops[key] = vm.count_flops(model, batch_size=batch)
            calls[key] = model_call(model, images, setting)
        times = in_turns(calls, arguments)
        for key in settings:
            share = flops[key] / flops[2, 1.0]
            row = {"model": name, "num_selected_experts": key[0], "capacity_factor": key[1], "gflops": flops[key] / 1e9}
            row |= {"flops_share": round(share, 4), **compared(times, key, (2, 1.0))}
            row["time_share_minus_flops_share"] = round(row["ratio"] - share, 4)
            row |= {"target": MODEL_TARGET, "met": abs(row["time_share_minus_flops_share"]) <= MODEL_TARGET}
            rows.append(row)
        del model
    return rows


def model_call(model: vm.VisionTransformer, images: torch.Tensor, setting: RoutingSetting) -> Callable[[], None]:
    def call() -> None:
        change(model, setting)
        model(images)

    return call


def change(model: vm.VisionTransformer, setting: RoutingSetting) -> None:
    model.set_routing(setting.num_selected_experts, setting.capacity_factor, setting.batch_priority)


def in_turns(calls: dict, arguments: argparse.Namespace) -> dict:
    """Seconds of every call, one after the other in each round."""
    times: dict = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(arguments.warmup + arguments.repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: own[arguments.warmup :] for name, own in times.items()}


def compared(times: dict, name: object, reference: object) -> dict:
    ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    return {"ms": round(statistics.median(times[name]) * 1e3, 2), "ratio": round(statistics.median(ratios), 4)}


if __name__ == "__main__":
    main()
