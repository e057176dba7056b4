"""One process of a job of several, for `test_sharded.py`: sharded_worker.py RANK SIZE FOLDER JOB [ARGUMENT ...]

FOLDER/rendezvous is where the processes meet; FOLDER/run is the run. A job ends with an assertion where it fails.
"""

import glob
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import visionmoe as vm
from visionmoe.checkpoint.sharded import AsyncSaver, latest_good_together, load_sharded, save_sharded, verify_together
from visionmoe.checkpoint.sharded_model import read_into_sharded, save_pretrained_sharded
from visionmoe.checkpoint.store import list_checkpoints
from visionmoe.config import to_dict

CONFIG = vm.ModelConfig(
    image_size=32, patch_size=8, num_classes=5, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2
).replace(num_experts=4, layers=(1,))
STATE = {"model": to_dict(CONFIG), "progress": {"step": 3, "best": None}}


def whole(seed=0):
    """What a run saves, as one process has it; the same on every process."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    model = {name: random(tensor.shape) for name, tensor in vm.create_model(CONFIG).state_dict().items()}
    optimizer = {f"{i}.mu": random(t.shape, torch.bfloat16) for i, t in enumerate(model.values())}
    optimizer |= {"0.step": torch.tensor(7.0), "1.count": torch.tensor(2**40 + seed), "2.row": random((3,))}
    return {"model": model, "optimizer": optimizer, "ema": {name: 2 * tensor for name, tensor in model.items()}}


def spread(groups, layout):
    """The same tensors laid out over the processes: {"dp": 1, "fsdp": 2, "ep": 2}, as the product lays them out."""
    dp, fsdp, ep = (layout.get(name, 1) for name in ("dp", "fsdp", "ep"))
    mesh = init_device_mesh("cpu", (dp, fsdp, ep), mesh_dim_names=("dp", "fsdp", "ep"))
    dense = init_device_mesh("cpu", (dp, fsdp * ep), mesh_dim_names=("replicate", "shard"))
    experts = {n for n in groups["model"] if ".experts." in n}
    shapes = {tuple(groups["model"][n].shape) for n in experts}

    def lay(name, tensor):
        if name in experts or (name not in groups["model"] and tuple(tensor.shape) in shapes):
            if fsdp > 1 and ep > 1:
                return distribute_tensor(tensor.clone(), mesh["fsdp", "ep"], [Shard(1), Shard(0)], src_data_rank=None)
            return distribute_tensor(tensor.clone(), mesh["ep"], [Shard(0)], src_data_rank=None)
        if fsdp > 1 and tensor.ndim:
            return distribute_tensor(tensor.clone(), dense, [Replicate(), Shard(0)], src_data_rank=None)
        return tensor.clone()

    return {group: {n: lay(n, t) for n, t in tensors.items()} for group, tensors in groups.items()}


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assert_equal(groups, expected):
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            given = local(groups[group][name])
            assert given.dtype == local(tensor).dtype and torch.equal(given, local(tensor)), (group, name)


def fill(groups, value):
    for tensors in groups.values():
        for tensor in tensors.values():
            local(tensor).fill_(value)


def raised(work):
    try:
        work()
    except (ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def move(folder, layout, source, target):
    """Reads step `source` of FOLDER/run in this layout and writes it as step `target`."""
    run, expected = folder / "run", spread(whole(), json.loads(layout))
    groups = spread(whole(seed=1), json.loads(layout))
    path = run / "checkpoints" / f"step_{int(source):08d}"
    verify_together(path)
    assert load_sharded(path, groups) == {"step": int(source), **STATE}
    assert_equal(groups, expected)
    save_sharded(run, int(target), groups, STATE)


def two(folder):
    """Everything that two processes are needed for, one after the other; the run has step 1, of one process."""
    run = folder / "run"
    move(folder, '{"ep": 2}', 1, 2)
    move(folder, '{"fsdp": 2}', 2, 3)
    assert latest_good_together(run).name == "step_00000003"
    groups = spread(whole(), {"ep": 2})
    saver = AsyncSaver()
    assert saver.wait() is None
    state = json.loads(json.dumps(STATE))
    saver.save(run, 4, spread(whole(seed=1), {"ep": 2}), state)
    saver.save(run, 4, groups, state)  # laid out as the one before, which it replaces
    fill(groups, 0)  # what a run does to its parameters meanwhile
    state["progress"]["step"] = -1
    assert saver.wait().name == "step_00000004"
    again = spread(whole(seed=1), {"ep": 2})
    assert load_sharded(run / "checkpoints" / "step_00000004", again)["progress"]["step"] == 3
    assert_equal(again, spread(whole(), {"ep": 2}))
    models(folder)
    report = {"errors": errors(run, saver), "damage": damage(run)}
    (folder / f"report-{dist.get_rank()}.json").write_text(json.dumps(report))
    killed(folder, saver)


def models(folder):
    """Live model -> one directory, and the directory and the released format -> the parts of a model."""
    expected = spread(whole(), {"ep": 2})["model"]
    save_pretrained_sharded(expected, CONFIG, folder / "live", class_names=list("abcde"))
    for source, config in ((folder / "live", None), (folder / "ckpt", CONFIG)):
        targets = spread(whole(seed=1), {"ep": 2})["model"]
        found = read_into_sharded(source, config, targets)
        assert found.config == CONFIG
        assert_equal({"model": targets}, {"model": expected})


def errors(run, saver):
    rank = dist.get_rank()
    tensors = {"model": {"a": torch.ones(3), **({"b": torch.ones(2)} if rank else {})}}
    names = raised(lambda: save_sharded(run, 9, tensors, {}))
    tensors = {"model": {"a": torch.ones(3 + rank)}}
    shapes = raised(lambda: save_sharded(run, 9, tensors, {}))
    saver.save(run, 9, {"model": {"a": torch.ones(3)}}, {"loss": float("nan")})
    state = raised(saver.wait)
    assert saver.wait().name == "step_00000004"  # an error is raised once
    sums = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()])
    partial = raised(lambda: save_sharded(run, 9, {"model": {"a": sums}}, {}))
    assert not glob.glob(str(run / "checkpoints" / "*9"))
    missing = raised(lambda: load_sharded(run / "checkpoints" / "step_00000004", {"model": {"a": torch.ones(3)}}))
    return [names, shapes, state, missing, partial]


def damage(run):
    """Flips a bit of process 1's file of the newest, and takes a file of the one before it away."""
    if dist.get_rank() == 0:
        flipped = run / "checkpoints" / "step_00000004" / "ema-00001-of-00002.safetensors"
        data = bytearray(flipped.read_bytes())
        data[-5] ^= 4
        flipped.write_bytes(data)
        (run / "checkpoints" / "step_00000003" / "optimizer-00000-of-00002.safetensors").unlink()
    dist.barrier()
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("visionmoe").addHandler(handler)
    path = latest_good_together(run)
    return [
        path.name,
        messages,
        raised(lambda: load_sharded(path.with_name("step_00000003"), {})),
    ]


def killed(folder, saver):
    """Process 1 is killed while it writes; process 0 learns of it and what was good stays so."""
    run = folder / "killed"
    small = {"model": {"a": torch.ones(8)}}
    save_sharded(run, 1, small, {})
    big = {"model": {f"t{i}": torch.full((1 << 22,), float(i)) for i in range(8)}}
    if dist.get_rank() == 1:

        def kill():
            while not glob.glob(str(run / "checkpoints" / ".partial-*" / "model-00001-of-00002.safetensors")):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    saver.save(run, 2, big, {})
    error = raised(saver.wait)
    assert [step for step, _ in list_checkpoints(run)] == [1]
    (folder / "killed.json").write_text(json.dumps(error))
    os._exit(0)  # the others are gone: there is nobody to leave the job with


if __name__ == "__main__":
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    {"move": move, "two": two}[sys.argv[4]](folder, *sys.argv[5:])
    dist.destroy_process_group()
