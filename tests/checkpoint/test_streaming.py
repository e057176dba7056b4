"""Models whose experts stay in the file: the same outputs as from memory, few bytes resident, and the faults."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import visionmoe as vm
from visionmoe.checkpoint import load_streamed, write_random_pretrained
from visionmoe.checkpoint.random_weights import _header
from visionmoe.checkpoint.streaming import expert_streams, traffic
from visionmoe.config import to_dict
from visionmoe.evaluate.classify import evaluate
from visionmoe.model.pretrained import PretrainedConfig
from visionmoe.model.skeleton import skeleton

SMALL = vm.ModelConfig(
    image_size=16, patch_size=4, num_classes=5, hidden_size=16, num_layers=4, mlp_dim=24, num_heads=2
).replace(num_experts=4, layers=(1, 3), split_rngs=True)
EXPERT = 2 * 16 * 24  # values of one expert's weights


def saved(config: vm.ModelConfig, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model whose parameters are all random: nothing is zero or one by chance."""
    torch.manual_seed(0)
    model = vm.create_model(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(directory)
    return directory


def images(count: int, dtype: torch.dtype = torch.float32, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return saved(SMALL, tmp_path / "saved")


def assert_same_outputs(model: vm.VisionTransformer, other: vm.VisionTransformer, given: torch.Tensor):
    with torch.no_grad():
        ours, theirs = model(given), other(given)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in ours.metrics.items():
        assert torch.equal(value, theirs.metrics[name]), name


ROUTERS = (
    {"num_selected_experts": 1},
    {"num_selected_experts": 2, "batch_priority": True},
    {"num_selected_experts": 1, "ensemble_size": 2},
    {"router": "expert_choice"},
    {"router": "expert_choice", "group_size": "image"},
    {"router": "soft"},
    {"num_selected_experts": 2, "normalize_combine_weights": True},
)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ROUTERS),
    st.sampled_from([(1,), (0, 1), (1, 3), (2, 3)]),
    st.sampled_from([2, 4, 8]),
    st.floats(0.2, 2.0),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
    st.sampled_from([0, 5000, 1 << 30]),
    st.integers(1, 5),
)
def test_outputs_are_those_of_the_model_in_memory(router, layers, experts, capacity, stored, dtype, read_ahead, batch):
    """Bit by bit, for every router, dtype and budget of reading ahead, in the first and in a later pass."""
    config = SMALL.replace(num_experts=experts, layers=layers, capacity_factor=capacity, **router)
    used = dtype or stored
    with tempfile.TemporaryDirectory() as folder:
        path = saved(config, Path(folder), stored)
        expected = vm.load(path).to(used)
        streamed = load_streamed(path, dtype=dtype, read_ahead=read_ahead)
        assert next(streamed.parameters()).dtype == used
        for _ in range(2):
            assert_same_outputs(expected, streamed, images(batch, used))


def test_routing_changes_and_evaluation(directory: Path):
    expected, streamed = vm.load(directory), load_streamed(directory)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    batches = [(images(6), labels, torch.arange(6))]
    for changes in ({"capacity_factor": 0.3, "batch_priority": True}, {"num_selected_experts": 1, "layers": [3]}):
        for model in (expected, streamed):
            model.set_routing(**changes)
        assert_same_outputs(expected, streamed, images(6))
        ours, theirs = (evaluate(model, batches) for model in (expected, streamed))
        for name in ("top1", "top5", "loss", "dropped"):
            assert ours[name] == theirs[name], name


def test_overrides(directory: Path):
    overrides = {"image_size": 24, "num_classes": 3, "capacity_factor": 0.7}
    expected = vm.load(directory, **overrides)
    streamed = load_streamed(directory, **overrides)
    assert streamed.config == expected.config
    for model in (expected, streamed):
        torch.nn.init.ones_(model.head.weight)
    assert_same_outputs(expected, streamed, images(2, size=24))


def test_only_experts_with_tokens_are_read(directory: Path):
    """Routers that send all tokens to experts 1 and 2: the first pass reads these of block 1, of block 3 what the
    budget lets it read ahead, which is nothing; so 2 layers * 2 experts a pass."""
    model = load_streamed(directory, read_ahead=0)
    for layer in model.moe_layers:
        model.blocks[layer].norm2.weight.zero_()
        model.blocks[layer].norm2.bias.fill_(1.0)
        model.moe_layer(layer).router.gate.weight.copy_(torch.tensor([0.0, 2.0, 1.0, 0.0])[:, None].expand(4, 16))
    for passes in (1, 2):
        model(images(2))
        done = traffic(model)
        # Reading ahead begins with the first expert of the next layer: 0 is one in vain in the first pass.
        assert done.experts - done.unused == passes * 2 * 2
        assert done.unused <= 1
        assert done.bytes == done.experts * EXPERT * 4


def test_what_is_read_in_one_pass_with_room_for_all(directory: Path):
    model = load_streamed(directory)
    model.set_routing(capacity_factor=4.0, num_selected_experts=4)  # every token meets every expert
    for passes in (1, 2):
        model(images(2))
        assert dataclasses.replace(traffic(model), waited=0.0) == type(traffic(model))(
            8 * passes, 8 * passes * EXPERT * 4
        )


def test_an_interrupted_pass_leaves_nothing_behind(directory: Path):
    expected, model = vm.load(directory), load_streamed(directory)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[2].register_forward_pre_hook(stop)  # block 3's experts are being read by then
    with pytest.raises(KeyboardInterrupt):
        model(images(2))
    hook.remove()
    assert_same_outputs(expected, model, images(3))


def test_no_gradients_and_no_changes(directory: Path):
    model = load_streamed(directory)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(images(1)).logits.requires_grad
    with pytest.raises(ValueError, match=r"streamed experts has no gradients: call it within torch\.no_grad"):
        model(images(1).requires_grad_())
    model.blocks[1].mlp.experts.fc1.weight.zero_()
    with pytest.raises(ValueError, match="experts of block 1 are streamed from a file and cannot be changed"):
        model(images(1))
    assert_same_outputs(vm.load(directory), load_streamed(directory), images(1))  # the file is as it was


def test_copies_and_conversions_are_in_memory(directory: Path):
    model = load_streamed(directory)
    assert len(expert_streams(model)) == 2
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.float64), load_streamed(directory).double()):
        assert expert_streams(other) == []
        with pytest.raises(ValueError, match="not streamed"):
            traffic(other)
        kind = next(other.parameters()).dtype
        assert_same_outputs(vm.load(directory).to(kind), other, images(2, kind))
    assert len(expert_streams(model.to(torch.float32))) == 2  # nothing to convert


def test_saving_a_streamed_model(directory: Path, tmp_path: Path):
    load_streamed(directory).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


MEMORY = """
import re, sys
import torch
from visionmoe.checkpoint import load_streamed
torch.set_num_threads(1)
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
peak = [0, 0]
def look(*_):
    peak[:] = [max(peak[0], memory("RssAnon")), max(peak[1], memory("RssFile"))]
def passes(path, budget):
    model = load_streamed(path, read_ahead=budget)
    for layer in model.moe_layers:
        model.moe_layer(layer).register_forward_hook(look)
    for _ in range(2):
        model(torch.ones(2, 3, 32, 32, dtype=torch.bfloat16))
passes(sys.argv[1], 0)  # everything is imported and warm
before = memory("RssAnon"), memory("RssFile")
passes(sys.argv[2], int(sys.argv[3]))
look()
print(peak[0] - before[0], peak[1] - before[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_is_bounded(directory: Path, tmp_path: Path):
    """Experts of 268 MB in 4 layers, 17 MB each, of which two may be resident: far less than the experts is in use."""
    config = vm.ModelConfig(
        image_size=32, patch_size=4, hidden_size=512, num_layers=8, num_heads=8, mlp_dim=2048, num_classes=10
    ).replace(num_experts=16, layers=(1, 3, 5, 7), num_selected_experts=16, capacity_factor=1.0)
    write_random_pretrained(config, tmp_path / "large", torch.bfloat16)
    small = saved(SMALL.replace(image_size=32, patch_size=8), tmp_path / "small", torch.bfloat16)
    expert = 2 * 512 * 2048 * 2
    experts = 4 * 16 * expert
    assert 250e6 < experts < 300e6
    command = [sys.executable, "-c", MEMORY, str(small), str(tmp_path / "large"), str(2 * expert)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anonymous, of_files = map(int, done.stdout.split())
    # 8 blocks' attention and 4 dense MLPs are 16.8 + 8.4 million values, held twice where oneDNN packs them: 67 MB...
    others = 2 * 2 * (8 * 4 * 512 * 512 + 4 * 2 * 512 * 2048)
    assert anonymous < others + 50e6 < experts / 2
    assert of_files < 6 * expert  # ... the experts ahead, and whole blocks of pages around them


@pytest.mark.skipif(sys.platform != "linux", reason="maps more than the memory, in a file without contents")
def test_a_model_larger_than_the_memory(tmp_path: Path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory > 64 << 30:
        pytest.skip("the biases of so many experts would be large")
    expert = 2 * 64 * 32768 * 2  # 8 MiB in bfloat16
    config = vm.ModelConfig(
        image_size=8, patch_size=8, num_classes=3, hidden_size=64, num_layers=2, mlp_dim=32768, num_heads=2
    ).replace(num_experts=int(1.2 * memory / expert), layers=(1,), num_selected_experts=1)
    state = skeleton(vm.VisionTransformer, config).state_dict()
    _, header = _header(state, torch.bfloat16)
    size = sum(tensor.numel() for tensor in state.values()) * 2
    assert size > 1.2 * memory * 0.99
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + size)  # zeros that take no place on the disk
    (tmp_path / "config.json").write_text(json.dumps(to_dict(PretrainedConfig(config))))
    model = load_streamed(tmp_path)
    assert sum(parameter.nbytes for parameter in model.parameters()) == size
    out = model(images(1, torch.bfloat16, size=8))
    assert torch.equal(out.logits, torch.zeros(1, 3, dtype=torch.bfloat16))
    assert traffic(model).experts - traffic(model).unused <= 2  # two tokens, of one expert each


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without(name: str):
    def change(path: Path) -> None:
        state = load_file(path / "model.safetensors")
        del state[name]
        save_file(state, path / "model.safetensors")

    return change


def misshapen(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["blocks.3.mlp.experts.fc2.weight"] = torch.zeros(4, 16, 23)
    save_file(state, path / "model.safetensors")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (cut, "model.safetensors is not a valid safetensors file"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b""),
            "model.safetensors is not a valid safetensors file",
        ),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (without("blocks.1.mlp.experts.fc1.weight"), r"missing: blocks.1.mlp.experts.fc1.weight \(4, 24, 16\)"),
        (without("blocks.1.attn.proj.weight"), r"missing: blocks.1.attn.proj.weight \(16, 16\)"),
        (misshapen, r"wrong shape: blocks.3.mlp.experts.fc2.weight is \(4, 16, 23\), not \(4, 16, 24\)"),
    ],
)
def test_damaged_files(fault, message: str, directory: Path):
    fault(directory)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_streamed(directory)
    assert "\n" not in str(error.value)


def test_what_cannot_be_streamed(directory: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"read_ahead must be at least 0 bytes, got -1"):
        load_streamed(directory, read_ahead=-1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_streamed(tmp_path / "nowhere")


def test_dense_models_are_loaded_as_they_are(tmp_path: Path):
    path = saved(SMALL.replace(layers=()), tmp_path)
    streamed = load_streamed(path)
    assert expert_streams(streamed) == []
    assert_same_outputs(vm.load(path), streamed, images(2))


def test_random_parameters_are_those_of_a_new_model(tmp_path: Path):
    """Means and deviations of every parameter, for a model with all kinds of layers; and one seed, one model."""
    config = vm.ModelConfig(
        image_size=64, patch_size=8, num_classes=9, hidden_size=128, num_layers=3, mlp_dim=256, num_heads=4,
        pooling="map", representation_size=64, attention_qk_norm=True, head_bias_init=-2.0,
    ).replace(num_experts=4, layers=(1,))  # fmt: skip
    size = write_random_pretrained(config, tmp_path / "a", torch.bfloat16, seed=1)
    made, new = vm.load(tmp_path / "a"), vm.create_model(config)
    assert size == sum(parameter.numel() for parameter in new.parameters()) * 2
    assert load_file(tmp_path / "a" / "model.safetensors")["head.bias"].dtype == torch.bfloat16
    expected = new.state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        assert tensor.shape == expected[name].shape, name
        std = expected[name].std().item() if tensor.numel() > 1 else 0.0
        allowed = (
            6 * std / min(tensor.numel(), 32768) ** 0.5 + 1e-9
        )  # six standard errors of a mean, and of a deviation
        assert abs(tensor.mean() - expected[name].mean()) < allowed + 0.01 * abs(expected[name].mean()), name
        assert tensor.numel() == 1 or abs(tensor.std() - std) < allowed + 0.01 * std, name
    fc1 = made.blocks[1].mlp.experts.fc1.weight
    assert torch.equal(fc1[0], fc1[3])  # the reference's way: all experts start alike
    write_random_pretrained(config, tmp_path / "b", torch.bfloat16, seed=1)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    write_random_pretrained(config.replace(split_rngs=True), tmp_path / "b", torch.float32, seed=2)
    fc1 = vm.load(tmp_path / "b").blocks[1].mlp.experts.fc1.weight
    assert not torch.equal(fc1[0], fc1[3])
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*got torch.int8"):
        write_random_pretrained(config, tmp_path / "c", torch.int8)
    assert not (tmp_path / "c").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, directory: Path):
    expected = load_streamed(directory, dtype=dtype, device="cuda")
    for layer in expected.moe_layers:
        expected.moe_layer(layer).dispatch = "segments"
    expected.to("cuda")
    assert expert_streams(expected) == []
    streamed = load_streamed(directory, dtype=dtype, device="cuda")
    for _ in range(3):
        assert_same_outputs(expected, streamed, images(4, dtype).cuda())
