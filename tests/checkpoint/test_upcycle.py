"""Sparse upcycling: from every source the sparse model starts as the dense one."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import visionmoe as vm
from visionmoe.checkpoint import params_to_vmoe
from visionmoe.checkpoint.upcycle import upcycle
from visionmoe.cli import main
from visionmoe.config import to_dict
from visionmoe.model.routing import Routing, normalize_combine_weights, top_k_routing

timm = pytest.importorskip("timm")

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SMALL = vm.ModelConfig(
    image_size=32, patch_size=8, num_classes=5, hidden_size=32, num_layers=3, mlp_dim=48, num_heads=2
)


def perturb(model, seed=0):
    """Nothing may be zero or one by chance; activations stay of the order of 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def timm_vit(name="vit_tiny_patch16_224", **options):
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 5,
        **options,
    }
    return perturb(timm.create_model(name, pretrained=False, **options))


def images_for(config, count=3):
    return torch.rand(count, config.in_channels, *config.image_hw, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalized(images, mean, std):
    """What the source's own preprocessing makes of the same pixels: (p - mean) / std with p = (x + 1) / 2."""
    return ((images + 1) / 2 - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def assert_starts_as(model, images, expected, tolerance=1e-5):
    """At capacity E / K, where nothing can be dropped, by both ways to run the experts."""
    assert expected.abs().max() > 0.1
    moe = model.config.moe
    model.set_routing(capacity_factor=moe.num_experts / moe.num_selected_experts)
    for dispatch in ("segments", "buffers"):
        for layer in model.moe_layers:
            model.moe_layer(layer).dispatch = dispatch
        with torch.no_grad():
            output = model(images)
        assert all(output.metrics[f"blocks.{layer}.dropped"] == 0 for layer in model.moe_layers)
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=tolerance * max(1, expected.abs().max()))


TIMM_VARIANTS = {
    "class token": {},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "attention pooling": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "attention pooling, exact GELU": {"class_token": False, "global_pool": "map"},
    "mean of tokens": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "layer-scale, class token without position": {"init_values": 0.1, "no_embed_class": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "rectangular": {"img_size": (32, 16)},
    "no head": {"num_classes": 0},
    "one channel": {"in_chans": 1},
    "no positions": {"pos_embed": "none"},
}


@pytest.mark.parametrize("variant", TIMM_VARIANTS)
@pytest.mark.parametrize("statistics", [{}, IMAGENET], ids=["half", "imagenet"])
def test_against_timm(variant, statistics):
    dense = timm_vit(**TIMM_VARIANTS[variant])
    if variant == "one channel":
        statistics = {name: values[:1] for name, values in statistics.items()}
    dense.pretrained_cfg = {**dense.pretrained_cfg, **statistics}
    model = upcycle(dense, layers=(1, 2), num_experts=4)
    channels = model.config.in_channels
    images = images_for(model.config)
    mean, std = ((dense.pretrained_cfg[key] * 3)[:channels] for key in ("mean", "std"))
    with torch.no_grad():
        expected = dense(normalized(images, mean, std))
    assert_starts_as(model, images, expected)


def test_against_timm_qk_norm():
    dense = timm_vit(qk_norm=True)
    with pytest.raises(ValueError, match=r"q_norm\.bias is not zero, and this package's model has no such bias"):
        upcycle(dense)
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.q_norm.bias.zero_()  # k_norm's stays: it cannot change the softmax
    model = upcycle(dense, layers=(0,))
    images = images_for(model.config)
    with torch.no_grad():
        assert_starts_as(model, images, dense(images))


def test_against_timm_state_dict(tmp_path):
    """A file of timm's names: by the model's name, alone where the width says the heads, or as a folder of the hub."""
    dense = perturb(timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, num_classes=4, img_size=64))
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    description = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "global_pool": "token",
                   "model_args": {"depth": 2, "img_size": 64}, "pretrained_cfg": IMAGENET}  # fmt: skip
    model = upcycle(tmp_path / "model.safetensors", num_experts=3)
    assert (model.config.num_heads, model.config.image_size, model.config.activation) == (3, 64, "gelu")
    assert model.moe_layers == (1,)
    images = images_for(model.config)
    with torch.no_grad():
        expected, whole = dense(images), dense(normalized(images, **IMAGENET))
    assert_starts_as(model, images, expected)
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert_starts_as(upcycle(tmp_path, num_experts=3), images, whole)
    with pytest.raises(ValueError, match=r"wrong shape: pos_embed is \(1, 17, 192\), not \(1, 197, 192\)"):
        upcycle(tmp_path / "model.safetensors", timm_model="vit_tiny_patch16_224")


def test_timm_file_by_model_name(tmp_path):
    dense = perturb(timm.create_model("test_vit", pretrained=False, num_classes=4))
    dense.pretrained_cfg = {**dense.pretrained_cfg}
    save_file(dense.state_dict(), tmp_path / "x.safetensors")
    model = upcycle(tmp_path / "x.safetensors", timm_model="test_vit", layers=(1,))
    images = images_for(model.config)
    with torch.no_grad():
        expected = dense(normalized(images, dense.pretrained_cfg["mean"], dense.pretrained_cfg["std"]))
    assert_starts_as(model, images, expected)
    with pytest.raises(ValueError, match=r"of width 64 does not say its number of heads: give the timm model's name"):
        upcycle(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name, shape, words", [
    ("patch_embed.proj.weight", (64, 192), r"patch_embed.proj.weight must be \(D, C, height, width\), got .*192\)"),
    ("pos_embed", (17,), r"pos_embed must be \(1, T, D\), got shape \(17,\)"),
    ("head.weight", (), r"head.weight must be \(classes, D\), got shape \(\)"),
    ("norm.weight", (3,), r"norm.weight is \(3,\), not \(192,\)"),
    ("blocks.0.attn.qkv.bias", (), r"parameters of shapes that do not fit: blocks.0.attn.qkv.bias \(\)"),
    ("blocks.0.ls1.gamma", (3,), r"blocks.0.ls1.gamma must be \(192,\), got \(3,\)"),
])  # fmt: skip
def test_tensors_of_other_shapes_are_one_line(name, shape, words, tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, num_classes=4, img_size=32)
    save_file({**dense.state_dict(), name: torch.zeros(shape)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        upcycle(tmp_path / "x.safetensors", layers=(0,))
    assert "\n" not in str(caught.value)


def test_queries_and_keys_that_cannot_be_joined_are_one_line(tmp_path):
    state = huggingface_state()
    name = "vit.encoder.layer.0.attention.attention.key.weight"
    folder = huggingface_folder(tmp_path, {**state, name: state[name][:, 1:].contiguous()})
    with pytest.raises(ValueError, match=r"parameters of shapes that do not fit: .*key\.weight") as caught:
        upcycle(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, words", [
    ({"reg_tokens": 2}, "register tokens"),
    ({"pre_norm": True}, "a norm before the blocks"),
    ({"class_token": False, "global_pool": "avg"}, r"a norm after pooling \(fc_norm\)"),
    ({"global_pool": "avg"}, "global_pool 'avg' beside a class token"),
    ({"global_pool": "map"}, "attention pooling beside a class token"),
    ({"act_layer": "relu"}, "the activation ReLU"),
    ({"scale_attn_norm": True}, "a norm or gate on the attention's output"),
    ({"norm_layer": "rmsnorm"}, "norms of RmsNorm"),
    ({"final_norm": False}, "no final LayerNorm"),
])  # fmt: skip
def test_what_the_model_has_not_is_named(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        upcycle(timm_vit(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, words", [
    ("deit_tiny_distilled_patch16_224", "must be a timm VisionTransformer, got VisionTransformerDistilled"),
    ("vit_relpos_small_patch16_224", "must be a timm VisionTransformer, got VisionTransformerRelPos"),
])  # fmt: skip
def test_other_models_of_timm_are_refused(name, words):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    with pytest.raises(ValueError, match=words):
        upcycle(model)


def huggingface_state(new_names=False, prefix="vit."):
    """A ViT of transformers: D 16, 2 blocks, 2 heads, MLP 24, patch 8, 32 px, 5 classes; names as published."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        f"{prefix}embeddings.cls_token": tensor(1, 1, 16),
        f"{prefix}embeddings.position_embeddings": tensor(1, 17, 16),
    }
    layers = {f"{prefix}embeddings.patch_embeddings.projection": (16, 3, 8, 8), f"{prefix}layernorm": (16,)}
    for i in range(2):
        block = f"{prefix}layers.{i}" if new_names else f"{prefix}encoder.layer.{i}"
        query, out, first, second = (
            (("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj", "mlp.fc1", "mlp.fc2")
            if new_names
            else (
                ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
                "attention.output.dense", "intermediate.dense", "output.dense",
            )
        )  # fmt: skip
        layers |= {f"{block}.{n}": (16, 16) for n in (*query, out)}
        layers |= {f"{block}.{first}": (24, 16), f"{block}.{second}": (16, 24)}
        layers |= {f"{block}.layernorm_before": (16,), f"{block}.layernorm_after": (16,)}
    layers |= {"classifier": (5, 16)} if prefix else {"pooler.dense": (16, 16)}
    for name, shape in layers.items():
        state |= {f"{name}.weight": tensor(*shape) + (len(shape) == 1), f"{name}.bias": tensor(shape[0])}
    return state


def huggingface_forward(state, pixels):
    """What transformers' ViT computes, in plain torch, from the names as published: pre-norm blocks, exact GELU,
    LayerNorm epsilon 1e-12; a classifier on the normalised class token, else the pooler: tanh of a dense layer."""
    prefix = "vit." if "classifier.weight" in state else ""

    def layer(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (16,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    stem = f"{prefix}embeddings.patch_embeddings.projection"
    x = F.conv2d(pixels, state[f"{stem}.weight"], state[f"{stem}.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{prefix}embeddings.cls_token"].expand(len(x), 1, 16), x], 1)
    x = x + state[f"{prefix}embeddings.position_embeddings"]
    for i in range(2):
        block = f"{prefix}encoder.layer.{i}"
        y = norm(f"{block}.layernorm_before", x)
        q, k, v = (layer(f"{block}.attention.attention.{n}", y).view(len(x), 17, 2, 8).transpose(1, 2)
                   for n in ("query", "key", "value"))  # fmt: skip
        weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=-1)
        x = x + layer(f"{block}.attention.output.dense", (weights @ v).transpose(1, 2).reshape(len(x), 17, 16))
        y = F.gelu(layer(f"{block}.intermediate.dense", norm(f"{block}.layernorm_after", x)))
        x = x + layer(f"{block}.output.dense", y)
    first = norm(f"{prefix}layernorm", x)[:, 0]
    return layer("classifier", first) if prefix else torch.tanh(layer("pooler.dense", first))


HF_CONFIG = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "image_size": 32, "patch_size": 8, "hidden_act": "gelu",
             "layer_norm_eps": 1e-12}  # fmt: skip


def huggingface_folder(folder, state, **config):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**HF_CONFIG, **config}))
    return folder


@pytest.mark.parametrize("prefix", ["vit.", ""], ids=["ViTForImageClassification", "ViTModel"])
def test_against_the_definition_of_transformers_vit(prefix, tmp_path):
    state = huggingface_state(prefix=prefix)
    folder = huggingface_folder(tmp_path, state)
    model = upcycle(folder, layers=(0, 1), num_experts=4)
    images = images_for(model.config)
    assert_starts_as(model, images, huggingface_forward(state, images))  # without a preprocessor: 0.5 and 0.5
    preprocessor = {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    expected = huggingface_forward(state, normalized(images, **IMAGENET))
    assert_starts_as(upcycle(folder, num_experts=4), images, expected)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert_starts_as(upcycle(folder, num_experts=4), images, huggingface_forward(state, (images + 1) / 2))


def test_names_of_transformers_5_are_the_same_model(tmp_path):
    old, new = huggingface_state(), huggingface_state(new_names=True)  # the same numbers, in the same order
    first, second = (
        upcycle(huggingface_folder(tmp_path / name, state), num_experts=2).state_dict()
        for name, state in (("old", old), ("new", new))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_qkv_of_transformers_are_joined_in_order(tmp_path):
    state = huggingface_state()
    model = upcycle(huggingface_folder(tmp_path, state), num_experts=2)
    for i, name in enumerate(("query", "key", "value")):
        part = model.state_dict()["blocks.1.attn.qkv.weight"][16 * i : 16 * (i + 1)]
        assert torch.equal(part, state[f"vit.encoder.layer.1.attention.attention.{name}.weight"])


@pytest.mark.parametrize("change, words", [
    ({"model_type": "deit"}, r"must be a ViT of transformers \(model_type vit\), got 'deit'"),
    ({"hidden_act": "quick_gelu"}, "hidden_act must be one of gelu, .*, got 'quick_gelu'"),
    ({"num_hidden_layers": 1}, r"is no plain ViT: this package's model has no vit\.encoder\.layer\.1\."),
    ({"num_hidden_layers": 3}, r"missing: blocks\.2\.norm1\.weight"),
    ({"intermediate_size": 32}, r"wrong shape: blocks\.0\.mlp\.fc1\.weight is \(24, 16\), not \(32, 16\)"),
])  # fmt: skip
def test_folders_of_transformers_that_do_not_fit(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        upcycle(huggingface_folder(tmp_path, huggingface_state(), **change))


def test_weights_that_are_a_pickle_or_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing; only safetensors files are read"):
        upcycle(tmp_path)


@pytest.mark.parametrize("options", [{}, {"pooling": "map"}, {"pooling": "gap"}, {"representation_size": 7}])
def test_npz_without_a_config(options, tmp_path):
    dense = perturb(vm.create_model(SMALL.replace(**options)))
    flat = params_to_vmoe(dense.state_dict(), dense.config)
    np.savez(tmp_path / "x.npz", **{n.replace("Encoder/", "Transformer/"): a for n, a in flat.items()})
    model = upcycle(tmp_path / "x.npz", placement="last2", num_experts=4)
    assert model.config == dense.config.replace(
        layers=(1,), num_experts=4, capacity_factor=2.0, normalize_combine_weights=True
    )
    with torch.no_grad():
        assert_starts_as(model, images_for(model.config), dense(images_for(model.config)).logits)


def test_our_own_models(tmp_path):
    dense = perturb(vm.create_model(SMALL.replace(activation="gelu", layer_norm_eps=1e-5)))
    dense.save_pretrained(tmp_path)
    for source in (dense, tmp_path):
        model = upcycle(source, layers=[2, 0], num_experts=4, num_selected_experts=3)
        assert model.moe_layers == (0, 2) and not model.training
        with torch.no_grad():
            assert_starts_as(model, images_for(SMALL), dense(images_for(SMALL)).logits)
    with pytest.raises(ValueError, match=r"has sparse layers already, \[0, 2\]: give a dense ViT"):
        upcycle(model)


def test_names_of_classes_are_kept(tmp_path):
    names = tuple("abcde")
    vm.create_model(SMALL).save_pretrained(tmp_path, names)
    assert upcycle(tmp_path).class_names == upcycle(vm.load(tmp_path)).class_names == names


def test_a_config_that_is_not_needed_is_refused(tmp_path):
    dense = timm_vit()
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    for source in (dense, tmp_path / "model.safetensors", tmp_path, "timm:vit_tiny_patch16_224", "hf-hub:user/name"):
        with pytest.raises(ValueError, match="says its config itself; config is for checkpoint prefixes"):
            upcycle(source, config=SMALL)


def test_every_expert_is_the_mlp_and_routers_follow_the_seed():
    dense = perturb(vm.create_model(SMALL))
    first, same, other = (upcycle(dense, num_experts=4, seed=seed).state_dict() for seed in (0, 0, 1))
    for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        for expert in first[f"blocks.1.mlp.experts.{part}"]:
            assert torch.equal(expert, dense.state_dict()[f"blocks.1.mlp.{part}"])
    gate = "blocks.1.mlp.router.gate.weight"
    assert torch.equal(first[gate], same[gate]) and not torch.equal(first[gate], other[gate])
    assert 0.8 < first[gate].std() * 32**0.5 < 1.2  # LeCun: variance 1 / D
    assert 0.4 < upcycle(dense, router_std=0.5).state_dict()[gate].std() < 0.6
    assert upcycle(dense, router_std=0.0).state_dict()[gate].abs().max() == 0


def test_noise_is_relative_and_differs_between_experts():
    dense = perturb(vm.create_model(SMALL))
    noisy = upcycle(dense, num_experts=4, noise=0.1).state_dict()
    for part in ("fc1.weight", "fc2.weight"):
        weight = dense.state_dict()[f"blocks.1.mlp.{part}"]
        added = noisy[f"blocks.1.mlp.experts.{part}"] - weight
        for noise in added:  # 1536 numbers: the standard deviation of their deviation is 2 % of it
            assert noise.std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.1)
        assert not torch.equal(added[0], added[1])
    assert torch.equal(noisy["blocks.0.mlp.fc1.weight"], dense.state_dict()["blocks.0.mlp.fc1.weight"])


def test_the_random_state_of_the_caller_is_left_alone():
    dense = vm.create_model(SMALL)
    torch.manual_seed(3)
    upcycle(dense, noise=0.1)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_without_normalised_weights_it_starts_as_another_model():
    """The weights of K=2 of 4 experts sum to less than 1, so the branch is smaller."""
    dense = perturb(vm.create_model(SMALL))
    model = upcycle(dense, num_experts=4, capacity_factor=2.0, normalize_weights=False)
    assert not model.config.moe.normalize_combine_weights
    with torch.no_grad():
        images = images_for(SMALL)
        assert (model(images).logits - dense(images).logits).abs().max() > 1e-2


def test_normalised_weights_by_hand():
    # Two tokens, K = 2: the first keeps both of its requests (0.5 and 0.25 -> 2/3 and 1/3); the second lost one: the
    # other is 1. A third lost both: zeros, not NaN.
    routing = Routing(
        token_index=torch.tensor([[0, 0, 1, 1, 2, 2]]), expert_index=torch.tensor([[0, 1, 0, 1, 0, 1]]),
        buffer_index=torch.tensor([[0, 0, 1, 9, 9, 9]]),
        combine_weights=torch.tensor([[0.5, 0.25, 0.3, 0.2, 0.4, 0.1]]), num_tokens=3, num_experts=2, capacity=2,
    )  # fmt: skip
    weights = normalize_combine_weights(routing).combine_weights
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3, 1.0, 0.0, 0.0, 0.0]]))


def test_normalised_weights_have_finite_gradients_where_all_is_dropped():
    logits = torch.randn(1, 6, 3, requires_grad=True)
    routing = normalize_combine_weights(top_k_routing(torch.softmax(logits, -1), 2, 1, False))
    assert (routing.kept.view(6, 2).sum(1) == 0).any()
    (routing.combine_weights * torch.linspace(-1, 1, 12)).sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0


@pytest.mark.parametrize("options, words", [
    ({"placement": "every3"}, "placement must be one of every2, last2, last5, got 'every3'"),
    ({"layers": (3,)}, r"MoE layers must be between 0 and 2, got \[3\]"),
    ({"layers": ()}, "layers must name at least one block"),
    ({"num_selected_experts": 9}, "num_selected_experts must be between 1 and 8, got 9"),
    ({"noise": -1.0}, "noise must be >= 0 and finite, got -1.0"),
    ({"num_expert": 4}, "unknown option 'num_expert' for upcycle; did you mean 'num_experts'"),
])  # fmt: skip
def test_mistakes_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        upcycle(vm.create_model(SMALL), **options)


def test_options_that_the_released_format_has_not_are_refused():
    for options, words in (
        ({"activation": "gelu"}, "has only models with activation gelu_tanh, got gelu"),
        ({"layer_norm_eps": 1e-12}, "has only models with layer_norm_eps 1e-06, got 1e-12"),
        ({"layers": (1,), "normalize_combine_weights": True}, "has only models with normalize_combine_weights False"),
    ):
        model = vm.create_model(SMALL.replace(**options))
        with pytest.raises(ValueError, match=words):
            params_to_vmoe(model.state_dict(), model.config)


def test_config_refuses_what_cannot_be():
    for options, words in (
        ({"activation": "relu"}, "activation must be one of gelu_tanh, gelu, got 'relu'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be > 0 and < 1, got 0.0"),
        ({"router": "soft", "normalize_combine_weights": True}, "normalize_combine_weights needs router 'top_k'"),
    ):
        with pytest.raises(ValueError, match=words):
            SMALL.replace(**options)


def test_command_leaves_a_model_that_is_read_and_trained(tmp_path, capsys):
    config = vm.ModelConfig(image_size=28, patch_size=7, in_channels=1, num_classes=10, hidden_size=16, num_layers=2,
                            mlp_dim=24, num_heads=2, pooling="gap")  # fmt: skip
    dense = perturb(vm.create_model(config))
    dense.save_pretrained(tmp_path / "dense", tuple("abcdefghij"))
    arguments = ["--layers", "1", "--num-experts", "4", "--data", "fashion-mnist", "--images", "6"]
    arguments += ["--split", "test[10:20]"]
    assert main(["upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "sparse"), *arguments]) == 0
    results = json.loads((tmp_path / "sparse" / "results.json").read_text())
    nothing_dropped, own = results["differences"]
    assert nothing_dropped["capacity_factor"] == own["capacity_factor"] == 2.0  # E / K = 4 / 2
    assert 0 <= nothing_dropped["max_abs_difference"] < 1e-5 * max(1, results["max_abs_output"])
    assert nothing_dropped["dropped"] == 0
    assert (results["num_images"], results["images"], results["layers"]) == (6, "fashion-mnist", [1])
    # The MLP (16*24 + 24 + 24*16 + 16 = 808) three more times, and a router of 4 x 16.
    assert results["parameters"] - results["parameters_dense"] == 3 * 808 + 64
    assert "0.0% of the requests dropped" in capsys.readouterr().out
    model = vm.load(tmp_path / "sparse")
    assert model.class_names == tuple("abcdefghij")
    assert to_dict(model.config) == results["model"]
    with torch.no_grad():
        assert_starts_as(model, images_for(config), dense(images_for(config)).logits)
    run = tmp_path / "run"
    train = ["finetune", str(tmp_path / "sparse"), "--data", "fashion-mnist", "--steps", "2", "--out", str(run)]
    assert main([*train, "--set", "data.eval_split=test[:64]", "--set", "data.batch_size=16"]) == 0
    trained = vm.load(run / "model")
    assert trained.config.moe.normalize_combine_weights
    assert not torch.equal(trained.state_dict()["head.weight"], model.state_dict()["head.weight"])


def test_command_says_how_much_is_dropped(tmp_path):
    vm.create_model(SMALL).save_pretrained(tmp_path / "dense")
    arguments = ["upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--capacity-factor", "0.5"]
    assert main([*arguments, "--router-std", "3.0"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [d["capacity_factor"] for d in results["differences"]] == [4.0, 0.5]
    assert results["differences"][1]["dropped"] >= 0.4  # there are places for half of the requests


def test_command_refuses_in_one_line(tmp_path, capsys):
    for path, words in (
        (str(tmp_path / "nothing"), "neither a directory, nor a checkpoint"),
        ("timm:vit_nothing", "timm 1"),
        ("hf-hub:a/b/c", "a model on the hub is hf-hub:USER/NAME"),
    ):
        assert main(["upcycle", path, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert main(["upcycle", str(tmp_path), "--split", "train", "--out", str(tmp_path / "out")]) == 2
    assert "--split train is a part of --data: give both" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
