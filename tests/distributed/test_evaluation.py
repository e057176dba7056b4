"""Evaluations by several processes give what one process gives: every batch once, put together in its order."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.jobs import free_port

SCRIPT = Path(__file__).parent / "evaluations.py"
NAMES = (
    "classify", "one batch", "sigmoid", "list of batches", "spread", "spread, one batch", "experts split", "features",
    "features of spread", "features of split", "cache", "few-shot", "calibrated", "per image", "analysis",
    "too many broken", "commands",
)  # fmt: skip
ROUNDED = ("experts split", "features of split")  # split experts are computed in parts, which changes the last bits


def run(folder: Path, processes: int) -> list[dict[str, Any]]:
    """What one process got alone, then what every process of a job got."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | job
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [one.communicate(timeout=280)[0] for one in started]
    assert [one.returncode for one in started] == [0] * processes, "\n".join(said)
    names = ["alone", *(f"rank-{rank}" for rank in range(processes))]
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    return run(folder, 2)


@pytest.fixture(scope="module")
def alone(pair: list[dict[str, Any]]) -> dict[str, Any]:
    return pair[0]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_what_one_gives(name: str, pair: list[dict[str, Any]]):
    check(name, *pair)


def check(name: str, alone: dict[str, Any], *job: dict[str, Any]) -> None:
    assert set(alone) == set(NAMES)
    assert alone[name]
    for rank, own in enumerate(job):
        found, expected = own[name], alone[name]
        if name in ROUNDED:
            found = flat(found)
            expected = {
                path: pytest.approx(leaf, rel=1e-5, abs=1e-5) if isinstance(leaf, float) else leaf
                for path, leaf in flat(expected).items()
            }
        assert found == expected, f"rank {rank}"


def flat(value: Any) -> dict[str, Any]:
    """The numbers and texts in nested lists and dicts, by where they are."""
    if not isinstance(value, dict | list):
        return {"": value}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    return {f"{key}/{path}": leaf for key, entry in entries for path, leaf in flat(entry).items()}


def test_what_one_process_gives(alone: dict[str, Any]):
    """The numbers compared above are of all images: 51 of which 10 are broken; some requests are dropped."""
    found = alone["classify"]
    assert found["num_images"] == 41
    assert len(found["broken in order"]) == 10
    assert [name.rpartition(" ")[2] for name in found["broken in order"]] == ["3", *map(str, range(16, 24)), "50"]
    assert all(0.2 < share < 0.8 for share in found["dropped"].values())
    assert found["loss"] != alone["one batch"]["loss"]
    assert alone["features"]["shape"] == [41, 16]
    assert [text.partition(" images")[0] for text in alone["too many broken"]] == ["4 of 33"] * 2
    assert alone["analysis"]["images"] == 88
    assert set(alone["commands"]) == {"evaluate", "sweep", "tune", "fewshot", "analyze"}
    assert alone["commands"]["analyze"]["num_images"] == 35


@pytest.mark.distributed4
def test_four_processes_give_what_one_gives(tmp_path: Path):
    found = run(tmp_path, 4)
    for name in NAMES:
        check(name, *found)


def visionmoe(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "visionmoe", *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def saved(pair: list[dict[str, Any]], folder: Path) -> str:
    """The model that the job left."""
    assert pair
    return str(folder / "job" / "model")


def test_one_command_with_two_processes(saved: str, alone: dict[str, Any], tmp_path: Path):
    images = ("--data", "fashion-mnist", "--split", "test[:35]", "--batch-size", "8", "--device", "cpu")
    code, out, error = visionmoe("evaluate", saved, *images, "--out", str(tmp_path), "--nproc", "2")
    assert code == 0, error
    assert out.count("top-1") == 1 and out.count("everything:") == 1  # one process speaks
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("num_images", "top1", "top5", "loss", "per_class_accuracy", "dropped"):
        assert results[name] == alone["commands"]["evaluate"][name]


@pytest.mark.distributed4
def test_a_mistake_of_all_is_one_line(saved: str, tmp_path: Path):
    mistake = ("--data", f"folder:{tmp_path}/nothing", "--device", "cpu")
    code, out, error = visionmoe("evaluate", saved, *mistake, "--out", str(tmp_path / "out"), "--nproc", "4")
    assert (code, out) == (2, "")
    assert error.splitlines() == [f"visionmoe evaluate: there is no folder {tmp_path}/nothing"]
