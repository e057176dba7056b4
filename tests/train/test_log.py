import io
import json
import logging
import sys

import pytest
import torch
from rich.console import Console

from visionmoe.train import progress
from visionmoe.train.log import Means, RunLog, read_log, router_health
from visionmoe.train.progress import ProgressLine, describe, duration


def test_means_are_over_the_steps_since_they_were_taken():
    means = Means()
    means.add({"loss": torch.tensor(1.0)})
    means.add({"loss": torch.tensor(3.0), "other": torch.tensor([2.0, 4.0])})
    taken = means.take()
    assert taken["loss"].item() == 2.0 and taken["other"].tolist() == [2.0, 4.0]
    assert means.take() == {}


def test_router_health_counts_dead_experts():
    health = router_health(
        {"blocks.1.expert_load": torch.tensor([0.75, 0.0, 0.25, 0.0]), "blocks.1.dropped": torch.tensor(0.125),
         "blocks.3.importance_loss": torch.tensor([1.0, 3.0])}
    )  # fmt: skip
    assert health == {
        "blocks.1": {"expert_load": [0.75, 0.0, 0.25, 0.0], "dead_experts": 2, "dropped": 0.125},
        "blocks.3": {"importance_loss": 2.0},
    }


def test_a_resumed_log_has_no_step_twice_and_no_broken_line(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for step in (10, 20, 30):
        log.write("train", step, main_loss=1.0)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write('{"kind": "train", "st')  # a kill in the middle of a line
    log = RunLog(tmp_path, start_step=20, tensorboard=False)
    log.write("train", 30, main_loss=2.0)
    log.close()
    assert [(r["step"], r["main_loss"]) for r in read_log(tmp_path / "log.jsonl")] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write("train", 1, loss=float("nan"), table={"a": [float("inf"), 1.0]})
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text())["table"] == {"a": [None, 1.0]}


def test_tensorboard_has_the_routers_health(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path)
    log.write("train", 5, main_loss=1.5, router={"blocks.1": {"expert_load": [0.25, 0.75], "dead_experts": 0}})
    log.write("eval", 5, name="test", metrics={"top1": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/main_loss", "train/router/blocks.1/expert_load/0", "train/router/blocks.1/expert_load/1",
        "train/router/blocks.1/dead_experts", "eval/test/top1",
    }  # fmt: skip
    assert events.Scalars("train/main_loss")[0].value == 1.5 and events.Scalars("eval/test/top1")[0].step == 5


def test_without_tensorboard_it_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path)
        log.write("train", 1, main_loss=1.0)
        log.close()
    assert [r.message for r in caplog.records if "tensorboard" in r.message] == [
        "tensorboard is not installed: the log is log.jsonl alone (pip install 'visionmoe[tensorboard]')"
    ]


TRAIN = {
    "kind": "train", "step": 20, "main_loss": 0.5, "auxiliary_loss": 0.001, "accuracy": 0.875,
    "images_per_second": 1000, "eta_seconds": 61.0, "skipped_steps": 0,
    "router": {
        "blocks.1": {"expert_load": [0.25, 0.75], "dropped": 0.25, "dead_experts": 0, "entropy": 0.5},
        "blocks.3": {"expert_load": [0.0, 0.0, 1.0], "dropped": 0.5, "dead_experts": 2, "entropy": 0.123},
    },
}  # fmt: skip


def test_the_line_says_what_matters():
    first, second = "load 25%-75% dropped 25% entropy 0.50", "load 0%-100% dropped 50% entropy 0.12 DEAD EXPERTS 2"
    assert describe(TRAIN) == (
        f"loss 0.5 aux 0.001 acc 0.875 1000 img/s ETA 1:01 | blocks.1 {first} | blocks.3 {second}"
    )
    quiet = TRAIN | {"router": {}, "main_loss": None, "skipped_steps": 3}
    assert describe(quiet).startswith("loss nan") and describe(quiet).endswith("ETA 1:01 skipped steps 3")
    assert describe({"kind": "eval", "name": "test", "metrics": {"top1": 0.87, "num_images": 9}}) == "test: top1 0.87"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_gets_a_live_line_and_a_file_plain_ones(monkeypatch, capsys):
    with ProgressLine(30) as line:
        line.show(TRAIN)
        line.advance()
    assert capsys.readouterr().err.startswith("step 20/30: loss 0.5")
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=300))
    with ProgressLine(30, done=19) as line:
        line.advance()
        line.show(TRAIN)
        line.show({"kind": "event", "step": 20, "message": "hello [world]"})
    assert "20/30" in screen.getvalue() and "DEAD EXPERTS 2" in screen.getvalue()
    assert "hello [world]" in screen.getvalue()
