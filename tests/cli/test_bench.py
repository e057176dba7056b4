"""`visionmoe bench --quick`: real runs of every section, and starting again."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from visionmoe.cli import main


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    sections = ["ceilings", "layer", "share", "adaptive", "models", "growth", "memory"]
    assert main(["bench", "--quick", "--sections", *sections, "--out", str(out)]) == 0
    return out


def rows_of(out: Path, section: str) -> list[dict]:
    return [row for row in json.loads((out / "results.json").read_text())["rows"] if row["section"] == section]


def test_every_section_has_rows_that_can_be_true(measured: Path):
    results = json.loads((measured / "results.json").read_text())
    assert results["command"] == "bench" and not results["left_out"]
    assert results["targets"] == {"met": 0, "of": 0}  # small shapes have none
    for section in ("ceilings", "layer", "share", "adaptive", "models", "growth", "memory"):
        own = rows_of(measured, section)
        assert own, section
        assert all(math.isfinite(row["value"]) and row["dtype"] in ("float32", "bfloat16") for row in own)
    assert all(row["ms"] > 0 and row["reference_ms"] > 0 for row in rows_of(measured, "layer"))
    assert all(row["floor_ms"] > 0 for row in rows_of(measured, "models"))
    for row in rows_of(measured, "models"):
        if row["unit"] == "images/s":
            assert row["value"] == pytest.approx(1e3 * row["details"]["batch_size"] / row["ms"])


def test_growth_has_every_axis(measured: Path):
    axes = {row["details"]["axis"] for row in rows_of(measured, "growth")}
    assert axes == {"tokens", "num_experts", "num_selected_experts", "capacity_factor"}
    kept = {r["details"]["at"]: r["details"]["kept_requests"] for r in rows_of(measured, "growth")
            if r["details"]["axis"] == "num_selected_experts"}  # fmt: skip
    assert kept[1] < kept[2] <= 2 * 256


def test_memory_is_beside_the_dense_models(measured: Path):
    rows = rows_of(measured, "memory")
    dense = {row["details"]["work"]: row["value"] for row in rows if row["details"]["variant"] == "dense"}
    for row in rows:
        assert row["details"]["ratio_to_dense"] == pytest.approx(row["value"] / dense[row["details"]["work"]], rel=1e-6)


def test_pictures(measured: Path):
    for name in ("models.png", "growth.png", "share.png", "memory.png"):
        with Image.open(measured / name) as picture:
            assert min(picture.size) > 300


def test_started_again_it_measures_nothing(measured: Path, capsys: pytest.CaptureFixture):
    before = json.loads((measured / "results.json").read_text())
    assert main(["bench", "--quick", "--sections", "layer", "growth", "--out", str(measured)]) == 0
    assert "25 of 25 cases were there already" in capsys.readouterr().out
    after = json.loads((measured / "results.json").read_text())
    assert after["rows"] == before["rows"]


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["bench", "--sections", "layers", "--out", str(tmp_path)]) == 2
    assert "layers" in capsys.readouterr().err
    assert main(["bench", "--device", "abacus", "--out", str(tmp_path)]) == 2
    assert "device 'abacus' cannot be used" in capsys.readouterr().err
