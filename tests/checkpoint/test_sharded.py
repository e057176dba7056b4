"""Checkpoints of several processes: real processes (gloo) write and read them; `sharded_worker.py` is what they do."""

import hashlib
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import visionmoe as vm
from visionmoe.checkpoint import write_vmoe
from visionmoe.checkpoint.convert import ConvertConfig, run_convert
from visionmoe.checkpoint.mapping import our_shapes, tensors_to_vmoe
from visionmoe.checkpoint.sharded import AsyncSaver, latest_good_together, load_sharded, save_sharded
from visionmoe.checkpoint.sharded_model import export_pretrained, read_into_sharded, save_pretrained_sharded
from visionmoe.checkpoint.store import list_checkpoints, load_run_state, verify
from visionmoe.model.pretrained import Preprocessing, write_pretrained
from visionmoe.model.tensor_file import open_tensor_file, plan_file, runs

WORKER = Path(__file__).with_name("sharded_worker.py")
_spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def start(folder, size, *job):
    """Runs a job on `size` processes; returns their exit codes."""
    (folder / "rendezvous").unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(WORKER)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), *map(str, job)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    texts = [process.communicate(timeout=200)[1] for process in processes]
    codes = [process.returncode for process in processes]
    print(*texts, sep="\n")
    return codes


def assert_same(actual, expected):
    assert {group: set(tensors) for group, tensors in actual.items()} == {g: set(t) for g, t in expected.items()}
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            given = actual[group][name]
            assert given.dtype == tensor.dtype and torch.equal(given, tensor), (group, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that one process began and two went on with, and what these have written."""
    folder = tmp_path_factory.mktemp("sharded")
    save_sharded(folder / "run", 1, worker.whole(), worker.STATE)
    write_vmoe(folder / "ckpt", tensors_to_vmoe(worker.whole()["model"], worker.CONFIG), num_shards=2)
    assert start(folder, 2, "two") == [0, -signal.SIGKILL]
    return folder


def test_one_process_goes_on_from_two_and_every_element_is_stored_once(folder):
    path = folder / "run" / "checkpoints" / "step_00000002"
    loaded = load_run_state(path)
    assert (loaded.step, loaded.state) == (2, worker.STATE)
    assert_same(loaded.tensors, worker.whole())
    targets = worker.whole(seed=1)
    assert load_sharded(path, targets) == {"step": 2, **worker.STATE}
    assert_same(targets, worker.whole())
    for group, tensors in worker.whole().items():
        total = sum(tensor.nbytes for tensor in tensors.values())
        files = sorted(path.glob(f"{group}-*"))
        assert [file.name for file in files] == [f"{group}-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
        sizes = [sum(stored.nbytes for stored in open_tensor_file(file).tensors.values()) for file in files]
        assert sum(sizes) == total
    # experts are divided in two, the other tensors are spread: the difference is at most one of them
    both = [
        sum(
            stored.nbytes
            for file in path.glob(f"*-0000{rank}-of-00002*")
            for stored in open_tensor_file(file).tensors.values()
        )
        for rank in (0, 1)
    ]
    dense = [t.nbytes for tensors in worker.whole().values() for name, t in tensors.items() if ".experts." not in name]
    assert abs(both[0] - both[1]) <= max(dense)


def test_faults_are_named_on_both_processes_and_the_previous_checkpoint_is_used(folder, caplog):
    first, second = (json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1))
    names, shapes, state, missing, partial = first["errors"]
    assert names == "ValueError: model.b is (2,) torch.float32 on rank 1, but missing on rank 0"
    assert shapes == "ValueError: model.a is (4,) torch.float32 on rank 1, but (3,) torch.float32 on rank 0"
    assert second["errors"][:2] == [text.replace("Error: ", "Error: rank 0: ") for text in (names, shapes)]
    assert (
        state
        == "ValueError: checkpoint of step 9 is not written: Out of range float values are not JSON compliant: nan"
    )
    assert second["errors"][2] == state.replace("written: ", "written: rank 0: ")
    assert "step_00000004: model does not fit this run; missing: a (3,)" in missing
    assert partial.startswith(
        "ValueError: model.a is laid out as (Partial(sum),); checkpoints know Shard and Replicate"
    )
    name, warned, gone = first["damage"]
    assert name == second["damage"][0] == "step_00000002"
    assert second["damage"][1] == []
    assert len(warned) == 2
    assert "step_00000004/ema-00001-of-00002.safetensors is damaged: its SHA-256" in warned[0]
    assert "step_00000003/optimizer-00000-of-00002.safetensors is missing; going on from step_00000002" in warned[1]
    assert "optimizer-00000-of-00002.safetensors is missing" in gone
    assert latest_good_together(folder / "run").name == "step_00000002"  # one process sees the same
    assert caplog.messages == warned


def test_a_process_killed_while_it_writes_leaves_the_previous_checkpoint(folder):
    error = json.loads((folder / "killed.json").read_text())
    assert error.startswith("RuntimeError: checkpoint of step 2 is not written: ") and "\n" not in error
    [(step, path)] = list_checkpoints(folder / "killed")
    assert step == 1 and len(verify(path)) == 2  # the one tensor's file and the state
    save_sharded(folder / "killed", 3, {"model": {"a": torch.ones(8)}}, {})
    names = sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000003"]


def test_models_of_two_processes_are_the_files_that_one_writes(folder, tmp_path):
    expected = worker.whole()
    write_pretrained(tmp_path / "one", worker.CONFIG, expected["model"], class_names=list("abcde"))
    model = vm.load(folder / "live")
    assert model.class_names == tuple("abcde")
    assert_same({"model": model.state_dict()}, {"model": expected["model"]})
    path = folder / "run" / "checkpoints" / "step_00000002"
    export_pretrained(path, tmp_path / "exported", class_names=list("abcde"))
    export_pretrained(path, tmp_path / "averaged", group="ema")
    assert_same({"ema": vm.load(tmp_path / "averaged").state_dict()}, {"ema": expected["ema"]})
    for name in ("config.json", "model.safetensors"):
        one = (tmp_path / "one" / name).read_bytes()
        assert (folder / "live" / name).read_bytes() == one
        assert (tmp_path / "exported" / name).read_bytes() == one
    with pytest.raises(ValueError, match="has no 'other', only ema, model, optimizer"):
        export_pretrained(path, tmp_path / "other", group="other")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_two_processes_becomes_the_released_format(folder, tmp_path):
    path = str(folder / "run" / "checkpoints" / "step_00000002")
    results = run_convert(ConvertConfig(path, str(tmp_path / "vmoe"), to="vmoe", num_shards=2))
    assert set(results["files"]) == {
        "config.json",
        "ckpt.index",
        "ckpt.data-00000-of-00002",
        "ckpt.data-00001-of-00002",
    }
    for name in ("ckpt.index", "ckpt.data-00000-of-00002", "ckpt.data-00001-of-00002"):
        assert (tmp_path / "vmoe" / name).read_bytes() == (folder / name).read_bytes()
    assert not list((tmp_path / "vmoe").glob(".*"))
    run_convert(ConvertConfig(path, str(tmp_path / "averaged"), averaged=True))
    assert_same({"ema": vm.load(tmp_path / "averaged").state_dict()}, {"ema": worker.whole()["ema"]})
    with pytest.raises(ValueError, match=r"averaged is for a run's checkpoint \(a folder with manifest\.json\)"):
        run_convert(ConvertConfig(str(tmp_path / "averaged"), str(tmp_path / "x"), averaged=True))
    with pytest.raises(ValueError, match="has a config of its own"):
        run_convert(ConvertConfig(path, str(tmp_path / "x"), config="config.json"))


def test_an_export_knows_what_the_run_says_of_its_images(tmp_path):
    preprocessing = Preprocessing.of(worker.CONFIG, resize_to=40)
    state = {**worker.STATE, "preprocessing": vm.config.to_dict(preprocessing), "class_names": list("vwxyz")}
    path = save_sharded(tmp_path, 1, worker.whole(), state)
    export_pretrained(path, tmp_path / "exported")
    model = vm.load(tmp_path / "exported")
    assert (model.preprocessing, model.class_names) == (preprocessing, tuple("vwxyz"))


def test_one_process_uses_the_same_functions(tmp_path):
    groups = worker.whole()
    saver = AsyncSaver()
    saver.save(tmp_path, 5, groups, worker.STATE, keep_last=1)
    worker.fill(groups, 0)
    path = saver.wait()
    assert sorted(file.name for file in path.iterdir()) == [
        "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert_same(load_run_state(path).tensors, worker.whole())
    plain = save_sharded(tmp_path / "plain", 5, worker.whole(), worker.STATE)
    for name in ("ema", "model", "optimizer"):  # and its files are the same
        assert (path / f"{name}.safetensors").read_bytes() == (plain / f"{name}.safetensors").read_bytes()
    save_sharded(tmp_path, 6, worker.whole(), worker.STATE, keep_last=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6]
    save_pretrained_sharded(worker.whole()["model"], worker.CONFIG, tmp_path / "model")
    targets = worker.whole(seed=1)["model"]
    read_into_sharded(tmp_path / "model", None, targets)
    assert_same({"model": targets}, {"model": worker.whole()["model"]})
    with pytest.raises(ValueError, match=r"what is to be filled .*not of this model|wrong shape"):
        read_into_sharded(tmp_path / "model", None, {"head.bias": torch.zeros(6)})


def test_an_empty_group_and_other_types_on_loading(tmp_path):
    tensors = {"model": {"a": torch.arange(6.0).view(2, 3)}, "optimizer": {}}
    path = save_sharded(tmp_path, 1, tensors, {})
    assert load_run_state(path).tensors["optimizer"] == {}
    target = torch.zeros(3, 2, dtype=torch.bfloat16).T
    load_sharded(path, {"model": {"a": target}, "optimizer": {}})
    assert torch.equal(target, torch.arange(6.0).view(2, 3).bfloat16())
    with pytest.raises(ValueError, match="wrong shape"):
        load_sharded(path, {"model": {"a": torch.zeros(3, 2)}})


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 4, 5), (2, 1, 3, 2), (1,)])
def test_runs_are_the_elements_of_a_box(shape):
    array = torch.arange(torch.Size(shape).numel()).view(shape)
    flat = array.view(-1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in shape]
        box = tuple((start, stop) for start, stop in corners)
        expected = array[tuple(slice(*bounds) for bounds in box)]
        found = torch.full_like(expected, -1)
        for begin, index, part in runs(shape, box, 1 << 20):  # so large elements that stretches are cut
            found[index] = flat[begin : begin + torch.Size(part).numel()].view(part)
        assert torch.equal(found, expected)
    assert list(runs((), (), 4)) == [(0, (), ())]


def test_headers_are_those_of_the_safetensors_package(tmp_path):
    shapes = {"b": ((2, 3), torch.bfloat16), "ü": ((), torch.float64), "a": ((0, 4), torch.int8)}
    start, places = plan_file(shapes, {"k": "v"})
    (tmp_path / "file").write_bytes(start + bytes(12 + 8))
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() == {"k": "v"}
        assert {n: tuple(opened.get_slice(n).get_shape()) for n in places} == {n: s for n, (s, _) in shapes.items()}
    assert open_tensor_file(tmp_path / "file").tensors == places
    with pytest.raises(ValueError, match=r"b has dtype torch\.complex64, allowed: torch\.float64, "):
        plan_file({"b": ((1,), torch.complex64)})


MEMORY = """
import sys, threading, time
from visionmoe.checkpoint.convert import ConvertConfig, run_convert
def anonymous():  # what the system cannot take back; a mapped file's pages it can
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10
def grown(*job):
    before, peak, on = anonymous(), 0, True
    def watch():
        nonlocal peak
        while on:
            peak = max(peak, anonymous() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    run_convert(ConvertConfig(*job[:2], to=job[2]))
    on = False
    thread.join()
    return peak
grown(sys.argv[2], sys.argv[3], "vmoe")  # a small one: what is imported and allocated once
print(grown(sys.argv[1], sys.argv[3], "safetensors"), grown(sys.argv[1], sys.argv[3] + "/vmoe", "vmoe"))
"""


def test_export_holds_slices_not_the_model(tmp_path):
    large = worker.CONFIG.replace(hidden_size=512, mlp_dim=6144, num_experts=8)
    paths = []
    for number, config in enumerate((large, worker.CONFIG)):
        shapes = our_shapes(config)
        model = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
        state = {**worker.STATE, "model": vm.config.to_dict(config)}
        paths.append(save_sharded(tmp_path / str(number), 1, {"model": model}, state))
    size = (paths[0] / "model.safetensors").stat().st_size
    assert size > 200 << 20
    command = [sys.executable, "-c", MEMORY, *map(str, paths), str(tmp_path / "out")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"model {size >> 20} MiB, memory grew by (bytes) {text}")
    directory, released = map(int, text.split())
    assert directory < 60 << 20  # one slice of 16 MiB, or one expert, and what the allocator keeps
    assert released < 120 << 20  # one slice of 64 MiB, with its axes in another order
    paths = (tmp_path / "out" / "model.safetensors", paths[0] / "model.safetensors")
    written, given = (open_tensor_file(path) for path in paths)
    assert hashed(written) == hashed(given)


def hashed(file):
    """Digests of a file's tensors by name."""
    data = np.memmap(file.path)
    return {name: hashlib.sha256(data[t.offset : t.offset + t.nbytes]).hexdigest() for name, t in file.tensors.items()}


@pytest.mark.distributed4
@pytest.mark.timeout(1200)
def test_from_one_to_four_to_two_to_one_to_four(tmp_path):
    save_sharded(tmp_path / "run", 1, worker.whole(), worker.STATE)
    plan = [(4, {"fsdp": 2, "ep": 2}), (2, {"ep": 2}), (1, {}), (4, {"dp": 2, "ep": 2}), (4, {"ep": 4}),
            (2, {"fsdp": 2}), (4, {"dp": 2, "fsdp": 2}), (4, {"fsdp": 4})]  # fmt: skip
    for step, (size, layout) in enumerate(plan, start=1):
        assert start(tmp_path, size, "move", json.dumps(layout), step, step + 1) == [0] * size, (step, layout)
        assert_same(load_run_state(tmp_path / "run" / "checkpoints" / f"step_{step + 1:08d}").tensors, worker.whole())
