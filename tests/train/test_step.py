import dataclasses

import pytest
import torch

import visionmoe as vm
from visionmoe.train.ema import Ema
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.step import StepSettings, train_step


def make(group_size="image", noise_std=0.0, loss="softmax", **moe):
    torch.manual_seed(0)
    moe = vm.MoEConfig(num_experts=4, layers=(1,), group_size=group_size, noise_std=noise_std, **moe)
    model = vm.create_model(vm.ModelConfig(image_size=16, patch_size=8, num_classes=5, hidden_size=16, num_layers=2,
                                           mlp_dim=24, num_heads=2, moe=moe))  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.1)
    optimizer = create_optimizer(model.named_parameters(), name="adam", total_steps=9, learning_rate=0.01)
    settings = StepSettings(loss_fn=create_loss(loss), num_classes=5, seed=3)
    return model.train(), optimizer, settings


def batch(size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1, torch.randint(0, 5, (size,), generator=generator)


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def test_accumulation_equals_the_whole_batch_when_groups_lie_within_a_part():
    results = []
    for accumulation in (1, 4):
        model, optimizer, settings = make(group_size="image")
        settings = dataclasses.replace(settings, accumulation=accumulation)
        result = train_step(model, optimizer, *batch(), 0, settings)
        results.append((result, copies(model), [p.grad for p in model.parameters()]))
    (whole, _, whole_grads), (parts, _, part_grads) = results
    torch.testing.assert_close(parts.main_loss, whole.main_loss)
    torch.testing.assert_close(parts.auxiliary_loss, whole.auxiliary_loss)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm)
    for a, b in zip(whole_grads, part_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_repeats_itself_whatever_the_generators_were():
    outcomes = []
    for seed in (11, 12):
        model, optimizer, settings = make(noise_std=1.0, expert_dropout_rate=0.2)
        torch.manual_seed(seed)
        train_step(model, optimizer, *batch(), 5, dataclasses.replace(settings, mixup_alpha=0.5, accumulation=2))
        outcomes.append(copies(model))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_noise_differs_between_steps_and_parts():
    model, optimizer, settings = make(noise_std=1.0, group_size="batch")
    images, labels = batch(2)
    images, labels = images[:1].repeat(2, 1, 1, 1), labels[:1].repeat(2)
    losses = set()
    for step in (0, 1):
        before = [p.detach().clone() for p in model.parameters()]
        result = train_step(model, optimizer, images, labels, step, settings)
        losses.add(result.metrics["blocks.1.load_loss"].sum().item())
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
    assert len(losses) == 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_image_never_reaches_the_weights(poison):
    model, optimizer, settings = make()
    train_step(model, optimizer, *batch(), 0, settings)
    parameters = copies(model)
    state = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    images, labels = batch(seed=2)
    images[3, 0, 0, 0] = poison
    result = train_step(model, optimizer, images, labels, 1, settings)
    assert not result.applied
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    for before, after in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert optimizer.num_updates == 1
    assert train_step(model, optimizer, *batch(), 2, settings).applied


def test_a_finite_loss_with_a_gradient_that_is_not_is_left_out():
    model, optimizer, settings = make()
    model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = copies(model)
    result = train_step(model, optimizer, *batch(), 0, settings)
    assert torch.isfinite(result.main_loss) and not result.applied
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_ensembles_train_and_count_every_member(loss):
    model, optimizer, settings = make(loss=loss, ensemble_size=2, num_selected_experts=1)
    images, labels = batch()
    losses = [train_step(model, optimizer, images, labels, step, settings) for step in range(9)]
    assert losses[-1].main_loss < losses[0].main_loss
    assert losses[-1].accuracy > losses[0].accuracy


def test_mixup_keeps_the_own_label_for_accuracy():
    model, optimizer, settings = make()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([5.0, 0, 0, 0, 0]))
    images, _ = batch()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    result = train_step(model, optimizer, images, labels, 0, dataclasses.replace(settings, mixup_alpha=0.5))
    assert result.accuracy.item() == pytest.approx(3 / 8)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    model, optimizer, settings = make()
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = train_step(model, optimizer, *batch(), 0, dataclasses.replace(settings, precision="bfloat16"))
    assert seen == [torch.bfloat16] and result.applied
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_ema_by_hand_and_swapped_back():
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    ema = Ema(layer, 0.75)
    with torch.no_grad():
        layer.weight.fill_(5.0)
    ema.update()
    with pytest.raises(KeyError), ema.swapped():
        assert layer.weight.item() == 0.75 * 1 + 0.25 * 5
        raise KeyError
    assert layer.weight.item() == 5.0 and ema.average["weight"].item() == 2.0
