"""A rank that is killed ends the job, and the run goes on exactly; bad layouts are one line."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.faults import STEPS, command, killed, last_step, processes_of, run
from safetensors.torch import load_file

from visionmoe.checkpoint.store import list_checkpoints
from visionmoe.distributed.layout import Layout


@pytest.mark.parametrize("layout", ["ep=2"])
def test_a_killed_rank_ends_the_job_and_the_run_resumes_exactly(layout, tmp_path):
    row = killed(layout, tmp_path / "run", step=STEPS // 2, rank=1)
    assert row["exit_code"] == 1 and row["seconds_to_end"] < 30 and not row["left_running"]
    assert "visionmoe: rank 1 of 2 was killed (SIGKILL); the others were stopped" in row["lines"]
    run(layout, tmp_path / "run", "--resume")
    run(layout, tmp_path / "whole")
    found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    shutil.rmtree(tmp_path / "run")
    killed(layout, tmp_path / "run", step=STEPS // 2, rank=0)
    run("dp=1", tmp_path / "run", "--resume")  # one process goes on where two were
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in expected.items():
        if not name.endswith("qkv.bias"):  # of keys: no gradient but rounding
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    job = subprocess.Popen([*command("dp=2", tmp_path / "run"), "--set", "steps=100000"], stderr=subprocess.DEVNULL)
    while last_step(tmp_path / "run") < 2:
        assert job.poll() is None
        time.sleep(0.05)
    ranks = processes_of(job.pid)
    job.kill()
    job.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until and any(Path(f"/proc/{pid}/environ").exists() for pid in ranks.values()):
        time.sleep(0.1)
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert list_checkpoints(tmp_path / "run")  # they were asked to stop, and saved


def test_layouts_are_read_and_a_missing_dp_follows():
    assert Layout.parse("dp=2,fsdp=3,ep=4", 24) == Layout(dp=2, fsdp=3, ep=4)
    assert Layout.parse("ep=2", 8) == Layout(dp=4, ep=2)
    assert Layout.parse(None, 3) == Layout(dp=3)


@pytest.mark.parametrize(
    ("text", "processes", "message"),
    [
        ("ep=3", 8, "'ep=3' is for 3 processes, but the job has 8"),
        ("dp=2,ep=2", 2, "is for 4 processes, but the job has 2"),
        ("tp=2", 2, "must be like dp=2,fsdp=2,ep=2"),
        ("ep=two", 2, "must be like"),
        ("ep=2,ep=2", 4, "each once"),
        ("ep=0", 4, "ep must be >= 1, got 0"),
    ],
)
def test_other_layouts_are_refused(text, processes, message):
    with pytest.raises(ValueError, match=message):
        Layout.parse(text, processes)


def test_a_layout_that_does_not_fit_is_one_line(tmp_path):
    wrong = [*command("ep=2", tmp_path / "run"), "--set", "model.moe.num_experts=7"]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("visionmoe")]
    assert lines == ["visionmoe train: parallel: ep must divide the 7 experts, got 2"]
    wrong = [sys.executable, "-m", "visionmoe", "train", "--parallel", "ep=2", "--out", str(tmp_path / "run")]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2 and "is for 2 processes, but the job has 1" in done.stderr
