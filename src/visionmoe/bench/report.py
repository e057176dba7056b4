"""The tables of a benchmark, from the rows of results.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]
TITLES = {
    "ceilings": "What this machine can do",
    "layer": "One MoE layer",
    "share": "What is not the experts' products",
    "adaptive": "Fewer places, less time",
    "models": "Whole models",
    "growth": "Growth of the layer's time",
    "memory": "Peak memory",
}


def print_tables(rows: Rows, left_out: Sequence[Mapping[str, str]], sections: Sequence[str]) -> None:
    """A table per section, what was left out, and the targets at the end."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=190)
    for section in sections:
        own = [row for row in rows if row["section"] == section]
        if own:
            console.print(table(TITLES[section], own))
    for entry in left_out:
        console.print(f"left out: {entry['name']}: {entry['reason']}", markup=False, highlight=False)
    aimed = [row for row in rows if row["target"] is not None and row["section"] in sections]
    if aimed:
        console.print(table("Targets (stated for a CPU with two cores)", aimed))
        console.print(f"{sum(row['met'] for row in aimed)} of {len(aimed)} targets are met", highlight=False)


def table(title: str, rows: Rows) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("what", overflow="fold", ratio=1)
    for name in ("dtype", "measured", "target", "met"):
        result.add_column(name)
    for name in ("ms", "compared with, ms", "floor, ms", "at the floor"):
        result.add_column(name, justify="right")
    for row in rows:
        met = "" if row["met"] is None else ("yes" if row["met"] else "NO")
        result.add_row(
            row["what"], row["dtype"], shown(row), row["target"] or "", met,
            *(_ms(row[name]) for name in ("ms", "reference_ms", "floor_ms")),
            "" if row["at_floor"] is None else shown({**row, "value": row["at_floor"]}),
        )  # fmt: skip
    return result


def shown(row: Mapping[str, Any]) -> str:
    """The figure of a row, as people read it."""
    value, unit = row["value"], row["unit"]
    if unit == "share":
        return f"{value:.1%}"
    if unit == "ratio":
        return f"{value:.3f}"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def line(row: Mapping[str, Any]) -> str:
    """One row in one line, for the course of a run."""
    target = "" if row["target"] is None else f" (target {row['target']}: {'met' if row['met'] else 'NOT met'})"
    return f"{row['what']}, {row['dtype']}: {shown(row)}{target}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
