"""Ctrl-C and SIGTERM, at any moment of a command: one line, no traceback, the shell's exit code, no process left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from visionmoe.cli import main

LINES = {signal.SIGINT: "visionmoe: interrupted", signal.SIGTERM: "visionmoe: stopped by SIGTERM"}
TRAINING = ["train", "--steps", "100000", "--set", "tensorboard=false", "--set", "data.batch_size=16"]


def started(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "visionmoe", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ranks_of(pid: int) -> dict[int, int]:
    """rank -> process id, of those that a launcher has started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # of a process that has gone meanwhile
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(child)
    return found


def wait_until(true: Callable[[], object], job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def check_end(job: subprocess.Popen, number: signal.Signals) -> None:
    error = job.communicate(timeout=60)[1]
    lines = [line for line in error.splitlines() if line and not line.startswith("warning: ")]
    assert lines == [LINES[number]], error
    assert job.returncode == 128 + number


@pytest.mark.parametrize(
    ("number", "rank", "seconds"),
    [
        (signal.SIGINT, None, 0.0),
        (signal.SIGINT, None, 0.7),
        (signal.SIGTERM, None, 0.7),
        (signal.SIGTERM, 1, 0.7),
    ],
)
def test_while_ranks_start(number: signal.Signals, rank: int | None, seconds: float, tmp_path: Path):
    """They import torch for seconds: long before a run could save anything."""
    job = started(*TRAINING, "--nproc", "2", "--out", str(tmp_path / "run"))
    wait_until(lambda: len(ranks_of(job.pid)) == 2, job)
    ranks = ranks_of(job.pid)
    time.sleep(seconds)
    os.kill(job.pid if rank is None else ranks[rank], number)
    check_end(job, number)
    deadline = time.monotonic() + 10  # those that the launcher did not wait for have its signal, or its end's
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
def test_while_a_command_imports_or_works(number: signal.Signals, tmp_path: Path):
    job = started("bench", "--sections", "layer", "--out", str(tmp_path / "a"))
    time.sleep(1)
    job.send_signal(number)
    check_end(job, number)
    job = started("bench", "--sections", "layer", "--out", str(tmp_path / "b"))
    wait_until((tmp_path / "b").exists, job)
    job.send_signal(number)
    check_end(job, number)


def test_a_program_that_calls_a_command_keeps_its_handlers(tmp_path: Path):
    before = [signal.getsignal(number) for number in (*LINES, signal.SIGHUP)]
    assert main(["info", "vit_s16", "--out", str(tmp_path)]) == 0
    assert [signal.getsignal(number) for number in (*LINES, signal.SIGHUP)] == before


def test_a_lost_terminal_does_not_end_what_nohup_started(tmp_path: Path):
    arguments = ["bench", "--sections", "layer", "--out", str(tmp_path / "a")]
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignoring, sys.executable, "-m", "visionmoe", *arguments]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "a").exists, job)
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    check_end(job, signal.SIGTERM)
