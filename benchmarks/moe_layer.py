"""Time of one MoE layer against a dense MLP over the same kept tokens, interleaved in one run.

    python benchmarks/moe_layer.py --out benchmarks/results/moe_layer_cpu.json

The dense MLP has one expert's shape and gets as many rows as the layer keeps requests, so both do the same matrix
products. Medians over all repetitions; `ratio` is the median of the ratios of neighbours in time.
"""

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path

import torch

from visionmoe.config import MoEConfig
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json
from visionmoe.model.layers import Mlp
from visionmoe.model.moe import MoE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for factor in (1.05, 0.5, 0.15):
            for backward in (False, True):
                rows.append(compare(dtype, factor, backward, arguments.repeats))
                print(rows[-1], flush=True)
    machine = {"cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__}
    command = " ".join(["python", *sys.argv])
    write_json(
        arguments.out, {"date": str(datetime.date.today()), "machine": machine, "command": command, "rows": rows}
    )


def compare(dtype: torch.dtype, factor: float, backward: bool, repeats: int) -> dict:
    """One row: B/16 size, 8 images (1576 tokens), E=8, K=2."""
    torch.manual_seed(0)
    hidden, width, images, tokens = 768, 3072, 8, 197
    moe = MoE(MoEConfig(num_experts=8, layers=(0,), capacity_factor=factor), 0, hidden, width)
    moe.reset_parameters()
    moe, mlp = moe.to(dtype).eval(), Mlp(hidden, width).to(dtype).eval()
    x = torch.randn(images, tokens, hidden, dtype=dtype, requires_grad=backward)
    routing, _, _ = moe.router(x.view(1, -1, hidden), moe.setting)
    kept = int(routing.kept.sum())
    dense = torch.randn(kept, hidden, dtype=dtype, requires_grad=backward)

    def run_moe() -> None:
        with torch.set_grad_enabled(backward):
            out = moe(x).tokens
        if backward:
            out.backward(torch.ones_like(out))
            moe.zero_grad()

    def run_dense() -> None:
        with torch.set_grad_enabled(backward):
            out = mlp(dense)
        if backward:
            out.backward(torch.ones_like(out))
            mlp.zero_grad()

    times: dict[str, list[float]] = {"moe": [], "dense": []}
    for _ in range(repeats + 5):
        for name, run in (("moe", run_moe), ("dense", run_dense)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    moe_times, dense_times = times["moe"][5:], times["dense"][5:]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "capacity_factor": factor,
        "backward": backward,
        "kept_requests": kept,
        "moe_ms": round(statistics.median(moe_times) * 1e3, 2),
        "dense_ms": round(statistics.median(dense_times) * 1e3, 2),
        "ratio": round(statistics.median(a / b for a, b in zip(moe_times, dense_times, strict=True)), 3),
    }


if __name__ == "__main__":
    main()
