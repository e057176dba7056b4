"""The model as a whole: names, sizes, options, dtypes, groups, routing that changes on trained weights."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import visionmoe as vm
from visionmoe.model.position import sincos2d

TINY = vm.ModelConfig(
    image_size=16, patch_size=8, hidden_size=16, num_layers=4, mlp_dim=24, num_heads=2, num_classes=5,
    moe=vm.MoEConfig(num_experts=4, layers=(1, 3)),
)  # fmt: skip


def random_model(config=TINY, **overrides):
    """A model whose every parameter is random: the zero head and equal experts would hide mistakes."""
    torch.manual_seed(0)
    model = vm.create_model(config, **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_images(batch, config=TINY):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, config.in_channels, *config.image_hw, generator=generator) * 2 - 1


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("vmoe_s32_e8_last2", {}, 56_736_744),
        ("vmoe_s32_e32_every2", {}, 287_762_408),
        ("vmoe_b16_e8_every2", {}, 284_946_664),
        ("vmoe_b32_e32_every2", {}, 966_744_040),
        ("vmoe_l16_e32_every2", {}, 3_427_186_664),
        ("vmoe_h14_e32_last5", {}, 2_664_858_600),
        ("vmoe_h14_e32_every2", {}, 7_137_046_760),
        ("vmoe_15b", {}, 14_705_071_769),
        ("vit_h14", {"num_classes": 18_291, "representation_size": 1280}, 655_835_251),
    ],
)
def test_parameter_counts_of_the_paper(name, overrides, count):
    with torch.device("meta"):
        model = vm.create_model(name, **overrides)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_named_model_is_valid_and_unknown_names_say_what_is_near():
    names = vm.list_models()
    assert len(names) == len(set(names)) > 100
    assert vm.get_config("vmoe_h14_e32_last5").moe.layers == (23, 25, 27, 29, 31)
    with pytest.raises(ValueError, match="unknown model 'vmoe_b16_e8_evry2'; near ones: vmoe_b16_e8_every2"):
        vm.create_model("vmoe_b16_e8_evry2")


NAMES = """
cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias head.weight head.bias
"""
BLOCK = "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight norm2.bias"
DENSE = "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
SPARSE = (
    "mlp.router.gate.weight mlp.experts.fc1.weight mlp.experts.fc1.bias mlp.experts.fc2.weight mlp.experts.fc2.bias"
)


def test_parameter_names_are_a_contract():
    expected = set(NAMES.split())
    for i in range(4):
        expected |= {f"blocks.{i}.{n}" for n in f"{BLOCK} {SPARSE if i in (1, 3) else DENSE}".split()}
    state = vm.create_model(TINY).state_dict()
    assert set(state) == expected
    assert state["blocks.1.mlp.router.gate.weight"].shape == (4, 16)
    assert state["blocks.1.mlp.experts.fc1.weight"].shape == (4, 24, 16)
    assert state["blocks.1.mlp.experts.fc1.bias"].shape == (4, 24)
    assert state["blocks.1.mlp.experts.fc2.weight"].shape == (4, 16, 24)
    assert state["blocks.1.mlp.experts.fc2.bias"].shape == (4, 16)


@pytest.mark.parametrize(
    ("overrides", "added", "removed"),
    [
        ({"pooling": "gap", "representation_size": 7}, {"pre_logits.weight", "pre_logits.bias"}, {"cls_token"}),
        ({"pos_embed": "sincos2d"}, set(), {"pos_embed"}),
        ({"pos_embed": "none", "num_classes": None}, set(), {"pos_embed", "head.weight", "head.bias"}),
        ({"attention_qk_norm": True}, {f"blocks.{i}.attn.{n}_norm.weight" for i in range(4) for n in "qk"}, set()),
        (
            {"router": "soft", "num_slots": 3},
            {f"blocks.{i}.mlp.router.{n}" for i in (1, 3) for n in ("mu", "scale")},
            {f"blocks.{i}.mlp.router.gate.weight" for i in (1, 3)},
        ),
    ],
)
def test_parameter_names_of_options(overrides, added, removed):
    base = set(vm.create_model(TINY).state_dict())
    assert set(vm.create_model(TINY, **overrides).state_dict()) == (base | added) - removed


def test_map_head_has_timm_names():
    names = {n for n in vm.create_model(TINY, pooling="map").state_dict() if n.startswith("attn_pool.")}
    layers = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    assert names == {"attn_pool.latent", *(f"attn_pool.{n}.{p}" for n in layers for p in ("weight", "bias"))}


def test_dense_model_equals_timm():
    """The same weights in timm's ViT (tanh GELU, epsilon 1e-6) give the same logits."""
    timm = pytest.importorskip("timm")
    model = random_model(layers=(), num_layers=2)
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=5,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
    ).eval()  # fmt: skip
    other.load_state_dict(model.state_dict())
    images = random_images(3)
    torch.testing.assert_close(model(images).logits, other(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.forward_features(images), other.forward_features(images), atol=1e-4, rtol=1e-4)


def test_expert_is_an_mlp():
    """With K = E = 1 and room for all, the layer is prob * MLP, and prob is 1."""
    sparse = random_model(num_experts=1, num_selected_experts=1, capacity_factor=1.0)
    dense = vm.create_model(sparse.config, layers=()).eval()
    state = {k.replace("mlp.experts.", "mlp."): v for k, v in sparse.state_dict().items() if "router" not in k}
    shapes = {k: v.shape for k, v in dense.state_dict().items()}
    dense.load_state_dict({k: v.reshape(shapes[k]) for k, v in state.items()})
    torch.testing.assert_close(sparse(random_images(3)).logits, dense(random_images(3)).logits, atol=1e-4, rtol=1e-4)


def test_initialisation_is_the_references():
    torch.manual_seed(0)
    model = vm.create_model(TINY, hidden_size=64, head_bias_init=-3.0)
    assert model.head.weight.abs().sum() == 0
    assert (model.head.bias == -3).all()
    experts = model.blocks[1].mlp.experts
    assert (experts.fc1.weight == experts.fc1.weight[:1]).all()  # all experts start equal
    split = vm.create_model(TINY, split_rngs=True).blocks[1].mlp.experts.fc1.weight
    assert (split[0] != split[1]).all()
    limit = (6 / (64 + 64)) ** 0.5  # Xavier-uniform of each of q, k, v by itself
    assert limit * 0.95 < model.blocks[0].attn.qkv.weight.abs().max() <= limit
    assert model.blocks[1].mlp.router.gate.weight.std().item() == pytest.approx(64**-0.5, rel=0.3)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert 0 < model.blocks[0].mlp.fc1.bias.std() < 1e-5


def test_sincos_positions():
    # D = 8: omega = 1, 1e-4. Patch (row 1, column 2) of a 2 x 3 grid is number 5.
    angles = torch.tensor([2.0, 2e-4, 1.0, 1e-4])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(sincos2d((2, 3), 8)[0, 5], expected)
    model = random_model(pos_embed="sincos2d")
    assert model(random_images(2)).logits.shape == (2, 5)
    assert model(torch.zeros(2, 3, 24, 40)).logits.shape == (2, 5)  # any size that the patches divide


@pytest.mark.parametrize(
    "overrides",
    [
        {"image_size": (16, 24), "patch_size": (8, 4)},
        {"in_channels": 1, "pooling": "map"},
        {"pooling": "gap", "representation_size": 6, "attention_qk_norm": True},
        {"pooling": "map", "attention_qk_norm": True, "pos_embed": "sincos2d"},
        {"router": "expert_choice", "capacity_factor": 2.0},
        {"router": "soft", "group_size": "image", "capacity_multiple_of": None, "capacity_factor": 1.0},
        {"ensemble_size": 2, "num_selected_experts": 1, "gshard_loss_weight": 0.1},
        {"group_size": 4, "pooling": "gap"},
        {"group_size": "image", "batch_priority": True, "capacity_factor": 0.3},
    ],
)
def test_options_train(overrides):
    """Forward and backward in training mode with every kind of dropout: finite, and every parameter has a gradient."""
    overrides = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1, "expert_dropout_rate": 0.1} | overrides
    model = random_model(**overrides).train()
    images = random_images(4, model.config)
    out = model(images)
    (out.logits.square().mean() + out.auxiliary_loss).backward()
    assert torch.isfinite(out.logits).all()
    assert out.logits.shape == (4 * model.config.ensemble_size, 5)
    torch.testing.assert_close(out.predictions().sum(-1), torch.ones(4))
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without


def test_ensemble_members_see_only_their_experts():
    """Changing member 1's experts and router leaves member 0's logits alone (copies of an image adjacent)."""
    model = random_model(ensemble_size=2, num_selected_experts=1)
    before = model(random_images(3)).logits
    with torch.no_grad():
        for layer in model.moe_layers:
            model.blocks[layer].mlp.experts.fc2.weight[2:] += 1
            model.blocks[layer].mlp.router.gate.weight[2:] += torch.randn(2, 16)
    after = model(random_images(3)).logits
    torch.testing.assert_close(after[0::2], before[0::2])
    assert (after[1::2] - before[1::2]).abs().max() > 1e-3


def test_training_adds_noise_and_the_load_loss_evaluation_does_not():
    model = random_model()
    images = random_images(4)
    first, second = model(images), model(images)
    torch.testing.assert_close(first.logits, second.logits)
    assert "blocks.1.load_loss" not in first.metrics
    model.train()
    noisy = model(images)
    assert "blocks.1.load_loss" in noisy.metrics
    assert not torch.equal(noisy.logits, first.logits)
    weighted = sum(
        0.005 * noisy.metrics[f"blocks.{i}.{n}"].mean() for i in (1, 3) for n in ("importance_loss", "load_loss")
    )
    torch.testing.assert_close(noisy.auxiliary_loss.detach(), weighted)


def test_a_weight_of_zero_keeps_a_broken_loss_out():
    """A loss with a NaN gradient must not reach the sum through 0 * NaN."""
    model = random_model(importance_loss_weight=0.0, load_loss_weight=0.0)
    out = model(random_images(2))
    assert out.auxiliary_loss.item() == 0
    assert out.auxiliary_loss.grad_fn is None


@pytest.mark.parametrize("dispatch", ["segments", "buffers"])
def test_router_is_float32_whatever_the_model(dispatch):
    images = random_images(4)
    model = random_model()
    for layer in model.moe_layers:
        model.blocks[layer].mlp.dispatch = dispatch
    expected = model(images).logits
    seen = []
    router = model.blocks[1].mlp.router
    router.register_forward_hook(lambda module, args, out: seen.append(out[0].combine_weights.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(images)
    half = model.to(torch.bfloat16)(images.bfloat16())
    assert seen == [torch.float32, torch.float32]
    assert autocast.logits.dtype == half.logits.dtype == torch.bfloat16
    assert autocast.auxiliary_loss.dtype == half.auxiliary_loss.dtype == torch.float32
    for logits in (autocast.logits, half.logits):
        cosine = F.cosine_similarity(logits.float(), expected, dim=-1)
        assert cosine.min() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_training_has_finite_gradients(dtype):
    model = random_model().to(dtype).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        out = model(random_images(4).to(dtype))
        loss = out.logits.float().square().mean() + out.auxiliary_loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_groups():
    images = random_images(4)  # 4 images x 5 tokens
    for size in (1, 10, 20, "batch", "image"):  # 10 and 20: groups of several images
        assert random_model(group_size=size, capacity_factor=9.0)(images).logits.shape == (4, 5)
    with pytest.raises(ValueError, match="must divide the number of tokens of a batch, got group_size=6 and 4 x 5"):
        random_model(group_size=6)(images)
    # Where nothing is dropped the groups change no token, only the losses.
    results = [random_model(group_size=s, capacity_factor=9.0)(images).logits for s in (4, "image", "batch")]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_image_groups_make_images_independent():
    model = random_model(group_size="image", capacity_factor=0.4)
    images = random_images(4)
    torch.testing.assert_close(model(images).logits[1:2], model(images[1:2]).logits)


def test_set_routing():
    model, images = random_model(), random_images(4)
    before = model(images).logits
    model.set_routing(num_selected_experts=1, capacity_factor=0.3, batch_priority=True)
    lower = model(images).logits
    fresh = vm.create_model(TINY, num_selected_experts=1, capacity_factor=0.3, batch_priority=True).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(lower, fresh(images).logits)
    assert not torch.allclose(lower, before)
    model.set_routing(capacity_factor=0.6, layers=[3])
    settings = [model.config.moe.routing(i) for i in (1, 3)]
    assert [(s.num_selected_experts, s.capacity_factor, s.batch_priority) for s in settings] == [
        (1, 0.3, True),
        (1, 0.6, True),
    ]
    model.set_routing(num_selected_experts=2, capacity_factor=1.05, batch_priority=False)
    torch.testing.assert_close(model(images).logits, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_selected_experts": 5}, "num_selected_experts must be between 1 and 4, got 5"),
        ({"capacity_factor": 0.0}, "capacity_factor must be > 0 and finite, got 0.0"),
        ({"capacity_factor": "a"}, "capacity_factor must be float, got 'a'"),
        ({"num_selected_experts": 1.5}, "num_selected_experts must be int, got 1.5"),
        ({"num_selected_experts": True}, "num_selected_experts must be int, got True"),
        ({"batch_priority": "yes"}, "batch_priority must be bool, got 'yes'"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be > 0 and finite, got nan"),
        ({"layers": [0], "capacity_factor": 1.0}, r"layers must be among \(1, 3\), got \[0\]"),
    ],
)
def test_set_routing_refuses(arguments, message):
    model = random_model()
    config = model.config
    with pytest.raises(ValueError, match=message):
        model.set_routing(**arguments)
    assert model.config == config
    with pytest.raises(ValueError, match="needs a model with sparse layers"):
        vm.create_model(TINY, layers=()).set_routing(capacity_factor=1.0)


def test_flops_agree_with_torchs_counter():
    """Attention runs as plain matrix products here: the counter does not know the fused kernel of the CPU."""
    head = {"pooling": "map", "representation_size": 8}
    ensemble = {"ensemble_size": 2, "num_selected_experts": 1}
    for options in ({"layers": ()}, {}, head, ensemble):
        overrides = {"capacity_factor": 8.0} | options
        model, images = random_model(**overrides), random_images(4)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        assert vm.count_flops(model) * 4 == pytest.approx(counter.get_total_flops(), rel=0.02), overrides


def test_flops_follow_the_routing():
    model = vm.create_model("vmoe_s32_e8_last2", num_layers=8)
    flops = {}
    for factor in (2.0, 1.0, 0.5):
        model.set_routing(capacity_factor=factor)
        flops[factor] = vm.count_flops(model)
    assert flops[2.0] == flops[1.0]  # more places than requests cost nothing
    # Two layers of 50 tokens, K = 2: half of 2 * 50 * 2 multiply-adds pairs of 512 x 2048, twice for the two matrices.
    assert flops[1.0] - flops[0.5] == 2 * (2 * 50 * 2 * 512 * 2048 * 2) // 2
    assert vm.count_flops(model, 384) > flops[0.5] * 2.5


def test_wrong_images_are_named():
    model = random_model()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(2, 1, 16, 16\)"):
        model(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="multiple of the patch size 8 x 8, got 17 x 16"):
        model(torch.zeros(2, 3, 17, 16))
    with pytest.raises(ValueError, match="must be 16 x 16 pixels for this model's learned positions, got 32 x 32"):
        model(torch.zeros(2, 3, 32, 32))
