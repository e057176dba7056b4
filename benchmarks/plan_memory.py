"""Plans of memory against measured peaks of whole models, each in a process of its own, on a CPU.

    python benchmarks/plan_memory.py --out benchmarks/results/plan_memory.json

Two measurements of the second training step or call: tensor_bytes, what tensors hold at most, as torch's allocator
reports it to the profiler (with oneDNN's packed weights), and resident_bytes, by which the process' resident memory has
grown at its highest. Target: the plan is within 10 % of both.
"""

import argparse
import datetime
import sys
from pathlib import Path

import torch

from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json
from visionmoe.plan.layout import Layout
from visionmoe.plan.measure import ask
from visionmoe.plan.memory import memory
from visionmoe.plan.work import Work
from visionmoe.variants import get_config

TARGET = 0.1
ADAFACTOR = {"optimizer": "adafactor", "options": {"momentum_dtype": "bfloat16", "min_dim_size_to_factor": 33}}
SGD = {"optimizer": "sgd", "options": {"momentum": 0.9}}
CASES = (
    ("vit_s16", 24, {}),
    ("vit_b32", 24, SGD),
    ("vmoe_s16_e8_every2", 12, {}),
    ("vmoe_s32_e16_last2", 40, SGD),
    ("vmoe_b32_e8_last2", 24, ADAFACTOR),
    ("vmoe_b32_e8_every2", 2, ADAFACTOR),
    ("vmoe_s16_e8_last2", 20, {"precision": "bfloat16"}),
    ("vmoe_s16_e8_last2", 48, {"accumulation": 4}),
    ("vit_s16", 96, {"mode": "inference"}),
    ("vmoe_s16_e8_every2", 96, {"mode": "inference"}),
    ("vmoe_b32_e8_last2", 128, {"mode": "inference"}),
    ("vmoe_s16_e8_every2", 96, {"mode": "inference", "precision": "bfloat16"}),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_memory.json"))
    out = parser.parse_args().out
    rows = []
    for model, batch_size, options in CASES:
        work = Work(get_config(model), batch_size, **options)
        planned, (measured,) = memory(work, Layout()), ask(work)
        row = {"model": model, "batch_size": batch_size, **options, "planned_bytes": planned.peak, **measured}
        row |= {"plan_over_tensors": planned.peak / measured["tensor_bytes"]}
        row |= {"plan_over_resident": planned.peak / measured["resident_bytes"], "at_peak": planned.at_peak}
        row["moment"] = planned.moment
        rows.append(row)
        print(f"{model}, {batch_size} images, {options or 'adam'}: plan {planned.peak / 1e6:,.0f} MB, tensors "
              f"{row['plan_over_tensors']:.3f}, resident {row['plan_over_resident']:.3f}", flush=True)  # fmt: skip
    write_json(
        out,
        {
            "date": datetime.date.today().isoformat(),
            "machine": device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "command": " ".join(["python", *sys.argv]),
            "target": f"within {TARGET:.0%} of both",
            "tensors_met": sum(abs(row["plan_over_tensors"] - 1) <= TARGET for row in rows),
            "resident_met": sum(abs(row["plan_over_resident"] - 1) <= TARGET for row in rows),
            "of": len(rows),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
