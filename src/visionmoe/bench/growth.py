"""How the layer's time grows with tokens, experts, K and capacity, one at a time, beside the dense MLP's."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from visionmoe.bench.layer import LayerSize, inference_rows, sizes
from visionmoe.bench.measure import DTYPES, Case, Row, Setup

AXES: dict[str, tuple[float, ...]] = {
    "tokens": (197, 394, 788, 1576, 3152, 6304),
    "num_experts": (4, 8, 16, 32, 64),
    "num_selected_experts": (1, 2, 4),
    "capacity_factor": (0.15, 0.25, 0.5, 1.0, 1.5),
}
QUICK_AXES: dict[str, tuple[float, ...]] = {
    "tokens": (64, 256),
    "num_experts": (2, 8),
    "num_selected_experts": (1, 2),
    "capacity_factor": (0.25, 1.0),
}


def cases(setup: Setup) -> list[Case]:
    effort = setup.effort(9, 4.0)
    found = []
    for dtype in DTYPES:
        for axis, points in (QUICK_AXES if setup.quick else AXES).items():
            for point in points:
                change: dict[str, Any] = {axis: point}
                size = replace(sizes(setup)[0], **change)
                settings = asdict(size) | asdict(effort) | {"dtype": dtype, "axis": axis}
                found.append(Case("growth", f"{dtype} {axis} {point:g}", settings, _case(setup, size, dtype, axis)))
    return found


def _case(setup: Setup, size: LayerSize, dtype: str, axis: str) -> Callable[[], list[Row]]:
    def measure() -> list[Row]:
        row = inference_rows(size, dtype, setup.device, setup.effort(9, 4.0))[0]
        assert row.ms is not None
        details = row.details | {"axis": axis, "at": getattr(size, axis), "ratio_to_dense": row.value}
        what = f"layer's time by {axis}: {getattr(size, axis):g} ({row.value:.2f} of the dense F.linear MLP)"
        return [replace(row, what=what, value=row.ms, unit="ms", details=details)]

    return measure
