import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.sharded import latest_good_together, save_sharded
from visionmoe.checkpoint.store import (
    join_optimizer_state,
    list_checkpoints,
    load_run_state,
    remove_newer,
    split_optimizer_state,
    verify,
)


def save(run, step, **options):
    tensors = {"model": {"a": torch.full((3,), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)},
               "optimizer": {"0.mu": torch.ones(2, 2).T}}  # fmt: skip
    return save_sharded(run, step, tensors, {"best": 0.5}, **options)


def test_round_trip_keeps_values_and_types(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "step_00000007"
    loaded = load_run_state(path)
    assert (loaded.step, loaded.state) == (7, {"best": 0.5})
    assert torch.equal(loaded.tensors["model"]["a"], torch.full((3,), 7.0))
    assert loaded.tensors["model"]["b"].dtype == torch.bfloat16
    assert torch.equal(loaded.tensors["optimizer"]["0.mu"], torch.ones(2, 2))


def test_keep_last_removes_the_oldest(tmp_path):
    for step in (1, 20, 3):
        save(tmp_path, step, keep_last=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 20]
    assert latest_good_together(tmp_path).name == "step_00000020"
    with pytest.raises(ValueError, match="keep_last must be >= 1, got 0"):
        save(tmp_path, 4, keep_last=0)


def test_same_step_is_replaced(tmp_path):
    save(tmp_path, 2)
    save_sharded(tmp_path, 2, {"model": {"a": torch.zeros(1)}}, {})
    assert list(load_run_state(latest_good_together(tmp_path)).tensors) == ["model"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_killed_while_replacing_leaves_the_old_one(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    path.rename(path.with_name(f"old-{path.name}"))  # the moment between the two renames
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    assert load_run_state(latest_good_together(tmp_path)).step == 2
    assert save(tmp_path, 2) == path
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000002"]


def test_damaged_newer_checkpoints_cost_no_good_one(tmp_path, caplog):
    good = save(tmp_path, 200)
    damaged = save(tmp_path, 300)
    (damaged / "state.json").write_text("{}")
    # The one just written stays although a newer one is there.
    written = save(tmp_path, 250, keep_last=1)
    assert [path for _, path in list_checkpoints(tmp_path)] == [written, damaged]
    assert latest_good_together(tmp_path) == written
    [warned] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step_00000300/state.json is damaged" in warned
    assert remove_newer(written) == [damaged]
    assert not good.exists() and [path for _, path in list_checkpoints(tmp_path)] == [written]
    assert remove_newer(written) == []


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert latest_good_together(tmp_path) is None
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_every_flipped_bit_is_found_named_and_the_older_one_is_used(tmp_path, name, caplog):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    good = file.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        if name == "manifest.json" and damaged.split() == good.split():
            continue  # another kind of white space
        caplog.clear()
        assert latest_good_together(tmp_path).name == "step_00000001"
        [message] = caplog.messages
        assert f"{name} is damaged" in message
    file.write_bytes(good)
    assert latest_good_together(tmp_path).name == "step_00000002"


def test_cut_and_missing_files_are_named(tmp_path):
    path = save(tmp_path, 1)
    file = path / "optimizer.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors is damaged: {len(good) - 1} bytes"):
        verify(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"optimizer\.safetensors is missing"):
        load_run_state(path)
    with pytest.raises(CheckpointError, match=r"no good checkpoint .*optimizer\.safetensors is missing"):
        latest_good_together(tmp_path)


def test_an_unlisted_file_is_not_read(tmp_path):
    path = save(tmp_path, 1)
    (path / "model2.safetensors").write_bytes(b"rubbish")
    assert sorted(load_run_state(path).tensors) == ["model", "optimizer"]


KILLED = """
import sys, torch
from visionmoe.checkpoint.sharded import save_sharded
group = {f"t{i}": torch.full((1 << 16,), float(i)) for i in range(16)}
for step in range(1, 10_000):
    save_sharded(sys.argv[1], step, {"model": group}, {}, keep_last=3)
    print(step, flush=True)
"""


def test_killed_while_writing_leaves_only_whole_checkpoints(tmp_path):
    for delay in (0.0, 0.003, 0.009):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoints = list_checkpoints(tmp_path)
        assert len(checkpoints) >= 3
        for _, path in checkpoints:
            verify(path)
    save(tmp_path, 20_000)
    assert all(name.startswith("step_") for name in os.listdir(tmp_path / "checkpoints"))


def test_optimizer_state_splits_and_joins():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    tensors, values = split_optimizer_state(optimizer.state_dict())
    assert set(tensors) == {"0.step", "0.exp_avg", "0.exp_avg_sq"}
    again = torch.optim.Adam([parameter], lr=0.5)
    again.load_state_dict(join_optimizer_state(tensors, values))
    assert again.param_groups[0]["lr"] == 0.1
    assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
