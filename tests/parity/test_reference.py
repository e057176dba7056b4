"""Against the JAX reference: logits, losses and every gradient, one test per case and way to run the experts."""

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.checkpoint import params_from_vmoe, read_vmoe

CASES = (
    "dense-vit", "top2-vanilla", "top2-bpr-tight", "top1-tight", "e32-k2", "last2-gap-prelogits", "map-head",
    "gshard-aux", "expert-choice", "ensemble-m2", "soft-moe",
)  # fmt: skip


def assert_near(actual, expected, tolerance, what):
    worst = float((actual - torch.from_numpy(np.asarray(expected))).abs().max())
    assert worst <= tolerance * max(float(np.abs(expected).max()), 1e-12), f"{what}: off by {worst}"


def load_case(path, case):
    expected = np.load(path / "expected.npz")
    cfg = vm.ModelConfig.from_reference(case["model"], image_size=case["image_size"])
    model = vm.load(path / "ckpt", config=cfg)
    return model, expected


@pytest.mark.parametrize("dispatch", ["segments", "buffers"])
@pytest.mark.parametrize("name", CASES)
def test_against_reference(name, dispatch, conformance_case):
    model, expected = load_case(*conformance_case(name))
    model.eval()
    for layer in model.moe_layers:
        model.blocks[layer].mlp.dispatch = dispatch
    tolerance = 2e-2 if name == "soft-moe" else 2e-5  # the reference rounds soft routing to bfloat16
    out = model(torch.from_numpy(expected["images"]).permute(0, 3, 1, 2))
    assert_near(out.logits.detach(), expected["logits"], tolerance, "logits")
    labels = torch.from_numpy(expected["labels"]).repeat_interleave(model.config.ensemble_size, 0)
    main_loss = -(labels * out.logits.log_softmax(-1)).sum(-1).mean()
    assert main_loss.item() == pytest.approx(float(expected["main_loss"]), rel=tolerance)
    assert out.auxiliary_loss.item() == pytest.approx(float(expected["auxiliary_loss"]), rel=tolerance)
    for key in (k for k in expected.files if k.startswith("metrics/")):
        _, block, metric = key.split("/")
        ours = out.metrics.get(f"blocks.{block.removeprefix('encoderblock_')}.{metric}")
        if ours is None:  # what only the reference monitors about expert choice
            assert name == "expert-choice", key
            continue
        assert_near(ours, expected[key], tolerance, key)
    (main_loss + out.auxiliary_loss).backward()
    reference = {k.removeprefix("grads/"): expected[k] for k in expected.files if k.startswith("grads/")}
    gradients = params_from_vmoe(reference, model.config)
    assert set(gradients) == {k for k, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        assert_near(parameter.grad, gradients[key].numpy(), tolerance, key)


def test_against_reference_ensemble_predictions(conformance_case):
    """The mean over members of softmax probabilities, copies of an image adjacent (arXiv 2110.03360)."""
    model, expected = load_case(*conformance_case("ensemble-m2"))
    out = model.eval()(torch.from_numpy(expected["images"]).permute(0, 3, 1, 2))
    logits = torch.from_numpy(expected["logits"]).view(4, 2, 10)
    torch.testing.assert_close(out.predictions(), logits.softmax(-1).mean(1), atol=1e-5, rtol=1e-4)


def test_reference_checkpoint_has_no_unused_names(conformance_case):
    path, case = conformance_case("dense-vit")
    cfg = vm.ModelConfig.from_reference(case["model"], image_size=32)
    state = params_from_vmoe(read_vmoe(path / "ckpt"), cfg)
    assert set(state) == set(vm.create_model(cfg).state_dict())
