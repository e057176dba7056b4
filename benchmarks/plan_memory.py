"""Plans of memory against measured peaks of whole models, each in processes of its own, on a CPU.

    python benchmarks/plan_memory.py --out benchmarks/results/plan_memory.json

Two measurements: tensor_bytes, what tensors hold at most in a step or call, as torch's allocator reports it to the
profiler (of several processes: what they hold with every block in a mapping of its own), and resident_bytes, by which
the process' resident memory has grown at its highest in three; of several that of the one with most. Target: the
plan's two numbers are within 10 % of them. The factors of the second (visionmoe/plan/process.py) were chosen by the
cases of FITTED, that of FSDP by two of SPREAD; those of CHECKED, others in width, depth, batch and experts, had no part
in it. Started again, it measures what the file does not have yet.
"""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import torch

from visionmoe.distributed.layout import Layout
from visionmoe.evaluate.timing import device_name
from visionmoe.files import read_json, write_json
from visionmoe.plan.measure import ask
from visionmoe.plan.memory import memory
from visionmoe.plan.optimizer import held
from visionmoe.plan.process import process
from visionmoe.plan.work import Work
from visionmoe.variants import get_config

TARGET = 0.1
ADAFACTOR = {"optimizer": "adafactor", "options": {"momentum_dtype": "bfloat16", "min_dim_size_to_factor": 33}}
SGD = {"optimizer": "sgd", "options": {"momentum": 0.9}}
BF16, INFER = {"precision": "bfloat16"}, {"mode": "inference"}
NARROW = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_layers": 12}
FITTED = (
    ("vit_s16", 24, {}),
    ("vit_b32", 24, SGD),
    ("vmoe_s16_e8_every2", 12, {}),
    ("vmoe_s32_e16_last2", 40, SGD),
    ("vmoe_b32_e8_last2", 24, ADAFACTOR),
    ("vmoe_b32_e8_every2", 2, ADAFACTOR),
    ("vmoe_s16_e8_last2", 20, BF16),
    ("vmoe_s16_e8_last2", 48, {"accumulation": 4}),
    ("vit_s16", 96, INFER),
    ("vmoe_s16_e8_every2", 96, INFER),
    ("vmoe_b32_e8_last2", 128, INFER),
    ("vmoe_s16_e8_every2", 96, INFER | BF16),
)  # fmt: skip
CHECKED = (
    ("vit_s32", 64, {"model": NARROW}),
    ("vmoe_s32_e8_every2", 48, SGD | {"model": {"num_experts": 4, "num_selected_experts": 1}}),
    ("vmoe_b32_e8_last2", 16, BF16),
    ("vmoe_s16_e16_last2", 6, ADAFACTOR),
    ("vmoe_s16_e8_every2", 16, BF16 | {"accumulation": 2, "model": NARROW}),
    ("vit_b32", 160, INFER),
    ("vmoe_s32_e16_every2", 200, INFER),
    ("vmoe_s16_e8_last2", 40, INFER | {"model": NARROW}),
    ("vit_b32", 200, INFER | BF16),
    ("vmoe_b32_e8_every2", 64, INFER | BF16),
)  # fmt: skip
SPREAD = (
    ("vmoe_s32_e8_last2", 32, {"layout": "dp=2"}),
    ("vmoe_s32_e8_last2", 32, {"layout": "ep=2"}),
    ("vmoe_s32_e8_last2", 32, {"layout": "fsdp=2"}),
    ("vmoe_s32_e8_last2", 32, {"layout": "fsdp=2", "accumulation": 2}),
    ("vit_s32", 48, SGD | {"layout": "dp=2"}),
    ("vit_s32", 48, SGD | {"layout": "fsdp=2"}),
    ("vmoe_s32_e8_last2", 32, BF16 | {"layout": "ep=2"}),
    ("vmoe_s32_e8_last2", 32, {"layout": "fsdp=2,ep=2"}),
    ("vmoe_s32_e8_last2", 32, {"layout": "dp=2,ep=2"}),
)  # fmt: skip
CASES = [
    (kind, *case) for kind, cases in (("fitted", FITTED), ("checked", CHECKED), ("spread", SPREAD)) for case in cases
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_memory.json"))
    parser.add_argument("--most", type=int, default=len(CASES), help="cases to measure now")
    parser.add_argument("--kinds", nargs="+", default=["fitted", "checked", "spread"])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
    given = parser.parse_args()
    rows = read_json(given.out)["rows"] if given.out.exists() else []
    there = [(row["kind"], row["model"], row["batch_size"], row["options"]) for row in rows]
    left = [case for case in CASES if case not in there and case[0] in given.kinds][: given.most]
    left = [CASES[number] for number in given.only if CASES[number] in left] if given.only else left
    for case in left:
        rows.append(measured(*case))
        print(
            {name: rows[-1][name] for name in ("model", "options", "plan_over_tensors", "plan_over_resident")},
            flush=True,
        )
        write_json(given.out, summary(rows))
    write_json(given.out, summary(rows))


def measured(kind: str, model: str, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    layout = Layout.parse(options.get("layout", "dp=1"))
    of_work = {name: value for name, value in options.items() if name not in ("layout", "model")}
    work = Work(get_config(model).replace(**options.get("model", {})), batch_size, **of_work)
    (found,) = ask(work, layout=layout)
    return row(kind, model, batch_size, options, work, layout, found)


def row(
    kind: str, model: str, batch_size: int, options: dict[str, Any], work: Work, layout: Layout, found: dict[str, int]
) -> dict[str, Any]:
    sizes = held(work)
    planned = memory(work, layout, sizes)
    whole = process(work, layout, planned, sizes)
    return {
        "kind": kind,
        "model": model,
        "batch_size": batch_size,
        "options": options,
        "planned_bytes": planned.peak,
        "planned_resident_bytes": whole.beside_imports,
        **found,
        "plan_over_tensors": round(planned.peak / found["tensor_bytes"], 3),
        "plan_over_resident": round(whole.beside_imports / found["resident_bytes"], 3),
        "at_peak": planned.at_peak,
        "moment": planned.moment,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def met(name: str, kind: str) -> str:
        own = [row[name] for row in rows if row["kind"] == kind]
        return f"{sum(abs(ratio - 1) <= TARGET for ratio in own)} of {len(own)}"

    return {
        "date": datetime.date.today().isoformat(),
        "machine": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "target": f"within {TARGET:.0%} of both",
        "tensors_met": {kind: met("plan_over_tensors", kind) for kind in ("fitted", "checked", "spread")},
        "resident_met": {kind: met("plan_over_resident", kind) for kind in ("fitted", "checked", "spread")},
        "rows": rows,
    }


if __name__ == "__main__":
    main()
