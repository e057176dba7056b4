"""Random routers: uniform experts with the tokens' own weights, and the trained ones back afterwards."""

import numpy as np
import pytest
import torch

import visionmoe as vm
from visionmoe.analysis.random_router import Ablation, ablations, random_routers, run_ablations, summarise
from visionmoe.analysis.record import record_routing
from visionmoe.evaluate.classify import ClassificationEvaluator

CONFIG = vm.ModelConfig(
    image_size=16, patch_size=4, in_channels=1, num_classes=3, hidden_size=16, num_layers=3, mlp_dim=32, num_heads=2,
    pooling="gap", moe=vm.MoEConfig(num_experts=6, layers=(1, 2), capacity_factor=6.0),
)  # fmt: skip


def make(**overrides: object) -> vm.VisionTransformer:
    torch.manual_seed(0)
    return vm.create_model(CONFIG.replace(**overrides))


def pixels(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_experts_are_uniform_and_weights_the_tokens_own():
    model = make()
    trained = record_routing(model, pixels(200))[1]
    with random_routers(model, (1,), seed=0):
        drawn = record_routing(model, pixels(200))[1]
    assert torch.equal(drawn.combine_weights, trained.combine_weights)  # block 1 sees the same tokens
    first, second = drawn.expert_index.view(-1, 2).T  # (1, S*K) -> (K, S)
    assert (first != second).all()
    # 3,200 tokens, 30 ordered pairs of different experts: 106.7 expected each, with a deviation of about 10.
    pairs = np.bincount((first * 6 + second).numpy(), minlength=36).reshape(6, 6)
    assert (np.diag(pairs) == 0).all()
    assert abs(pairs[~np.eye(6, dtype=bool)] - 3200 / 30).max() < 50
    agreement = (drawn.expert_index == trained.expert_index).float().mean()
    assert agreement == pytest.approx(1 / 6, abs=0.03)


def test_the_model_is_as_before_afterwards():
    model, images = make().eval(), pixels(4)
    before, names = model(images).logits, list(model.state_dict())
    routers = [model.moe_layer(layer).router for layer in (1, 2)]
    with pytest.raises(RuntimeError, match="stop"), random_routers(model, (1, 2), seed=0):
        assert list(model.state_dict()) == names
        assert not torch.equal(model.forward_features(images), torch.zeros(()))
        raise RuntimeError("stop")
    assert [model.moe_layer(layer).router for layer in (1, 2)] == routers
    assert torch.equal(model(images).logits, before)


def test_other_layers_keep_their_router_and_seeds_repeat():
    model = make()
    trained = record_routing(model, pixels(20))

    def drawn(seed: int) -> dict:
        with random_routers(model, (2,), seed):
            return record_routing(model, pixels(20))

    assert torch.equal(drawn(0)[1].expert_index, trained[1].expert_index)
    assert torch.equal(drawn(0)[2].expert_index, drawn(0)[2].expert_index)
    assert not torch.equal(drawn(0)[2].expert_index, drawn(1)[2].expert_index)


@pytest.mark.parametrize(
    "overrides",
    [{"ensemble_size": 2, "num_selected_experts": 1}, {"router": "expert_choice", "num_selected_experts": 1}],
    ids=str,
)
def test_ensembles_and_expert_choice(overrides: dict):
    """A member's tokens stay with its own experts; with expert choice every expert still takes its number of tokens."""
    model = make(**overrides, capacity_factor=2.0)
    with random_routers(model, (1,), seed=0):
        drawn = record_routing(model, pixels(10))[1]
    if model.config.ensemble_size == 2:
        assert (drawn.expert_index // 3 == drawn.token_index % 2).all()
    else:
        assert len(set(np.bincount(drawn.expert_index[0]).tolist())) == 1


def test_which_evaluations_are_made_and_what_is_kept():
    names = [one.name for one in ablations((1, 3, 5), seeds=2)]
    one = ["blocks 1", "blocks 3", "blocks 5", "blocks 1,3", "blocks 1,3,5"]
    assert names == ["trained", *(f"{blocks} seed {seed}" for seed in (0, 1) for blocks in one)]
    assert ablations((1,), seeds=0) == [Ablation((), 0)]

    model = make()
    torch.nn.init.normal_(model.head.weight)
    evaluate = ClassificationEvaluator([(pixels(30), torch.arange(30) % 3, torch.arange(30))])
    done, calls = {"blocks 1 seed 0": {"top1": 0.5, "loss": 1.0}}, []
    run_ablations(model, evaluate, ablations((1, 2), seeds=2), done, lambda: calls.append(len(done)))
    assert calls == [2, 3, 4, 5, 6, 7]  # 1 + 2 * 3 less the one that was there
    result = summarise((1, 2), 2, done)
    assert result["trained"]["top1"] == evaluate(model)["top1"]
    assert result["alone"]["1"]["top1"][0] == result["cumulative"]["1"]["top1"][0] == 0.5
    two = [done[f"blocks 1,2 seed {seed}"]["top1"] for seed in (0, 1)]
    assert result["cumulative"]["2"]["mean"] == pytest.approx(sum(two) / 2)
    assert result["cumulative"]["2"]["std"] == pytest.approx(abs(two[0] - two[1]) / 2**0.5)
    assert summarise((1, 2), 0, done)["alone"] == {}
