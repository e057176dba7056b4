"""Names and layouts, the reference's and ours."""

import io
import zipfile

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.checkpoint import params_from_vmoe, params_to_vmoe, read_vmoe
from visionmoe.checkpoint.mapping import our_shapes, reference_shapes
from visionmoe.checkpoint.npz import NpzReader, read_npz

CASES = ("dense-vit", "top2-vanilla", "e32-k2", "last2-gap-prelogits", "map-head", "ensemble-m2", "soft-moe")
SMALL = vm.ModelConfig(
    image_size=(12, 8), patch_size=(6, 4), num_classes=5, hidden_size=8, num_layers=3, mlp_dim=12, num_heads=2
)
CONFIGS = {
    "dense": SMALL,
    "sparse": SMALL.replace(num_experts=4, layers=(1,)),
    "ensemble": SMALL.replace(num_experts=4, layers=(1, 2), ensemble_size=2, num_selected_experts=1),
    "soft": SMALL.replace(num_experts=2, layers=(2,), router="soft", num_slots=3, pooling="gap"),
    "soft with slots from the capacity": SMALL.replace(num_experts=2, layers=(2,), router="soft"),
    "map and q/k norm": SMALL.replace(pooling="map", attention_qk_norm=True),
    "pre_logits": SMALL.replace(representation_size=6, pos_embed="sincos2d"),
    "features": SMALL.replace(num_classes=None, pos_embed="none", in_channels=1),
}


def random_flat(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32).reshape(shape)
        for name, shape in reference_shapes(config).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_against_reference_names_and_shapes(name, conformance_case):
    path, case = conformance_case(name)
    config = vm.ModelConfig.from_reference(case["model"], image_size=case["image_size"])
    flat = read_vmoe(path / "ckpt")
    assert reference_shapes(config) == {n: a.shape for n, a in flat.items()}
    back = params_to_vmoe(params_from_vmoe(flat, config), config)
    assert set(back) == set(flat)
    for key, array in flat.items():
        np.testing.assert_array_equal(back[key], array)


@pytest.mark.parametrize("kind", CONFIGS)
def test_our_names_are_those_of_the_model_and_round_trip(kind):
    config = CONFIGS[kind]
    with torch.device("meta"):
        model = vm.create_model(config)
    assert our_shapes(config) == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    flat = random_flat(config)
    state = params_from_vmoe(flat, config)
    assert list(state) == list(our_shapes(config))
    assert all(t.is_contiguous() for t in state.values())
    back = params_to_vmoe(state, config)
    assert all((back[n] == a).all() and back[n].dtype == a.dtype for n, a in flat.items()) and set(back) == set(flat)


def test_layouts_element_by_element():
    """The rules in words: qkv rows are q, k, v, head by head; expert e's weight is a Linear's (out, in)."""
    config = CONFIGS["ensemble"]
    flat, (H, A, D, E, M) = random_flat(config), (2, 4, 8, 4, 2)
    state = params_from_vmoe(flat, config)
    block = "Encoder/encoderblock_1"
    for part, name in enumerate(("query", "key", "value")):
        kernel = flat[f"{block}/SelfAttention/{name}/kernel"]  # (D, H, A)
        bias = flat[f"{block}/SelfAttention/{name}/bias"]  # (H, A)
        for h in range(H):
            for a in range(A):
                row = part * D + h * A + a
                np.testing.assert_array_equal(state["blocks.1.attn.qkv.weight"][row], kernel[:, h, a])
                assert state["blocks.1.attn.qkv.bias"][row] == bias[h, a]
    out = flat[f"{block}/SelfAttention/out/kernel"]  # (H, A, D)
    np.testing.assert_array_equal(state["blocks.1.attn.proj.weight"], out.reshape(D, D).T)
    for e in range(E):
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            kernel = flat[f"{block}/Moe/Mlp/{theirs}/kernel"]  # (E, in, out)
            np.testing.assert_array_equal(state[f"blocks.1.mlp.experts.{ours}.weight"][e], kernel[e].T)
    router = flat[f"{block}/Moe/Router/dense/kernel"]  # (D, M, E/M)
    for m in range(M):
        for e in range(E // M):
            gate = state["blocks.1.mlp.router.gate.weight"]
            np.testing.assert_array_equal(gate[m * (E // M) + e], router[:, m, e])
    np.testing.assert_array_equal(state["patch_embed.proj.weight"], flat["embedding/kernel"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(state["head.weight"], flat["head/kernel"].T)


def test_map_head_keys_come_before_values():
    config = CONFIGS["map and q/k norm"]
    flat = random_flat(config)
    state = params_from_vmoe(flat, config)
    attention = "MapHead/MultiHeadDotProductAttention"
    np.testing.assert_array_equal(state["attn_pool.kv.weight"][:8], flat[f"{attention}/key/kernel"].reshape(8, 8).T)
    np.testing.assert_array_equal(state["attn_pool.kv.bias"][8:], flat[f"{attention}/value/bias"].reshape(8))
    np.testing.assert_array_equal(state["attn_pool.q_norm.weight"], flat[f"{attention}/query_ln/scale"])
    np.testing.assert_array_equal(state["attn_pool.latent"], flat["MapHead/probe"])


def test_both_directions_are_linear():
    config = CONFIGS["ensemble"]
    x, y = random_flat(config, 0), random_flat(config, 1)
    combined = params_from_vmoe({n: 2 * x[n] + y[n] for n in x}, config)
    separate = params_from_vmoe(x, config), params_from_vmoe(y, config)
    for name, tensor in combined.items():
        assert torch.equal(tensor, 2 * separate[0][name] + separate[1][name])


def test_gradients_can_be_mapped_and_tensors_may_be_bfloat16():
    config = CONFIGS["sparse"]
    model = vm.create_model(config, num_selected_experts=1)
    model(torch.randn(2, 3, 12, 8)).logits.square().sum().backward()
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    flat = params_to_vmoe(gradients, config)
    np.testing.assert_array_equal(flat["head/kernel"], gradients["head.weight"].T)
    halves = {n: g.bfloat16() for n, g in gradients.items()}
    assert params_to_vmoe(halves, config)["head/kernel"].dtype == np.float32


def test_ensemble_router_may_be_stored_without_the_member_axis():
    config = CONFIGS["ensemble"]
    flat = random_flat(config)
    name = "Encoder/encoderblock_1/Moe/Router/dense/kernel"
    expected = params_from_vmoe(flat, config)
    actual = params_from_vmoe(flat | {name: flat[name].reshape(8, 4)}, config)
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


def test_faults_are_one_error_that_lists_names():
    config = CONFIGS["sparse"]
    flat = random_flat(config)
    changed = {n: a for n, a in flat.items() if n not in ("cls", "head/bias")}
    changed |= {"extra/kernel": np.zeros(3), "head/kernel": np.zeros((8, 6), np.float32)}
    with pytest.raises(ValueError) as caught:
        params_from_vmoe(changed, config)
    assert str(caught.value) == (
        "the checkpoint does not fit the config; missing: cls (1, 1, 8), head/bias (5,); "
        "not of this model: extra/kernel (3,); wrong shape: head/kernel is (8, 6), not (8, 5)"
    )
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        params_from_vmoe({}, config)
    state = params_from_vmoe(flat, config)
    with pytest.raises(ValueError, match=r"model's state does not fit the config; missing: cls_token \(1, 1, 8\)"):
        params_to_vmoe({n: t for n, t in state.items() if n != "cls_token"}, config)


def test_a_missing_head_is_allowed_only_when_asked():
    config = CONFIGS["dense"]
    flat = {n: a for n, a in random_flat(config).items() if not n.startswith("head/")}
    with pytest.raises(ValueError, match="missing: head/kernel"):
        params_from_vmoe(flat, config)
    state = params_from_vmoe(flat, config, allow_missing_head=True)
    assert set(our_shapes(config)) - set(state) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="missing: head/bias"):  # half a head is a fault
        params_from_vmoe(flat | {"head/kernel": np.zeros((8, 5))}, config, allow_missing_head=True)


def public_name(name):
    """The name that vision_transformer's .npz files have for one of the reference's."""
    return (
        name.replace("Encoder/", "Transformer/")
        .replace("LayerNorm_1", "LayerNorm_2")
        .replace("/Mlp/", "/MlpBlock_3/")
        .replace("/SelfAttention/", "/MultiHeadDotProductAttention_1/")
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_public_npz_of_a_dense_vit(tmp_path, save):
    config = CONFIGS["dense"].replace(representation_size=6)
    flat = random_flat(config)
    save(tmp_path / "ViT.npz", **{public_name(n): a for n, a in flat.items()})
    assert "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel" in np.load(tmp_path / "ViT.npz")
    actual = read_npz(tmp_path / "ViT.npz")
    assert set(actual) == set(flat) and all((actual[n] == a).all() for n, a in flat.items())
    assert params_from_vmoe(actual, config).keys() == our_shapes(config).keys()
    names = {block.name for block in NpzReader(tmp_path / "ViT.npz").blocks({"cls"})}
    assert names == {"cls"}


def test_npz_files_that_are_not_what_they_say_are_one_error(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, cls=np.zeros((1, 1, 8), np.float32), **{"head/bias": np.ones(5, np.float32)})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_names_file(path)
    damaged = bytearray(whole)
    damaged[160] ^= 1  # in the values: the archive's checksum finds it
    path.write_bytes(damaged)
    assert_names_file(path)
    np.savez(path, cls=np.array([{}], dtype=object), allow_pickle=True)
    assert_names_file(path)
    np.savez(path, cls=np.zeros(3, np.int32))
    assert_names_file(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 60,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", header.getvalue())
    assert_names_file(path)
    with pytest.raises(FileNotFoundError, match=r"y\.npz is missing"):
        read_npz(tmp_path / "y.npz")


def assert_names_file(path):
    with pytest.raises(ValueError, match=r"x\.npz is not a valid \.npz checkpoint") as caught:
        read_npz(path)
    assert "\n" not in str(caught.value)
