"""Runs cases one after the other into results.json; a finished case with the same settings is not measured again."""

import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import visionmoe
from visionmoe.bench.ceilings import at_floor, floor_ms
from visionmoe.bench.measure import Case, LeftOutError, Row, Setup
from visionmoe.evaluate.timing import device_name
from visionmoe.files import finite, read_json, write_json

FORMAT = 1  # of what is kept
MEASURED_CODE = ("model", "bench", "train/step.py", "train/optim.py", "train/scaling.py")


class Results:
    """results.json of one folder: finished cases, the reasons of those left out, and all rows with their floors.

    `reused` tells how many cases were there already; `renewed` why earlier ones are not taken, or None.
    """

    def __init__(self, path: Path, setup: Setup) -> None:
        self.path = path
        self.machine = machine(setup.device)
        self.cases: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.reused = 0
        self.renewed: str | None = None
        earlier = read_json(path) if path.is_file() else {}
        if isinstance(earlier, dict) and earlier.get("command") == "bench":
            changed = [k for k, v in self._kept_for().items() if earlier.get(k) != v]
            if changed:
                self.renewed = f"the results in {path} are of another {', '.join(changed)}: all is measured anew"
            else:
                self.cases = earlier["cases"]

    def run(self, case: Case) -> list[dict[str, Any]]:
        """The rows of a case, measured now unless they are there; on the disk when this returns."""
        key = finite({"section": case.section, "name": case.name, "settings": case.settings})
        found = next((c for c in self.cases if all(c[k] == v for k, v in key.items())), None)
        if found is not None:
            self.reused += 1
            return found["rows"]
        start = time.perf_counter()
        try:
            rows = case.measure()
        except LeftOutError as reason:
            self.left_out.append({"section": case.section, "name": case.name, "reason": str(reason)})
            self.write()
            return []
        seconds = round(time.perf_counter() - start, 2)
        case_rows = [as_json(row) for row in rows]
        self.cases.append({**key, "date": str(datetime.date.today()), "seconds": seconds, "rows": case_rows})
        self.write()
        return case_rows

    def rows(self) -> list[dict[str, Any]]:
        """All rows with their section, and with the floor and their figure at it where the ceilings are measured."""
        rows = [{"section": case["section"], **row} for case in self.cases for row in case["rows"]]
        full = [row for row in rows if row["section"] == "ceilings"]
        floors = [floor_ms(row, full) for row in rows]
        return [
            row | {"floor_ms": floor, "at_floor": at_floor(row, floor)} for row, floor in zip(rows, floors, strict=True)
        ]

    def write(self) -> None:
        rows = self.rows()
        with_target = [row for row in rows if row["target"] is not None]
        document = {
            "command": "bench",
            **self._kept_for(),
            "date": str(datetime.date.today()),
            "method": "calls in turns, one uncounted round before; ms are medians of the rounds, ratios and shares "
            "medians of the rounds' own ratios; parameters and tokens of fixed seeds",
            "targets": {"met": sum(row["met"] for row in with_target), "of": len(with_target)},
            "rows": rows,
            "left_out": self.left_out,
            "cases": self.cases,
        }
        write_json(self.path, finite(document))

    def _kept_for(self) -> dict[str, Any]:
        """What must be the same for earlier cases to count."""
        return {"format": FORMAT, "machine": self.machine, "code": code_fingerprint()}


def run_all(
    cases: Iterable[Case], results: Results, on_case: Callable[[Case, list[dict[str, Any]]], None] | None = None
) -> None:
    for case in cases:
        rows = results.run(case)
        if on_case is not None:
            on_case(case, rows)


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def as_json(row: Row) -> dict[str, Any]:
    """A row as results.json has it, with `met` beside the target."""
    target = row.target
    return finite(asdict(row)) | {
        "target": None if target is None else str(target),
        "met": None if target is None else target.met(row.value),
    }


def code_fingerprint() -> str:
    """SHA-256 of the sources that are measured and that measure: times of other code are not taken for this one's."""
    root = Path(visionmoe.__file__).parent
    digest = hashlib.sha256()
    for part in MEASURED_CODE:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    with contextlib.suppress(ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None
