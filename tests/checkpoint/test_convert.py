"""Conversion between the released format and our directories: bit for bit, both ways."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.checkpoint import VmoeReader, read_vmoe, write_vmoe
from visionmoe.checkpoint.convert import ConvertConfig, run_convert
from visionmoe.checkpoint.mapping import tensors_to_vmoe
from visionmoe.model.pretrained import Preprocessing, write_pretrained

SMALL = vm.ModelConfig(
    image_size=32, patch_size=8, num_classes=5, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2
).replace(num_experts=4, layers=(1,))


def files(folder, pattern="ckpt.*"):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.parametrize("name", ["dense-vit", "ensemble-m2", "soft-moe", "map-head", "last2-gap-prelogits"])
def test_against_reference_checkpoints_there_and_back(name, conformance_case, tmp_path):
    path, _ = conformance_case(name)
    there = run_convert(ConvertConfig(str(path / "ckpt"), str(tmp_path / "dir"), str(path / "config.json")))
    assert there == json.loads((tmp_path / "dir" / "results.json").read_text())
    assert there["files"].keys() == {"config.json", "model.safetensors"}
    back = run_convert(ConvertConfig(str(tmp_path / "dir"), str(tmp_path / "back"), to="vmoe", num_shards=3))
    expected, actual = read_vmoe(path / "ckpt"), read_vmoe(back["prefix"])
    assert list(actual) == list(expected)
    for key, array in expected.items():
        assert actual[key].dtype == array.dtype and actual[key].tobytes() == array.tobytes(), key
    assert back["parameters"] == sum(array.size for array in expected.values())


def test_files_of_our_layout_are_identical(tmp_path):
    state = {n: torch.randn_like(t) for n, t in vm.create_model(SMALL).state_dict().items()}
    # Mixed dtypes, and bits that arithmetic would not keep: a NaN with a payload, a denormal, minus zero.
    state["norm.weight"][:3] = torch.tensor([0x7FC12345, 1, -(1 << 31)], dtype=torch.int32).view(torch.float32)
    state["blocks.1.mlp.experts.fc1.weight"] = state["blocks.1.mlp.experts.fc1.weight"].bfloat16()
    state["head.weight"] = state["head.weight"].half()
    write_vmoe(tmp_path / "ckpt", tensors_to_vmoe(state, SMALL), num_shards=2)
    write_pretrained(tmp_path / "config", SMALL, state)
    run_convert(ConvertConfig(str(tmp_path / "ckpt"), str(tmp_path / "dir"), str(tmp_path / "config")))
    run_convert(ConvertConfig(str(tmp_path / "dir"), str(tmp_path / "back"), to="vmoe", num_shards=2))
    assert files(tmp_path / "back") == files(tmp_path)
    assert VmoeReader(tmp_path / "back" / "ckpt").dtypes["head/kernel"] == "float16"
    assert files(tmp_path / "dir", "*.safetensors") == files(tmp_path / "config", "*.safetensors")
    # The folder of a released checkpoint holds the config for the way back.
    run_convert(
        ConvertConfig(str(tmp_path / "back" / "ckpt"), str(tmp_path / "again"), str(tmp_path / "back" / "config.json"))
    )
    assert files(tmp_path / "again", "model.safetensors") == files(tmp_path / "dir", "model.safetensors")


def test_preprocessing_is_carried_along(tmp_path):
    preprocessing = Preprocessing((32, 32), mean=(0.1, 0.2, 0.3), resize="small", resize_to=40)
    write_pretrained(tmp_path / "a", SMALL, vm.create_model(SMALL).state_dict(), preprocessing)
    run_convert(ConvertConfig(str(tmp_path / "a"), str(tmp_path / "b")))
    assert files(tmp_path / "a", "config.json") == files(tmp_path / "b", "config.json")


def test_npz_becomes_a_directory(tmp_path):
    config = SMALL.replace(layers=())
    model = vm.create_model(config)
    flat = {n: t.numpy() for n, t in tensors_to_vmoe(model.state_dict(), config).items()}
    np.savez(tmp_path / "x.npz", **flat)
    write_pretrained(tmp_path / "config", config, model.state_dict())
    run_convert(ConvertConfig(str(tmp_path / "x.npz"), str(tmp_path / "out"), str(tmp_path / "config/config.json")))
    loaded = vm.load(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())


def test_mistakes_are_one_error_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="to must be safetensors or vmoe, got 'onnx'"):
        run_convert(ConvertConfig("x", str(tmp_path / "out"), to="onnx"))
    with pytest.raises(FileNotFoundError, match="neither a directory, nor a checkpoint"):
        run_convert(ConvertConfig("nothing", str(tmp_path / "out")))
    write_pretrained(tmp_path / "a", SMALL, vm.create_model(SMALL).state_dict())
    with pytest.raises(ValueError, match="num_shards must be between 1 and 99999, got 0"):
        run_convert(ConvertConfig(str(tmp_path / "a"), str(tmp_path / "out"), to="vmoe", num_shards=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [True, False])
def test_a_kill_between_the_two_renames(tmp_path, monkeypatch, same):
    """A model that is written again stays readable; new weights are never read with another model's config."""
    first, second = vm.create_model(SMALL), vm.create_model(SMALL if same else SMALL.replace(num_heads=1))
    first.save_pretrained(tmp_path)
    replace = os.replace

    def killed(source, target):
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        second.save_pretrained(tmp_path)
    if same:
        loaded = vm.load(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in second.state_dict().items())
    else:
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            vm.load(tmp_path)
