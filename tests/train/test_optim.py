import io

import pytest
import torch
from torch import nn

import visionmoe as vm
from visionmoe.distributed.tensors import global_norm
from visionmoe.train.optim import create_optimizer
from visionmoe.train.scaling import factor_plan

EVERY_OPTIMIZER = [
    {"name": "adam", "weight_decay": 0.1},
    {"name": "adam", "mu_dtype": "bfloat16", "b2": 0.99},
    {"name": "adam", "eps_root": 1e-8},
    {"name": "sgd", "momentum": 0.9},
    {"name": "sgd", "momentum": 0.9, "nesterov": True, "accumulator_dtype": "bfloat16"},
    {"name": "sgd"},
    {"name": "big_vision_adafactor", "min_dim_size_to_factor": 4, "momentum_dtype": "bfloat16"},
]


def parameters(*values):
    return [(f"p{i}.weight", nn.Parameter(torch.tensor(v))) for i, v in enumerate(values)]


def tiny_model():
    torch.manual_seed(0)
    moe = vm.MoEConfig(num_experts=4, layers=(1,), group_size="batch")
    config = vm.ModelConfig(image_size=16, patch_size=8, num_classes=5, hidden_size=16, num_layers=2, mlp_dim=24,
                            num_heads=2, moe=moe)  # fmt: skip
    return vm.create_model(config)


def fill_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adam_by_hand():
    (named,) = [parameters([1.0])]
    optimizer = create_optimizer(named, name="adam", total_steps=10, learning_rate=0.1, weight_decay=0.5, eps=0.0)
    p = named[0][1]
    p.grad = torch.tensor([4.0])
    optimizer.step()  # mu/(1-b1) = 4, nu/(1-b2) = 16: 4/4 = 1; 1 - 0.1 (1 + 0.5 * 1)
    assert p.item() == pytest.approx(0.85)
    p.grad = torch.tensor([-4.0])
    optimizer.step()  # mu = 0.9 * 0.4 - 0.4 = -0.04, / (1 - 0.81) = -0.2105; nu unbiased 16: -0.0526
    assert p.item() == pytest.approx(0.85 - 0.1 * (-0.04 / 0.19 / 4 + 0.5 * 0.85))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adam_written_out_equals_torchs_kernel(dtype):
    models = [tiny_model(), tiny_model()]
    common = {"name": "adam", "total_steps": 9, "learning_rate": 1e-2, "weight_decay": 0.1}
    optimizers = [
        create_optimizer(models[0].named_parameters(), **common),
        create_optimizer(models[1].named_parameters(), **common, mu_dtype=dtype),
    ]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_grads(model, step)
            optimizer.step()
    tolerance = 1e-6 if dtype == "float32" else 1e-3
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_sgd_momentum_and_nesterov_by_hand():
    for nesterov, expected in ((False, 1 - 0.1 * 2 - 0.1 * (2 + 0.5 * 2)), (True, 1 - 0.1 * 3 - 0.1 * (2 + 0.5 * 3))):
        named = parameters([1.0])
        optimizer = create_optimizer(named, name="sgd", total_steps=2, learning_rate=0.1, momentum=0.5,
                                     nesterov=nesterov)  # fmt: skip
        for _ in range(2):
            named[0][1].grad = torch.tensor([2.0])
            optimizer.step()
        assert named[0][1].item() == pytest.approx(expected)


def test_global_clip_and_norm_before_it():
    named = parameters([0.0], [0.0])
    optimizer = create_optimizer(named, name="sgd", total_steps=1, learning_rate=1.0, gradient_clip={"global_norm": 1})
    named[0][1].grad, named[1][1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert optimizer.last_grad_norm.item() == pytest.approx(5.0)
    assert [p.item() for _, p in named] == pytest.approx([-0.6, -0.8])
    named[0][1].grad, named[1][1].grad = torch.tensor([0.3]), torch.tensor([0.4])
    optimizer.step()  # shorter than 1: as it is
    assert [p.item() for _, p in named] == pytest.approx([-0.9, -1.2])


def test_clip_by_value():
    named = parameters([0.0, 0.0])
    clip = {"absolute_value": 0.5}
    optimizer = create_optimizer(named, name="sgd", total_steps=1, learning_rate=1.0, gradient_clip=clip)
    named[0][1].grad = torch.tensor([-3.0, 0.1])
    optimizer.step()
    torch.testing.assert_close(named[0][1].data, torch.tensor([0.5, -0.1]))


def test_patterns_first_match_wins_and_unmatched_are_not_decayed():
    named = [("head.weight", nn.Parameter(torch.ones(1))), ("fc1.weight", nn.Parameter(torch.ones(1))),
             ("fc1.bias", nn.Parameter(torch.ones(1)))]  # fmt: skip
    optimizer = create_optimizer(
        named, name="sgd", total_steps=1, learning_rate=1.0,
        weight_decay=[(r"^head", 0.5), (r"\.weight$", 0.25)],
        learning_rate_factors=[("fc1", 0.5)],
    )  # fmt: skip
    for _, p in named:
        p.grad = torch.zeros(1)
    optimizer.step()
    assert [p.item() for _, p in named] == [0.5, 1 - 0.5 * 0.25, 1.0]


def test_gradient_scale_comes_before_clipping():
    named = parameters([0.0], [0.0])
    optimizer = create_optimizer(named, name="sgd", total_steps=1, learning_rate=1.0, gradient_scale=[("p0", 10.0)],
                                 gradient_clip={"global_norm": 5.0})  # fmt: skip
    named[0][1].grad, named[1][1].grad = torch.tensor([0.6]), torch.tensor([8.0])
    optimizer.step()  # (6, 8) has norm 10: halved
    assert [p.item() for _, p in named] == pytest.approx([-3.0, -4.0])


@pytest.mark.parametrize("frozen", [{"frozen_pattern": "p0"}, {"trainable_pattern": ["p1"]}])
def test_frozen_parameters_stay(frozen):
    named = parameters([1.0], [1.0])
    optimizer = create_optimizer(named, name="adam", total_steps=1, learning_rate=0.5, weight_decay=0.1, **frozen)
    for _, p in named:
        p.grad = torch.ones(1)
    optimizer.step()
    assert named[0][1].item() == 1.0 and named[1][1].item() < 1.0


@pytest.mark.parametrize("options", EVERY_OPTIMIZER, ids=lambda o: "-".join(map(str, o.values())))
def test_state_dict_round_trips_bit_for_bit(options):
    """Three steps, save, load into a new optimizer, two more steps: as five steps without the break."""
    rate = {"schedule": "warmup_cosine_decay", "peak_value": 0.01, "warmup_steps": 2}
    straight, broken = tiny_model(), tiny_model()
    common = {"total_steps": 5, "learning_rate": rate, **options}
    one = create_optimizer(straight.named_parameters(), **common)
    two = create_optimizer(broken.named_parameters(), **common)
    for step in range(5):
        if step == 3:
            stream = io.BytesIO()
            torch.save(two.state_dict(), stream)
            stream.seek(0)
            two = create_optimizer(broken.named_parameters(), **common)
            two.load_state_dict(torch.load(stream, weights_only=True))
        for model, optimizer in ((straight, one), (broken, two)):
            fill_grads(model, step)
            optimizer.step()
    assert two.num_updates == 5
    for a, b in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.state_dict()["state"].values(), two.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_adafactor_factors_the_references_axes():
    named = dict(tiny_model().named_parameters())  # D 16, H 2 of width 8, F 24, E 4

    def factored(name, minimum):
        plan = factor_plan(name, named[name], minimum)
        return None if plan.row is None else {plan.view[plan.row], plan.view[plan.column]}

    assert factored("blocks.0.attn.qkv.weight", 8) == {16, 8}  # (D, H, D/H), each of q, k, v by itself
    assert factor_plan("blocks.0.attn.qkv.weight", named["blocks.0.attn.qkv.weight"], 8).view == (3, 2, 8, 16)
    assert factored("blocks.0.attn.qkv.weight", 9) is None  # the second largest of (16, 2, 8) is too small
    assert factored("blocks.0.attn.proj.weight", 8) == {16, 8}
    assert factored("blocks.0.attn.qkv.bias", 2) == {2, 8}
    assert factored("blocks.0.mlp.fc1.weight", 16) == {16, 24}
    assert factored("blocks.1.mlp.experts.fc1.weight", 2) == {16, 24}
    assert factored("blocks.1.mlp.experts.fc1.bias", 2) is None  # (E, F): never over the experts
    assert factored("blocks.1.mlp.router.gate.weight", 2) is None
    assert factored("patch_embed.proj.weight", 8) == {8, 16}
    assert factored("pos_embed", 2) == {5, 16}


def test_adafactor_factored_by_hand():
    torch.manual_seed(1)
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = create_optimizer([("fc1.weight", weight)], name="big_vision_adafactor", total_steps=1,
                                 learning_rate=1.0, min_dim_size_to_factor=2, momentum=0.0)  # fmt: skip
    weight.grad = torch.randn(3, 4)
    square = weight.grad**2  # first step: the decay is 0, the moments are those of this gradient
    second = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    optimizer.step()
    torch.testing.assert_close(weight.data, -weight.grad / second.sqrt())


def test_adafactor_without_the_number_of_heads_says_so():
    unmarked = [("blocks.0.attn.qkv.weight", nn.Parameter(torch.zeros(48, 16)))]
    with pytest.raises(ValueError, match=r"number of heads of blocks\.0\.attn"):
        create_optimizer(unmarked, name="big_vision_adafactor", total_steps=1, learning_rate=1.0)


def test_global_norm_sees_nan_and_infinity():
    assert global_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item() == pytest.approx(5.0)
    assert not torch.isfinite(global_norm([torch.ones(2), torch.tensor([float("nan")])]))
    assert not torch.isfinite(global_norm([torch.ones(2), torch.tensor([float("inf")])]))
    assert global_norm([]).item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adagrad"}, "unknown option 'adagrad' for the optimizer's name"),
        ({"name": "adam", "momentum": 0.9}, "unknown option 'momentum' for optimizer 'adam'"),
        ({"name": "sgd", "momentun": 0.9}, "did you mean 'momentum'"),
        ({"name": "adam", "b1": 1.0}, "b1 must be >= 0 and < 1, got 1.0"),
        ({"name": "adam", "mu_dtype": "int8"}, "mu_dtype must be one of float32"),
        ({"name": "sgd", "weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"name": "sgd", "weight_decay": [("kernel", 0.1)]}, "weight_decay: no parameter matches 'kernel'"),
        ({"name": "sgd", "weight_decay": [("(", 0.1)]}, "is not a regular expression"),
        ({"name": "sgd", "weight_decay": ["p0"]}, "must be a number or pairs"),
        ({"name": "sgd", "frozen_pattern": "heads"}, "frozen_pattern: no parameter matches 'heads'"),
        ({"name": "sgd", "frozen_pattern": "p", "trainable_pattern": "p"}, "not both"),
        ({"name": "sgd", "gradient_clip": {"global_nrm": 1.0}}, "did you mean 'global_norm'"),
        ({"name": "sgd", "gradient_clip": {"global_norm": 0}}, "global_norm of gradient_clip must be > 0"),
        ({"name": "sgd", "learning_rate": -1.0}, "value of schedule 'constant' must be a number >= 0"),
    ],
)
def test_mistakes_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(parameters([0.0]), **({"total_steps": 10, "learning_rate": 0.1} | options))
