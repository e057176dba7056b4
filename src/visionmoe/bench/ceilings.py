"""What this machine can do at best: matrix products and copies. The floors of the other rows are made of these."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from visionmoe.bench.measure import DTYPES, Case, Row, Setup, in_turns
from visionmoe.bench.products import can_pack
from visionmoe.model.packed import linear, pack

COPY, LINEAR, PACKED = "copy", "F.linear", "packed"


def cases(setup: Setup) -> list[Case]:
    size = 512 if setup.quick else 2048
    megabytes = 32 if setup.quick else 512
    effort = setup.effort(7, 10.0)
    found = []
    for dtype in DTYPES:
        settings = {"size": size, "dtype": dtype} | asdict(effort)
        found.append(Case("ceilings", f"products {dtype}", settings, _products(setup, size, dtype)))
    settings = {"megabytes": megabytes} | asdict(effort)
    return [*found, Case("ceilings", "memory", settings, _copy(setup, megabytes))]


def _products(setup: Setup, size: int, dtype: str) -> Any:
    def measure() -> list[Row]:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, size, generator=generator).to(setup.device, DTYPES[dtype]) for _ in range(2))
        calls = {LINEAR: lambda: F.linear(x, weight)}
        if can_pack(setup.device):
            own = pack(weight)
            calls[PACKED] = lambda: linear(x, own, None)
        with torch.no_grad():
            times = in_turns(calls, setup.effort(7, 10.0), setup.device)
        names = {LINEAR: "F.linear", PACKED: "oneDNN's linear layer with a packed weight"}
        return [
            Row(
                what=f"{names[kind]}, {size} x {size} by {size} x {size}",
                value=2e-9 * size**3 / (times.ms(kind) / 1e3),
                unit="GFLOP/s",
                dtype=dtype,
                ms=times.ms(kind),
                rounds=times.rounds,
                details={"ceiling": kind},
            )
            for kind in calls
        ]

    return measure


def _copy(setup: Setup, megabytes: int) -> Any:
    def measure() -> list[Row]:
        source = torch.ones(megabytes << 18, device=setup.device)  # float32
        target = torch.empty_like(source)
        times = in_turns({COPY: lambda: target.copy_(source)}, setup.effort(7, 10.0), setup.device)
        moved = 2 * source.numel() * source.element_size()  # read and written
        return [
            Row(
                what=f"copy of {megabytes} MiB, bytes read and written",
                value=1e-9 * moved / (times.ms(COPY) / 1e3),
                unit="GB/s",
                dtype="float32",
                ms=times.ms(COPY),
                rounds=times.rounds,
                details={"ceiling": COPY},
            )
        ]

    return measure


def floor_ms(row: Mapping[str, Any], ceilings: Sequence[Mapping[str, Any]]) -> float | None:
    """Least time of a row's call, ms: operations at the best measured rate plus bytes at the measured bandwidth.

    row, ceilings: rows as results.json has them. None where the row has no operations or a ceiling is missing.
    """
    rates = [c["value"] for c in ceilings if c["unit"] == "GFLOP/s" and c["dtype"] == row["dtype"]]
    copies = [c["value"] for c in ceilings if c["unit"] == "GB/s"]
    if not row["flops"] or not rates or not copies:
        return None
    return 1e3 * (row["flops"] / (1e9 * max(rates)) + row["bytes"] / (1e9 * max(copies)))


def at_floor(row: Mapping[str, Any], floor: float | None) -> float | None:
    """A row's figure if its call took the floor (ms) and what it is compared with what it took.

    None for figures that are not of one call's time, and without a floor.
    """
    if floor is None or not row["ms"]:
        return None
    if row["unit"] == "ratio" and row["reference_ms"]:
        return floor / row["reference_ms"]
    return row["value"] * row["ms"] / floor if row["unit"] == "images/s" else None
