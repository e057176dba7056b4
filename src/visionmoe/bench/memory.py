"""Peak memory of a model against its dense twin: each in a process of its own, on a GPU by torch's own count.

    python -m visionmoe.bench.memory '{"size": "b16", "variant": "dense", "work": "inference", ...}'

prints one JSON line. On a CPU the peak is that of the process' resident memory above what it had before the model,
when a tiny model had run, so that the libraries were loaded.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from visionmoe.bench.build import build_model, check_memory, config_of, needed_bytes, num_parameters, size_text
from visionmoe.bench.measure import DTYPES, Case, Row, Setup
from visionmoe.bench.models import random_images, training_call

CALLS = 2  # the second training step has the optimizer's moments, too
VARIANTS = ("dense", "every2 e8", "last2 e8")
WORKS = (("inference", "float32"), ("inference", "bfloat16"), ("training step", "bfloat16"))


@dataclass(frozen=True)
class Question:
    """What a process measures."""

    size: str
    variant: str
    work: str
    dtype: str
    batch: int
    device: str
    quick: bool


def cases(setup: Setup) -> list[Case]:
    works = WORKS[:1] if setup.quick else WORKS
    found = []
    for work, dtype in works:
        question = Question("s16" if setup.quick else "b16", "dense", work, dtype, 2 if setup.quick else 8,
                            str(setup.device), setup.quick)  # fmt: skip
        variants = VARIANTS[:2] if setup.quick else VARIANTS
        settings = asdict(question) | {"variants": variants}
        found.append(Case("memory", f"{work} {dtype}", settings, _case(setup, question, variants)))
    return found


def _case(setup: Setup, question: Question, variants: tuple[str, ...]) -> Callable[[], list[Row]]:
    def measure() -> list[Row]:
        peaks = {}
        for variant in variants:
            config = config_of(question.size, variant, quick=question.quick)
            training = question.work != "inference"
            check_memory(needed_bytes(config, question.dtype, question.batch, training=training), setup.device)
            peaks[variant] = ask(replace(question, variant=variant))
        return [
            Row(
                what=f"{size_text(question.size, quick=question.quick)} {variant}, {question.work}, batch "
                f"{question.batch}: peak memory, {peak / peaks['dense']:.2f} of the dense model's",
                value=peak / 2**20,
                unit="MiB",
                dtype=question.dtype,
                details={
                    "variant": variant,
                    "work": question.work,
                    "ratio_to_dense": peak / peaks["dense"],
                    "parameters": num_parameters(config_of(question.size, variant, quick=question.quick)),
                },
            )
            for variant, peak in peaks.items()
        ]

    return measure


def ask(question: Question) -> int:
    """Peak bytes, measured in a fresh process. RuntimeError with its last words where that fails."""
    command = [sys.executable, "-m", "visionmoe.bench.memory", json.dumps(asdict(question))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures {question} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def measure(question: Question) -> int:
    """Peak bytes of a model and its calls in this process."""
    device = torch.device(question.device)
    _run(replace(question, quick=True), device)
    before = resident("VmRSS")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _run(question, device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before


def _run(question: Question, device: torch.device) -> None:
    config = config_of(question.size, question.variant, quick=question.quick)
    training = question.work != "inference"
    model = build_model(config, torch.float32 if training else DTYPES[question.dtype], device)
    images = random_images(config, question.batch, torch.float32 if training else DTYPES[question.dtype], device)
    step = training_call(model.train(), images, question.dtype) if training else None
    for _ in range(CALLS):
        if step is not None:
            step()
        else:
            with torch.no_grad():
                model(images)


def resident(name: str) -> int:
    """Resident bytes of this process, now ("VmRSS") or at most ("VmHWM"); getrusage would count its parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not say how much memory the process has (no {name} in /proc/self/status)")


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": measure(Question(**json.loads(sys.argv[1])))}))
