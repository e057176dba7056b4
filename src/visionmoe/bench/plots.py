"""Which pictures the rows of a benchmark make."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionmoe.analysis.figures import bench as figures

Rows = Sequence[Mapping[str, Any]]


def draw(out: Path, rows: Rows) -> list[Path]:
    """Writes a picture for each part that has rows."""
    parts: tuple[tuple[str, tuple[str, ...], Callable[[Path, Rows], None]], ...] = (
        ("targets.png", ("layer", "share", "adaptive", "models"), figures.targets),
        ("models.png", ("models",), figures.speeds),
        ("growth.png", ("growth",), figures.growth),
        ("share.png", ("share",), figures.shares),
        ("memory.png", ("memory",), figures.memory),
    )
    written = []
    for name, sections, figure in parts:
        own = [row for row in rows if row["section"] in sections]
        if name == "targets.png":
            own = [row for row in own if row["target"] is not None]
        if own:
            figure(out / name, own)
            written.append(out / name)
    return written
