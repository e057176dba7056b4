"""`visionmoe.load`: every source, every override, every fault; and its memory."""

import functools
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.checkpoint import params_from_vmoe, params_to_vmoe, read_vmoe, resize_pos_embed, write_vmoe
from visionmoe.checkpoint.mapping import our_shapes, tensors_to_vmoe
from visionmoe.checkpoint.registry import PUBLISHED, PublishedCheckpoint
from visionmoe.config import to_dict
from visionmoe.model.pretrained import (
    Preprocessing,
    open_pretrained_weights,
    read_pretrained_config,
    read_pretrained_state,
    write_pretrained,
)

SMALL = vm.ModelConfig(
    image_size=32, patch_size=8, num_classes=5, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2, head_bias_init=-3
).replace(num_experts=4, layers=(1,), capacity_factor=1.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vm.create_model(SMALL).eval()
    with torch.no_grad():  # nothing may be zero or one by chance
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def prefix(model, tmp_path):
    write_vmoe(tmp_path / "ckpt", params_to_vmoe(model.state_dict(), SMALL), num_shards=2)
    return tmp_path / "ckpt"


@pytest.fixture
def directory(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same_state(model, expected, but=()):
    state = model.state_dict()
    assert set(state) == set(expected) or but
    for name, tensor in state.items():
        if name.split(".")[0] not in but:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", ["dense-vit", "top2-bpr-tight", "ensemble-m2", "soft-moe"])
@pytest.mark.parametrize("way", ["config", "the reference's config.json", "our config.json", "directory"])
def test_against_reference_logits(name, way, conformance_case, tmp_path):
    path, case = conformance_case(name)
    config = vm.ModelConfig.from_reference(case["model"], image_size=case["image_size"])
    if way == "config":
        model = vm.load(path / "ckpt", config)
    elif way == "the reference's config.json":
        model = vm.load(path / "ckpt.index", config=path / "config.json")
    elif way == "our config.json":
        (tmp_path / "run.json").write_text(json.dumps({"model": to_dict(config), "steps": 3}))
        model = vm.load(str(path / "ckpt"), config=str(tmp_path / "run.json"))
    else:
        vm.load(path / "ckpt", config).save_pretrained(tmp_path)
        model = vm.load(tmp_path)
    assert model.config == config and not model.training
    expected = np.load(path / "expected.npz")
    with torch.no_grad():
        actual = model(torch.from_numpy(expected["images"]).permute(0, 3, 1, 2)).logits.numpy()
    tolerance = 2e-2 if name == "soft-moe" else 2e-5
    np.testing.assert_allclose(actual, expected["logits"], rtol=0, atol=tolerance * np.abs(expected["logits"]).max())


def test_directory_is_identical_and_trainable(model, directory):
    loaded = vm.load(directory)
    assert_same_state(loaded, model.state_dict())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    loaded.train()(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert vm.load(str(directory)).config == SMALL


def test_config_json_is_as_documented(directory):
    data = json.loads((directory / "config.json").read_text())
    assert data["format"] == "visionmoe-1"
    assert data["model"] == to_dict(SMALL)
    assert data["preprocessing"] == {
        "image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "antialias": False,
        "resize": "exact", "resize_to": None,
    }  # fmt: skip
    read = read_pretrained_config(directory)
    assert read.model == SMALL and read.preprocessing == Preprocessing.of(SMALL)


def test_routing_that_was_set_is_saved(model, tmp_path):
    model.set_routing(num_selected_experts=1, capacity_factor=0.5, batch_priority=True, layers=[1])
    model.save_pretrained(tmp_path)
    assert vm.load(tmp_path).config == model.config


def test_dtypes_of_a_directory_are_kept_in_it_and_become_float32(model, tmp_path):
    half = {n: t.bfloat16() if "mlp" in n else t for n, t in model.state_dict().items()}
    write_pretrained(tmp_path, SMALL, half)
    stored = read_pretrained_state(tmp_path)
    assert all(torch.equal(stored[n], t) and stored[n].dtype == t.dtype for n, t in half.items())
    assert_same_state(vm.load(tmp_path), {n: t.float() for n, t in half.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversion_in_parts(model, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("visionmoe.model.pretrained._READ_BYTES", 64)  # 8 values of float64, 32 of bfloat16
    stored = {n: t.to(dtype) for n, t in model.state_dict().items()}
    write_pretrained(tmp_path, SMALL, stored)
    assert_same_state(vm.load(tmp_path), {n: t.float() for n, t in stored.items()})


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_translation_in_parts(model, prefix, monkeypatch, size):
    """A part may be less than one row (24 * 4 bytes of an expert), some rows, or most of an array."""
    monkeypatch.setattr("visionmoe.checkpoint.mapping._COPY_BYTES", size)
    monkeypatch.setattr("visionmoe.checkpoint.vmoe_format._BLOCK_BYTES", max(size, 4))
    state = params_from_vmoe(read_vmoe(prefix), SMALL)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert_same_state(vm.load(prefix, SMALL), model.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed": "sincos2d"},
        {"pooling": "map"},
        {"pooling": "gap", "attention_qk_norm": True},
        {"representation_size": 6},
        {"ensemble_size": 2},
        {"router": "soft"},
        {"router": "expert_choice"},
        {"layers": ()},
    ],
    ids=str,
)
def test_nothing_of_a_loaded_model_is_left_from_its_making_without_memory(options, tmp_path):
    """Parameters, buffers and tensors kept as plain attributes are all real, and what the model computes is equal."""
    torch.manual_seed(0)
    model = vm.create_model(SMALL, **options).eval()
    model.save_pretrained(tmp_path)
    loaded = vm.load(tmp_path)
    kept = [value for module in loaded.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    for tensor in (*loaded.parameters(), *loaded.buffers(), *kept):
        assert tensor.device.type == "cpu"
    assert {n: tuple(b.shape) for n, b in loaded.named_buffers()} == {
        n: tuple(b.shape) for n, b in model.named_buffers()
    }
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
        assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    again = type(model).from_pretrained(str(tmp_path))
    assert_same_state(again, model.state_dict())


def test_loaded_parameters_train_move_and_resize_as_others_do(directory):
    """Their memory comes from numpy; nothing that torch does with a parameter may mind."""
    loaded = vm.load(directory)
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    before = {n: p.detach().clone() for n, p in loaded.named_parameters()}
    loaded.train()(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(before[n], p) for n, p in loaded.named_parameters())
    weight = loaded.blocks[0].attn.qkv.weight
    storage = weight.untyped_storage()
    assert weight.data_ptr() % 16 == 0 and storage.nbytes() == weight.nbytes
    assert loaded.share_memory() is loaded and weight.is_shared()
    assert {p.dtype for p in loaded.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_shared_and_strided_tensors_are_saved(model, tmp_path):
    state = model.state_dict()
    state["norm.bias"] = state["norm.weight"]
    state["head.weight"] = torch.randn(16, 5).T
    write_pretrained(tmp_path, SMALL, state)
    assert_same_state(vm.load(tmp_path), state)


def test_bfloat16_checkpoint(model, tmp_path):
    half = {n: t.bfloat16() for n, t in model.state_dict().items()}
    write_vmoe(tmp_path / "ckpt", tensors_to_vmoe(half, SMALL))
    assert_same_state(vm.load(tmp_path / "ckpt", SMALL), {n: t.float() for n, t in half.items()})


def test_training_state_gives_its_params(model, tmp_path):
    flat = params_to_vmoe(model.state_dict(), SMALL)
    state = {f"params/{n}": a for n, a in flat.items()} | {"step": np.array(7), "opt_state/0/mu/cls": flat["cls"]}
    write_vmoe(tmp_path / "ckpt", state)
    assert_same_state(vm.load(tmp_path / "ckpt", SMALL), model.state_dict())


def test_npz_of_a_dense_vit(tmp_path):
    config = SMALL.replace(layers=(), image_size=(16, 32))
    dense = vm.create_model(config)
    flat = params_to_vmoe(dense.state_dict(), config)
    np.savez(tmp_path / "x.npz", **{n.replace("Encoder/", "Transformer/"): a for n, a in flat.items()})
    assert_same_state(vm.load(tmp_path / "x.npz", config), dense.state_dict())
    headless = {n: a for n, a in flat.items() if not n.startswith("head/")}
    np.savez(tmp_path / "y.npz", **headless)
    with pytest.raises(ValueError, match=r"y\.npz does not fit the config; missing: head/kernel"):
        vm.load(tmp_path / "y.npz", config)
    assert not vm.load(tmp_path / "y.npz", config, new_head=True).head.weight.any()
    with pytest.raises(ValueError, match=r"x\.npz needs config="):
        vm.load(tmp_path / "x.npz")


def test_directory_and_prefix_of_the_same_name(model, prefix):
    prefix.mkdir()  # a folder without a model does not hide the checkpoint
    assert_same_state(vm.load(prefix, SMALL), model.state_dict())
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_pretrained(prefix, SMALL, changed)
    assert_same_state(vm.load(prefix), changed)


@pytest.mark.parametrize("size, grid", [(48, (6, 6)), ((16, 64), (2, 8))])
def test_image_size_resizes_positions(model, prefix, directory, size, grid):
    for loaded in (vm.load(prefix, SMALL, image_size=size), vm.load(directory, image_size=size)):
        tokens = grid[0] * grid[1] + 1
        expected = resize_pos_embed(model.pos_embed.detach(), tokens, old_grid=(4, 4), new_grid=grid)
        assert torch.equal(loaded.pos_embed, expected)
        assert_same_state(loaded, model.state_dict(), but={"pos_embed"})
        images = torch.zeros(1, 3, *loaded.config.image_hw)
        assert loaded(images).logits.shape == (1, 5)


def test_new_heads(model, prefix, directory):
    for source, config in ((prefix, SMALL), (directory, None)):
        changed = vm.load(source, config, num_classes=7)
        assert changed.head.weight.shape == (7, 16) and not changed.head.weight.any()
        assert (changed.head.bias == -3).all()
        same = vm.load(source, config, new_head=True, head_bias_init=-1.0)
        assert same.head.weight.shape == (5, 16) and not same.head.weight.any() and (same.head.bias == -1).all()
        features = vm.load(source, config, num_classes=None)
        for loaded in (changed, same, features):
            assert_same_state(loaded, model.state_dict(), but={"head"})
        assert features(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 16)


def test_pre_logits_can_be_dropped(tmp_path):
    config = SMALL.replace(representation_size=6)
    model = vm.create_model(config)
    model.save_pretrained(tmp_path)
    assert_same_state(vm.load(tmp_path), model.state_dict())
    dropped = vm.load(tmp_path, representation_size=None, num_classes=3)
    assert dropped.head.weight.shape == (3, 16) and not any("pre_logits" in n for n in dropped.state_dict())
    with pytest.raises(ValueError, match="representation_size of stored parameters is 6 and can only become None"):
        vm.load(tmp_path, representation_size=9)


def test_routing_options_are_overridden(prefix):
    loaded = vm.load(prefix, SMALL, capacity_factor=0.4, num_selected_experts=1, batch_priority=True)
    assert loaded.config.moe.routing() == vm.RoutingSetting(1, 0.4, True)


def test_routing_options_reach_layers_with_their_own_setting(model, tmp_path):
    model.set_routing(2, 0.5, True, layers=[1])
    model.save_pretrained(tmp_path)
    assert vm.load(tmp_path, capacity_factor=4.0).config.moe.routing(1) == vm.RoutingSetting(2, 4.0, True)
    given = {1: vm.RoutingSetting(1, 0.7, False)}
    moe = vm.load(tmp_path, capacity_factor=4.0, layer_routing=given).config.moe
    assert (moe.routing().capacity_factor, moe.routing(1)) == (4.0, given[1])
    assert vm.load(tmp_path).config.moe.routing(1) == vm.RoutingSetting(2, 0.5, True)


def test_class_names_and_preprocessing_are_loaded_and_saved_again(model, tmp_path):
    names, preprocessing = tuple("abcde"), Preprocessing.of(SMALL, resize_to=40)
    model.save_pretrained(tmp_path / "a", names, preprocessing)
    loaded = vm.load(tmp_path / "a")
    assert (loaded.class_names, loaded.preprocessing) == (names, preprocessing)
    loaded.save_pretrained(tmp_path / "b")
    assert read_pretrained_config(tmp_path / "b") == read_pretrained_config(tmp_path / "a")
    # A head of other classes, or a fresh one, has no names; another size is not prepared alike.
    assert vm.load(tmp_path / "a", new_head=True).class_names is None
    assert vm.load(tmp_path / "a", num_classes=4).class_names is None
    larger = vm.load(tmp_path / "a", image_size=64)
    assert (larger.class_names, larger.preprocessing) == (names, Preprocessing((64, 64)))


@pytest.mark.parametrize("options, message", [
    ({"resize": "small"}, "resize_to is for resize 'small', got 'small' with None"),
    ({"resize_to": 40}, "resize_to is for resize 'small', got 'exact' with 40"),
    ({"resize": "small", "resize_to": 30}, r"resize_to must be at least image_size \(32, 32\), got 30"),
])  # fmt: skip
def test_preprocessing_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing((32, 32), **options)


@pytest.mark.parametrize("override, message", [
    ({"pooling": "gap"}, r"not of this model: cls_token \(1, 1, 16\)"),
    ({"num_experts": 8}, r"fc1\.bias is \(4, 24\), not \(8, 24\).* and 1 more"),
    ({"layers": ()}, r"missing: blocks\.1\.mlp\.fc1\.weight"),
    ({"in_channels": 1}, r"patch_embed\.proj\.weight is"),
    ({"image_size": 33}, "image_size must be a multiple of patch_size"),
    ({"imagesize": 64}, "unknown option 'imagesize' for model; did you mean 'image_size'"),
])  # fmt: skip
def test_overrides_that_do_not_fit_are_one_error(prefix, override, message):
    with pytest.raises(ValueError, match=message):
        vm.load(prefix, SMALL, **override)


def test_wrong_config_is_one_error_that_names_the_file(prefix, tmp_path):
    with pytest.raises(ValueError, match=r"ckpt\.index does not fit the config; wrong shape: embedding/kernel") as e:
        vm.load(prefix, SMALL.replace(hidden_size=32))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"ckpt needs config=: a ModelConfig or a config\.json"):
        vm.load(prefix)
    with pytest.raises(FileNotFoundError, match=r"none\.json is missing: config must be"):
        vm.load(prefix, tmp_path / "none.json")
    for text, message in (("{", "is not valid JSON"), ("[1]", "must be a table of options"),
                          ('{"model": {"hidden": 3}}', r"bad\.json: unknown option 'hidden'")):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            vm.load(prefix, tmp_path / "bad.json")
    flat = read_vmoe(prefix)
    write_vmoe(prefix, flat | {"cls": flat["cls"].astype(np.int32)})
    with pytest.raises(ValueError, match=r"ckpt\.index: cls has dtype int32, allowed"):
        vm.load(prefix, SMALL)


def test_nothing_there_is_one_error(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a directory, nor a checkpoint .* nor a published name"):
        vm.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a directory with a config of its own"):
        vm.load(directory, SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: no model was saved there"):
        vm.load(tmp_path / "empty")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        vm.load(directory)


def test_broken_directories_are_one_error_that_names_the_file(directory):
    weights, config = directory / "model.safetensors", directory / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for data in (b"", b"garbage, garbage", whole[:100], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        weights.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
            vm.load(directory)
    weights.write_bytes(whole)
    for broken, message in (
        ("{", "not valid JSON"),
        ("[]", "format must be"),
        ("{}", "format must be"),
        (text.replace("hidden_size", "hidden"), "unknown option 'hidden'"),
        (text.replace('"hidden_size": 16', '"hidden_size": 8'), "does not fit the config"),
    ):
        config.write_text(broken)
        with pytest.raises(ValueError, match=message) as caught:
            vm.load(directory)
        assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_cut_while_it_is_read(directory, dtype):
    """Threads read it; what one of them finds is the error of the whole."""
    weights = open_pretrained_weights(directory)
    with open(weights.path, "r+b") as stream:
        stream.truncate(weights.path.stat().st_size - 4)
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in weights.shapes.items()}
    with pytest.raises(ValueError, match=r"model\.safetensors ends too early"):
        weights.read_into(state)


def test_an_interrupted_save_leaves_the_old_model(model, directory, monkeypatch):
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr("visionmoe.model.pretrained.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_published_name_is_downloaded_with_its_config(tmp_path, monkeypatch):
    """The same code as for the real bucket, with a small model under a name of its own. Its config does not know that
    the checkpoint has pre_logits: the checkpoint says so."""
    config = SMALL.replace(representation_size=6)
    model = vm.create_model(config)
    write_vmoe(tmp_path / "bucket" / "tiny", params_to_vmoe(model.state_dict(), config), num_shards=2)
    monkeypatch.setitem(PUBLISHED, "tiny", PublishedCheckpoint("tiny", SMALL, "for this test"))
    monkeypatch.setenv("VISIONMOE_CACHE", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "bucket"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("VISIONMOE_CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        loaded = vm.load("tiny", capacity_factor=3.0)
        server.shutdown()
        thread.join()
    assert loaded.config == config.replace(capacity_factor=3.0)
    assert_same_state(loaded, model.state_dict())
    # A prefix that carries a published name, downloaded by other means, needs no config either.
    assert_same_state(vm.load(tmp_path / "bucket" / "tiny"), model.state_dict())


MEMORY = """
import re, sys
import torch
import visionmoe as vm
torch.set_num_threads(1)
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
vm.load(sys.argv[2])  # everything is imported and warm
before = memory("VmRSS")
model = vm.load(sys.argv[1], *sys.argv[3:])
print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_of_loading_is_little_more_than_the_model(directory, tmp_path):
    """A model of 210 MB, as PREFIX with whole expert arrays in one file, and as a directory: at most 1.1 times."""
    config = vm.ModelConfig(hidden_size=512, num_layers=2, num_heads=8, mlp_dim=2048, num_classes=10).replace(
        num_experts=24, layers=(1,)
    )
    state = {name: torch.ones(shape) for name, shape in our_shapes(config).items()}
    assert 200e6 < sum(tensor.nbytes for tensor in state.values()) < 250e6
    write_pretrained(tmp_path / "big", config, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionmoe.checkpoint.vmoe_write._SLICE_BYTES", 1 << 30)
        write_vmoe(tmp_path / "ckpt", tensors_to_vmoe(state, config))
    for arguments in ((tmp_path / "big", directory), (tmp_path / "ckpt", directory, tmp_path / "big" / "config.json")):
        command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[2] / "src", timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert 0.9 < float(done.stdout) < 1.1
