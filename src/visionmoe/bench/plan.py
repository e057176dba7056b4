"""All cases, section by section."""

from collections.abc import Callable, Sequence

from visionmoe.bench import adaptive, ceilings, growth, layer, memory, models, share
from visionmoe.bench.measure import Case, Setup

CASES: dict[str, Callable[[Setup], list[Case]]] = {
    "ceilings": ceilings.cases,
    "layer": layer.cases,
    "share": share.cases,
    "adaptive": adaptive.cases,
    "models": models.cases,
    "growth": growth.cases,
    "memory": memory.cases,
}


def plan(setup: Setup, sections: Sequence[str]) -> list[Case]:
    """The cases of these sections, in the order in which they run."""
    return [case for section in sections for case in CASES[section](setup)]
