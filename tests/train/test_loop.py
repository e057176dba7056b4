"""Whole runs of a tiny model on the embedded images: killed, stopped, damaged, poisoned, repeated, resumed."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import visionmoe as vm
from visionmoe.checkpoint.store import list_checkpoints
from visionmoe.config import to_dict
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.evaluate.classify import ClassificationEvaluator
from visionmoe.files import write_json
from visionmoe.train.config import OptimizerConfig, ScheduleConfig, TrainConfig, assign, read_config
from visionmoe.train.log import read_log
from visionmoe.train.loop import TrainingDivergedError, run_training

STEPS = 9
CHILD = """
import sys, torch
torch.set_num_threads(1)
from visionmoe.train.config import read_config
from visionmoe.train.loop import run_training
results = run_training(read_config(sys.argv[1]), resume=sys.argv[2] == "resume", show_progress=False)
sys.exit(results["exit_code"])
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(out, **changes):
    """Everything random that a run has: crops, flips, RandAugment, mixup, router noise, dropout of three kinds."""
    moe = vm.MoEConfig(num_experts=4, layers=(1,), noise_std=1.0, expert_dropout_rate=0.1)
    model = vm.ModelConfig(
        image_size=28, patch_size=14, in_channels=1, num_classes=10, hidden_size=16, num_layers=2, mlp_dim=32,
        num_heads=2, dropout_rate=0.1, attention_dropout_rate=0.1, moe=moe,
    )  # fmt: skip
    data = DataConfig(batch_size=32, randaugment_ops=1, mixup_alpha=0.3, train_split="train[:320]")
    schedule = ScheduleConfig(peak_value=0.01, warmup_steps=2)
    optimizer = OptimizerConfig(name="adam", learning_rate=schedule, weight_decay=0.1)
    config = TrainConfig(out=str(out), model=model, data=data, optimizer=optimizer, steps=STEPS, ema_decay=0.9,
                         checkpoint_every=2, log_every=1, tensorboard=False)  # fmt: skip
    return dataclasses.replace(config, **changes)


def run(config, **options):
    return run_training(config, show_progress=False, **options)


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def logged_steps(out):
    return [record["step"] for record in read_log(Path(out) / "log.jsonl") if record["kind"] == "train"]


def start(config_path, mode):
    return subprocess.Popen([sys.executable, "-W", "error", "-c", CHILD, str(config_path), mode])


def wait_for_step(out, step, process):
    for _ in range(6000):
        if max(logged_steps(out), default=0) >= step:
            return
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        time.sleep(0.005)
    raise AssertionError("no progress in 30 s")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("uninterrupted")
    results = run(tiny(out / "run"))
    assert results["status"] == "finished" and results["exit_code"] == 0
    return out / "run"


def test_a_lost_terminal_is_a_request_to_stop(tmp_path):
    def hang_up(model, step):
        os.kill(os.getpid(), signal.SIGHUP)
        return {}

    config = dataclasses.replace(tiny(tmp_path / "run"), eval_every=2)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may have been started by nohup
    try:
        results = run_training(config, {"stop": hang_up}, show_progress=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (results["status"], results["exit_code"], results["step"]) == ("interrupted", 129, 2)
    assert list_checkpoints(tmp_path / "run")[-1][0] == 2


def test_killed_at_several_steps_gives_bitwise_the_same_parameters(tmp_path):
    """SIGKILL twice, then SIGTERM, which saves; against a run that only stops at that step."""
    out = tmp_path / "run"
    config = tiny(out, steps=4000)  # long enough to be killed at any moment
    write_json(tmp_path / "config.json", to_dict(config))
    mode = "new"
    for step, number in ((1, signal.SIGKILL), (4, signal.SIGKILL), (9, signal.SIGTERM)):
        process = start(tmp_path / "config.json", mode)
        wait_for_step(out, step, process)
        process.send_signal(number)
        assert process.wait() == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        assert (out / "results.json").exists() == (number == signal.SIGTERM)
        mode = "resume"
    results = json.loads((out / "results.json").read_text())
    saved, path = list_checkpoints(out)[-1]
    assert (results["status"], results["exit_code"], results["step"]) == ("interrupted", 143, saved)
    message = read_log(out / "log.jsonl")[-1]["message"]
    assert message.startswith("SIGTERM: saved") and f"stopped at step {saved}" in message
    steps = logged_steps(out)
    assert steps == list(range(1, saved + 1))  # no step twice, though lives had logged past their last checkpoint
    run_until(dataclasses.replace(config, out=str(tmp_path / "straight")), saved)
    for name in ("model", "optimizer", "ema"):
        a, b = (
            load_file(folder / f"{name}.safetensors")
            for folder in (path, list_checkpoints(tmp_path / "straight")[-1][1])
        )
        assert a and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run_until(config, step, resume=False):
    """Runs to a step and stops as Ctrl-C does."""

    def evaluator(model, number):
        if number >= step:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    results = run_training(dataclasses.replace(config, eval_every=1), {"stop": evaluator}, resume=resume,
                           show_progress=False)  # fmt: skip
    assert results["status"] == "interrupted" and results["exit_code"] == 130 and results["step"] == step


@pytest.mark.parametrize("step", [1, 4, STEPS - 1])
def test_ctrl_c_and_resume_equals_the_uninterrupted_run(uninterrupted, tmp_path, step):
    config = tiny(tmp_path / "run")
    run_until(config, step)
    results = run(config, resume=True)
    assert results["status"] == "finished" and results["step"] == STEPS
    assert_same_weights(tmp_path / "run", uninterrupted)
    assert logged_steps(tmp_path / "run") == list(range(1, STEPS + 1))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(uninterrupted, tmp_path, caplog):
    config = tiny(tmp_path / "run")
    run_until(config, 5)  # checkpoints 4 and 5
    file = tmp_path / "run" / "checkpoints" / "step_00000005" / "optimizer.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    run(config, resume=True)
    [warned] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(r"step_00000005/optimizer\.safetensors is damaged.*going on from step_00000004", warned)
    assert_same_weights(tmp_path / "run", uninterrupted)
    messages = [r["message"] for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "event"]
    assert f"removed the damaged checkpoint {file.parent}" in messages


def falling_then_rising(fail_at=None):
    """An evaluator whose top-1 is best at step 4; it fails at the step `fail_at`."""

    def evaluator(model, step):
        if step == fail_at:
            raise RuntimeError("killed here")
        return {"top1": 1 - abs(step - 4) / 10, "odd": float("nan")}

    return {"test": evaluator}


def evaluated_steps(out):
    return [record["step"] for record in read_log(Path(out) / "log.jsonl") if record["kind"] == "eval"]


def test_an_evaluation_that_was_cut_is_made_up_for(tmp_path):
    """The checkpoint of step 4 is written before its evaluation, which here never ended."""
    config = tiny(tmp_path / "run", eval_every=2)
    with pytest.raises(RuntimeError, match="killed here"):
        run(config, evaluators=falling_then_rising(fail_at=4))
    results = run(config, evaluators=falling_then_rising(), resume=True)
    straight = run(tiny(tmp_path / "straight", eval_every=2), evaluators=falling_then_rising())
    assert evaluated_steps(tmp_path / "run") == evaluated_steps(tmp_path / "straight") == [2, 4, 6, 8, 9]
    assert results["best"] == straight["best"] == {"test/top1": [1.0, 4]}
    assert results["eval"] == straight["eval"] == {"test": {"top1": 0.5, "odd": None}}


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    config = tiny(tmp_path / "run", eval_every=2)
    first = run(config, evaluators=falling_then_rising())
    checkpoint = list_checkpoints(config.out)[-1][1]
    before = checkpoint.stat().st_ino, checkpoint.stat().st_mtime_ns
    again = run(config, evaluators=falling_then_rising(), resume=True)
    assert again == first and again["train"]["step"] == STEPS
    assert evaluated_steps(config.out) == [2, 4, 6, 8, 9]
    assert (checkpoint.stat().st_ino, checkpoint.stat().st_mtime_ns) == before


@pytest.mark.parametrize("length", [{"steps": 4}, {"steps": None, "epochs": 0.4}])
def test_a_warm_up_that_does_not_fit_is_shortened(tmp_path, length):
    config = assign(tiny(tmp_path / "run", **length), ["optimizer.learning_rate.warmup_steps=100"])
    assert run(config)["total_steps"] == 4  # 0.4 * 320 / 32
    assert read_config(str(tmp_path / "run" / "config.json")).optimizer.learning_rate.warmup_steps == 0  # 4 // 10
    message = read_log(tmp_path / "run" / "log.jsonl")[0]["message"]
    assert message == "the warm-up of 100 steps does not fit into 4 steps: it becomes 0"
    assert run(config, resume=True)["status"] == "finished"


def test_resolved_config_repeats_the_run(uninterrupted, tmp_path):
    config = read_config(str(uninterrupted / "config.json"))
    assert config == tiny(uninterrupted)
    run(dataclasses.replace(config, out=str(tmp_path / "again")))
    assert_same_weights(tmp_path / "again", uninterrupted)


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    run(tiny(tmp_path / "run", seed=1))
    a, b = weights(tmp_path / "run"), weights(uninterrupted)
    assert not torch.equal(a["blocks.0.mlp.fc1.weight"], b["blocks.0.mlp.fc1.weight"])


def test_worker_processes_change_nothing(uninterrupted, tmp_path):
    config = tiny(tmp_path / "run")
    run(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2)))
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_the_callers_random_state_and_signal_handlers_stay(tmp_path):
    before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(tiny(tmp_path / "run", steps=3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_runs_in_a_thread_that_cannot_have_signal_handlers(tmp_path):
    results = {}
    thread = threading.Thread(target=lambda: results.update(run(tiny(tmp_path / "run", steps=3))))
    thread.start()
    thread.join()
    assert results["status"] == "finished"


def test_a_rate_that_explodes_stops_the_run_with_finite_weights(tmp_path):
    optimizer = OptimizerConfig(name="sgd", learning_rate=ScheduleConfig("constant", value=1e30))
    config = tiny(tmp_path / "run", optimizer=optimizer, checkpoint_every=1, ema_decay=None, steps=50)
    with pytest.raises(TrainingDivergedError, match=r"5 steps in a row had a loss or gradient that is not finite"):
        run(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "diverged" and results["skipped_steps"] == 5
    saved = load_file(list_checkpoints(tmp_path / "run")[-1][1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    events = [r["message"] for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "event"]
    assert sum("are not all finite" in message for message in events) == 5


def test_learns_evaluates_and_reports(tmp_path):
    config = tiny(tmp_path / "run", steps=60, ema_decay=None, log_every=20, eval_every=30, tensorboard=True)
    config = assign(config, ["data.mixup_alpha=0", "data.randaugment_ops=0", "model.dropout_rate=0",
                             "data.train_split=train[:2000]", "data.eval_split=test[:500]"])  # fmt: skip
    evaluator = ClassificationEvaluator(EvalLoader(config.data))
    results = run_training(config, {"test": lambda model, step: evaluator(model)}, show_progress=False)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["eval"]["test"]["top1"] > 0.3  # ten classes
    assert results["best"]["test/top1"][1] in (30, 60)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [(r["kind"], r["step"]) for r in log] == [
        ("train", 20),
        ("eval", 30),
        ("train", 40),
        ("train", 60),
        ("eval", 60),
    ]
    assert log[3]["main_loss"] < log[0]["main_loss"]
    health = log[0]["router"]["blocks.1"]
    assert sum(health["expert_load"]) == pytest.approx(1.0, abs=1e-4) and len(health["expert_load"]) == 4
    assert 0 <= health["dropped"] < 1 and 0 < health["entropy"] <= 1.3863 and health["dead_experts"] == 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    model = vm.load(results["model"])
    assert evaluator(model)["top1"] == results["eval"]["test"]["top1"]


def test_epochs_become_steps_and_classes_follow_the_data(tmp_path):
    config = assign(tiny(tmp_path / "run", steps=None, epochs=0.25), ["model.num_classes=7"])
    results = run(config)
    resolved = read_config(str(tmp_path / "run" / "config.json"))
    assert results["total_steps"] == resolved.steps == 3  # ceil(0.25 * 320 / 32)
    assert resolved.model.num_classes == 10 and resolved.epochs is None
    assert "10 classes, as the data has, not 7" in read_log(tmp_path / "run" / "log.jsonl")[0]["message"]


def test_fine_tuning_without_steps_keeps_everything_but_the_head(uninterrupted, tmp_path):
    config = dataclasses.replace(
        tiny(tmp_path / "tuned"), model=None, init_from=str(uninterrupted / "model"), new_head=True, steps=0,
        ema_decay=None, model_options={"capacity_factor": 2.0},
    )  # fmt: skip
    run(assign(config, ["data.image_size=56"]))
    before, after = weights(uninterrupted), weights(tmp_path / "tuned")
    for name in before:
        if name == "pos_embed":
            assert after[name].shape == (1, 17, 16)
            assert torch.equal(before[name][:, 0], after[name][:, 0])  # class token
            assert torch.equal(before[name][:, 1], after[name][:, 1])  # corners stay corners
            assert torch.equal(before[name][:, -1], after[name][:, -1])
        elif name.startswith("head."):
            assert (after[name] == 0).all()
        else:
            assert torch.equal(before[name], after[name]), name
    tuned = vm.load(tmp_path / "tuned" / "model")
    assert tuned.config.image_size == 56 and tuned.config.moe.capacity_factor == 2.0


def test_fine_tuning_resumes_without_the_checkpoint_it_came_from(uninterrupted, tmp_path):
    vm.load(uninterrupted / "model").save_pretrained(tmp_path / "start")
    config = dataclasses.replace(tiny(tmp_path / "a"), model=None, init_from=str(tmp_path / "start"))
    other = dataclasses.replace(config, out=str(tmp_path / "b"))
    run(config)
    run_until(other, 5)
    (tmp_path / "start" / "model.safetensors").unlink()
    run(other, resume=True)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_bfloat16_and_accumulation_run(tmp_path):
    config = tiny(tmp_path / "run", steps=3, precision="bfloat16", accumulation=4)
    assert run(config)["status"] == "finished"


def test_mistakes_are_one_clear_error(uninterrupted, tmp_path):
    with pytest.raises(ValueError, match="already holds a run: resume it"):
        run(tiny(uninterrupted))
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(tiny(tmp_path / "new"), resume=True)
    with pytest.raises(ValueError, match=r"must keep its config: optimizer\.learning_rate\.peak_value was 0\.01, got"):
        run(assign(tiny(uninterrupted), ["optimizer.learning_rate.peak_value=0.02"]), resume=True)
    with pytest.raises(ValueError, match="model_options cannot hold 'image_size'"):
        config = dataclasses.replace(tiny(tmp_path / "x"), model=None, init_from=str(uninterrupted / "model"))
        run(dataclasses.replace(config, model_options={"image_size": 56}))
    with pytest.raises(ValueError, match="cannot be used"):
        run(tiny(tmp_path / "y", device="gpu"))
    assert not (tmp_path / "y").exists()
