"""Training steps of one global batch, by one process or by several in a layout."""

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import visionmoe as vm
from visionmoe.checkpoint.engine import Planner
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import current, gather, gather_tensors
from visionmoe.evaluate.forward import evaluation_mode
from visionmoe.model.experts import Experts
from visionmoe.train.ema import Ema
from visionmoe.train.losses import create_loss
from visionmoe.train.optim import create_optimizer
from visionmoe.train.parallel import Parallel
from visionmoe.train.state import Progress, training_state
from visionmoe.train.step import StepSettings, train_step

BATCH, CLASSES, STEPS = 16, 5, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison. layout None: one process."""

    name: str
    layout: str | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "adam", "weight_decay": 0.1})
    mixup_alpha: float = 0.0
    accumulation: int = 1
    messages: int = 1  # in which the rows of experts travel
    ema_decay: float | None = None  # evaluated with the average after some steps
    bad_step: tuple[int, int] | None = None  # (step, image of the global batch) that is not finite


def config_of(case: Case) -> vm.ModelConfig:
    moe = {"num_experts": 4, "layers": (1, 2), "group_size": "image", "capacity_factor": 1.0} | case.moe
    config = {"image_size": 16, "patch_size": 4, "num_classes": CLASSES, "hidden_size": 16, "num_layers": 3,
              "mlp_dim": 24, "num_heads": 2} | case.model  # fmt: skip
    return vm.ModelConfig(**config, moe=vm.MoEConfig(**moe))


def images_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.rand(BATCH, 3, 16, 16, generator=generator) * 2 - 1
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def train(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """Losses, norms, gradients of the first step, parameters and logits at the end: of the whole job."""
    world = current()
    torch.manual_seed(0)
    model, device = vm.create_model(config_of(case)), torch.device("cpu")
    parallel = Parallel(Layout.parse(case.layout, world.size), world)
    parallel.spread(model, device)
    for module in model.modules():
        if isinstance(module, Experts) and module.exchange is not None:
            module.exchange.parts = case.messages
    common = {"learning_rate": 1e-3, "gradient_clip": {"global_norm": 1.0}} | case.optimizer
    optimizer = create_optimizer(model.named_parameters(), total_steps=steps, **common)
    ema = None if case.ema_decay is None else Ema(model, case.ema_decay)
    forward = parallel.wrap(model, device)
    settings = StepSettings(create_loss("softmax"), CLASSES, 0, case.mixup_alpha, case.accumulation)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    out: dict[str, Any] = {"losses": [], "norms": [], "applied": [], "gradients": {}}
    model.train()
    for step in range(steps):
        images, labels = images_of(step)
        if case.bad_step is not None and case.bad_step[0] == step:
            images[case.bad_step[1]] = float("inf")
        result = train_step(forward, optimizer, images[own], labels[own], step, settings, parallel)
        if ema is not None:
            ema.update()
            if step in (2, 5):
                evaluate_average(model, ema, parallel, images[own])
        out["losses"].append(parallel.mean(torch.stack([result.main_loss, result.auxiliary_loss])))
        out["norms"].append(result.grad_norm)
        out["applied"].append(result.applied)
        if step == 0:
            out["gradients"] = {n: whole_tensor(p.grad).clone() for n, p in model.named_parameters()}
    tensors, _ = training_state(model, optimizer, ema, Progress())
    planner = Planner()
    planner.set_up_planner(tensors)
    planner.create_global_plan(gather(planner.create_local_plan()))  # all parts are whole together, and can be saved
    out["parameters"] = {n: whole_tensor(p.detach()).clone() for n, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        logits = model(images_of(99)[0][own]).logits
    out["logits"] = torch.cat(gather_tensors(logits))
    return out


def evaluate_average(model: vm.VisionTransformer, ema: Ema, parallel: Parallel, images: torch.Tensor) -> None:
    with ema.swapped(), parallel.evaluating(), evaluation_mode(model):
        model(images)


def whole_tensor(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train_all(cases: list[Case]) -> dict[str, dict[str, Any]]:
    return {case.name: train(case) for case in cases}
