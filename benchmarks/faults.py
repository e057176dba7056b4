"""Faults of a job of several processes: a rank killed at every step, asked to stop, and a restart after each.

    python benchmarks/faults.py --out benchmarks/results/faults_cpu.json

For every step 1 ... 20 one rank of a small training run (`visionmoe train --nproc N --parallel LAYOUT`) is killed with
SIGKILL when the log shows that step. Written down: the seconds until the command has ended, its exit code, what it
printed, whether any process is left, and whether the run, resumed, ends with the same parameters, bit for bit, as one
that nobody touched.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from visionmoe.distributed.layout import Layout
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", nargs="+", default=["dp=2", "ep=2", "fsdp=2"])
    parser.add_argument("--every", type=int, default=1, help="kill at every so many steps")
    arguments = parser.parse_args()
    rows = []
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory() as folder:
            rows += of_layout(layout, Path(folder), range(1, STEPS, arguments.every))
    machine = {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(), "torch": torch.__version__}
    command = " ".join(["python", *sys.argv])
    worst = max(row["seconds_to_end"] for row in rows)
    good = all(row["same_parameters"] and not row["left_running"] and row["exit_code"] for row in rows)
    summary = {"worst_seconds_to_end": worst, "all_restarts_exact_and_none_left": good}
    write_json(
        arguments.out,
        {"date": str(datetime.date.today()), "machine": machine, "command": command, **summary, "rows": rows},
    )
    print(summary)


def of_layout(layout: str, folder: Path, steps: range) -> list[dict]:
    run(layout, folder / "whole")
    expected = load_file(folder / "whole" / "model" / "model.safetensors")
    rows = []
    for step in steps:
        out = folder / f"killed_{step}"
        row = {"layout": layout, "step": step, **killed(layout, out, step, rank=step % Layout.parse(layout).size)}
        run(layout, out, "--resume")
        found = load_file(out / "model" / "model.safetensors")
        row["same_parameters"] = all(torch.equal(found[name], value) for name, value in expected.items())
        rows.append(row)
        print(row, flush=True)
    return rows


def killed(layout: str, out: Path, step: int, rank: int) -> dict:
    """Starts a run, kills one rank when the log shows the step, and waits for the end."""
    job = subprocess.Popen(command(layout, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while last_step(out) < step:
        if job.poll() is not None:
            raise RuntimeError(f"the run ended before step {step}: {job.stderr.read() if job.stderr else ''}")
        time.sleep(0.001)
    ranks = processes_of(job.pid)
    os.kill(ranks[rank], signal.SIGKILL)
    start = time.perf_counter()
    _, text = job.communicate(timeout=120)
    seconds = time.perf_counter() - start
    lines = [line for line in text.splitlines() if line.startswith("visionmoe")]
    left = [pid for pid in ranks.values() if Path(f"/proc/{pid}/stat").exists()]
    return {
        "killed_rank": rank,
        "step_in_log_at_kill": last_step(out),
        "seconds_to_end": round(seconds, 2),
        "exit_code": job.returncode,
        "lines": lines,
        "left_running": len(left),
    }


def run(layout: str, out: Path, *more: str) -> None:
    done = subprocess.run([*command(layout, out), *more], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")


def command(layout: str, out: Path) -> list[str]:
    small = ["model.hidden_size=32", "model.mlp_dim=64", "model.num_heads=2", "data.batch_size=32", "log_every=1",
             "checkpoint_every=3", "tensorboard=False", "model.moe.group_size=image",
             "data.eval_split=test[:64]"]  # fmt: skip
    sets = [text for value in small for text in ("--set", value)]
    return [sys.executable, "-m", "visionmoe", "train", "--nproc", str(Layout.parse(layout).size), "--parallel", layout,
            "--steps", str(STEPS), "--out", str(out), *sets]  # fmt: skip


def processes_of(launcher: int) -> dict[int, int]:
    """rank -> process id, of the launcher's children."""
    ranks = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                environment = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                ranks[int(environment["RANK"])] = int(entry.name)
    return ranks


def last_step(out: Path) -> int:
    with contextlib.suppress(OSError, json.JSONDecodeError, IndexError):
        return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    return 0


if __name__ == "__main__":
    main()
