"""The named models in timm's registry, used as timm's users use models."""

import copy
import pickle

import pytest
import timm
import timm.data
import timm.optim
import torch
from PIL import Image

import visionmoe as vm
import visionmoe.timm
from visionmoe.checkpoint import params_to_vmoe, write_vmoe
from visionmoe.checkpoint.registry import PUBLISHED

# A named model, made small: what a test needs is its shape and routing, not its width.
SMALL = {"hidden_size": 32, "mlp_dim": 48, "num_heads": 2, "num_layers": 8, "img_size": 64}


def small(name="vmoe_s32_e8_last2", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, "num_classes": 10, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_all_named_models_are_registered():
    registered = set(timm.list_models(["vmoe_*", "eee_*", "softmoe_*"], module="timm")) | set(timm.list_models("vit_*"))
    assert set(vm.list_models()) <= registered
    assert "vmoe_15b" in timm.list_models("vmoe*")
    for name in vm.list_models():
        assert timm.is_model(name) and timm.get_pretrained_cfg(name).mean == (0.5, 0.5, 0.5)


def test_the_command_of_the_documentation():
    model = timm.create_model("vmoe_s32_e8_last2", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 56_736_744 - 990 * 513  # 10 classes, not 1000
    assert (model.num_classes, model.num_features, model.embed_dim, model.head_hidden_size) == (10, 512, 512, 512)
    assert model.config == vm.get_config("vmoe_s32_e8_last2").replace(num_classes=10)
    with torch.no_grad():
        logits = model(torch.zeros(2, 3, 224, 224))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 10)


def test_the_data_config_is_the_models_own():
    data = timm.data.resolve_data_config({}, model=small())
    assert data["input_size"] == (3, 64, 64) and data["mean"] == data["std"] == (0.5, 0.5, 0.5)
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 1.0)
    assert timm.data.create_transform(**data)(Image.new("RGB", (80, 70))).shape == (3, 64, 64)
    grey = small(in_chans=1)
    assert timm.data.resolve_data_config({}, model=grey)["mean"] == (0.5,)
    assert grey.default_cfg["num_classes"] == 10 and grey.default_cfg["architecture"] == "vmoe_s32_e8_last2"


def test_the_same_numbers_and_names_as_our_model():
    model = small()
    ours = vm.create_model(model.config).eval()
    ours.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = ours(images)
        assert torch.equal(model(images), expected.logits)
        assert torch.equal(model.forward_head(model.forward_features(images)), expected.logits)
        assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (3, 32)
    assert torch.equal(model.last_output.auxiliary_loss, expected.auxiliary_loss)
    assert model.last_output.metrics.keys() == expected.metrics.keys()


def test_the_auxiliary_loss_trains_the_routers():
    model = small().train()
    with pytest.raises(RuntimeError, match="after a forward pass"):
        model.last_output  # noqa: B018
    logits = model(torch.randn(4, 3, 64, 64))
    (torch.nn.functional.cross_entropy(logits, torch.arange(4)) + model.last_output.auxiliary_loss).backward()
    assert model.last_output.auxiliary_loss > 0
    assert model.get_parameter("blocks.7.mlp.router.gate.weight").grad.abs().max() > 0


def test_copies_leave_the_last_output_behind():
    model = small().train()
    model(torch.randn(2, 3, 64, 64))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
        with pytest.raises(RuntimeError, match="after a forward pass"):
            twin.last_output  # noqa: B018
    assert model.last_output.logits.shape == (2, 10)


def test_heads_are_changed():
    model = small()
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert (model.num_classes, model.config.num_classes) == (7, 7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 32) and model.num_classes == 0
    with pytest.raises(ValueError, match="global_pool of this model is 'token' and cannot change, got 'avg'"):
        model.reset_classifier(3, global_pool="avg")
    assert small(num_classes=0)(torch.zeros(1, 3, 64, 64)).shape == (1, 32)
    assert small(global_pool="avg").config.pooling == "gap"


def test_an_ensemble_gives_one_row_per_image():
    model = small("eee_s32_e8_m2_last2")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 10)
        # softmax of the logits: the mean of the two members' probabilities
        members = torch.softmax(model.last_output.logits, -1).view(3, 2, 10)
        torch.testing.assert_close(torch.softmax(logits, -1), members.mean(1))


def test_timms_optimizer_finds_groups():
    model = small()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5,
                                                 no_weight_decay_list=model.no_weight_decay())  # fmt: skip
    by_parameter = {id(p): g for g in groups for p in g["params"]}
    assert len(by_parameter) == len(list(model.parameters()))
    assert by_parameter[id(model.pos_embed)]["weight_decay"] == 0
    first, last = (by_parameter[id(model.blocks[i].attn.qkv.weight)]["lr_scale"] for i in (0, 7))
    assert first == pytest.approx(last * 0.5**7)


def test_gradient_checkpointing_changes_no_gradient():
    images, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = small(noise_std=0.0).train()
        model.set_grad_checkpointing(enable)
        (model(images).square().mean() + model.last_output.auxiliary_loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])


def test_pretrained_is_the_published_checkpoint(tmp_path, monkeypatch):
    """The published checkpoint of the tag, from the cache that a download would fill; here with a small model in it."""
    name, arch = "vmoe_s32_last2_ilsvrc2012_randaug_light1", "vmoe_s32_e8_last2"
    cache = tmp_path / "cache"
    config = PUBLISHED[name].config.replace(num_classes=1000)
    published = vm.create_model(config)
    with torch.no_grad():
        published.head.weight.normal_()
    write_vmoe(cache / name, params_to_vmoe(published.state_dict(), config))
    monkeypatch.setenv("VISIONMOE_CACHE", str(cache))
    for asked in (arch, f"{arch}.ilsvrc2012_randaug_light1"):
        model = timm.create_model(asked, pretrained=True)
        assert torch.equal(model.head.weight, published.head.weight) and model.config == config
        assert model.pretrained_cfg["tag"] == "ilsvrc2012_randaug_light1"
    assert timm.create_model(arch, pretrained=True, num_classes=3).head.weight.shape == (3, 512)
    assert f"{arch}.ilsvrc2012_randaug_light1_ft_ilsvrc2012" in timm.list_pretrained("vmoe*")
    with pytest.raises(ValueError, match="no checkpoint of vmoe_h14_e32_last5 is published"):
        timm.create_model("vmoe_h14_e32_last5", pretrained=True)


@pytest.mark.parametrize("options, words", [
    ({"drop_path_rate": 0.1}, "drop_path_rate must be 0: vmoe_s32_e8_last2 has dropout_rate"),
    ({"global_pool": "max"}, "global_pool must be one of token, avg, map, got 'max'"),
    ({"capacity": 2}, "unknown option 'capacity' for model"),
    ({"img_size": 60}, "image_size must be a multiple of patch_size"),
])  # fmt: skip
def test_mistakes_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model("vmoe_s32_e8_last2", **{**SMALL, **options})


def test_a_checkpoint_of_ours_is_loaded_by_timm(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    options = {**SMALL, "num_classes": 10, "checkpoint_path": str(tmp_path / "model.safetensors")}
    loaded = timm.create_model("vmoe_s32_e8_last2", **options)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert vm.load(tmp_path).config == model.config
