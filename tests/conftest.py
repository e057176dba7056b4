"""Fixtures for all tests: where the reference's numbers and real photographs are."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL_CASES = Path(__file__).parent / "data" / "conformance"


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The folder of reference numbers: all of them where they are at hand, else the small part kept with the tests."""
    path = Path(os.environ.get("VISIONMOE_CONFORMANCE", ROOT.parent / "shared" / "conformance"))
    return path if path.is_dir() else SMALL_CASES


@pytest.fixture(scope="session")
def conformance_case(conformance: Path) -> Callable[[str], tuple[Path, dict]]:
    """Name of a case -> its folder and its config; skips, saying so, where the case is not at hand."""

    def find(name: str) -> tuple[Path, dict]:
        path = conformance / name
        if not path.is_dir():
            pytest.skip(f"no reference case {path} (set VISIONMOE_CONFORMANCE to the whole set)")
        return path, json.loads((path / "config.json").read_text())

    return find


@pytest.fixture(scope="session")
def cifar10_parquet() -> Path:
    """A folder with train.parquet and test.parquet of CIFAR-10; skips, saying so, where there is none."""
    path = Path(os.environ.get("VISIONMOE_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    if not path.is_dir():
        pytest.skip(f"no photographs at {path} (set VISIONMOE_DATA)")
    return path
