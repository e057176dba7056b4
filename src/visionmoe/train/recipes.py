"""Recipes: each function returns the whole config of a run, to be changed field by field (`config.assign`).

`visionmoe train --recipe NAME`, `visionmoe finetune PATH --recipe NAME`; the hardware-hours and accuracies are those of
the papers for the models that they name, or measured here where that is said.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

from visionmoe.checkpoint.sources import open_source
from visionmoe.config import ModelConfig, MoEConfig
from visionmoe.data.config import DataConfig
from visionmoe.train.config import ClipConfig, OptimizerConfig, ScheduleConfig, TrainConfig, with_model
from visionmoe.variants import get_config

# The reference's ".*/kernel": every matrix, the router's included; no biases, norms, tokens or positions.
KERNELS = r"(proj|qkv|q|kv|fc1|fc2|gate|pre_logits|head)\.weight$"


def fashion_mnist(model: str | None = None) -> TrainConfig:
    """A small V-MoE on the embedded Fashion-MNIST images (12,000 of 28 x 28, ten classes).

    `visionmoe train --recipe fashion_mnist`. Patch 7, D 96, 3 blocks, 8 experts, K 2, the last two blocks sparse.
    About 88 % on the 2,000 test images, three minutes on two cores; docs/results.md has three seeds.
    """
    small = ModelConfig(
        image_size=28, patch_size=7, in_channels=1, num_classes=10, hidden_size=96, num_layers=3, mlp_dim=256,
        num_heads=3, pooling="gap", attention_qk_norm=True,
        moe=MoEConfig(num_experts=8, layers=(1, 2), num_selected_experts=2),
    )  # fmt: skip
    config = TrainConfig(
        recipe="fashion_mnist",
        out="runs/fashion_mnist",
        model=small,
        data=DataConfig(
            source="fashion-mnist", image_size=28, in_channels=1, batch_size=64, crop="pad", crop_padding=1
        ),
        label_smoothing=0.1,
        optimizer=dataclasses.replace(_adam(2e-3, warmup_steps=100, weight_decay=0.1), options={"b2": 0.95}),
        ema_decay=0.9975,
        epochs=28,
        eval_every=750,
        checkpoint_every=750,
        log_every=50,
    )
    return config if model is None else with_model(config, model)


def fashion_mnist_dense(model: str | None = None) -> TrainConfig:
    """The dense ViT of `fashion_mnist`'s training FLOPs."""
    return _dense(fashion_mnist(model))


def cifar10_small(model: str | None = None) -> TrainConfig:
    """A small V-MoE on colour images of 32 x 32, such as CIFAR-10's; about ten minutes on two cores.

    `visionmoe train --recipe cifar10_small --data parquet:PATH`. Patch 4, D 96, 4 blocks, 8 experts, K 2, every second
    block sparse. Flips only: in so few epochs more augmentation costs accuracy.
    """
    small = ModelConfig(
        image_size=32, patch_size=4, in_channels=3, num_classes=10, hidden_size=96, num_layers=4, mlp_dim=192,
        num_heads=4, pooling="gap", moe=MoEConfig(num_experts=8, layers=(1, 3), num_selected_experts=2),
    )  # fmt: skip
    config = TrainConfig(
        recipe="cifar10_small",
        out="runs/cifar10_small",
        model=small,
        data=DataConfig(source="torchvision:CIFAR10", image_size=32, in_channels=3, batch_size=128, crop="resize"),
        optimizer=_adam(2e-3, warmup_steps=50, weight_decay=0.05),
        ema_decay=0.99,
        epochs=3.5,
        eval_every=400,
        checkpoint_every=400,
    )
    return config if model is None else with_model(config, model)


def cifar10_small_dense(model: str | None = None) -> TrainConfig:
    """The dense ViT of `cifar10_small`'s training FLOPs: no experts, and an MLP so much wider in every block."""
    return _dense(cifar10_small(model))


def imagenet21k(model: str | None = None) -> TrainConfig:
    """Pretraining on ImageNet-21k, arXiv 2106.05974 (appendix B) and google-research/vmoe; any size by name.

    `visionmoe train --recipe imagenet21k --model vmoe_b16_e8_every2 --data folder:PATH` (the default model).
    300 epochs of 4096 images at 224 px, RandAugment(2, 20), mixup 0.5, K 2, capacity 1.05, vanilla order, noise 1.
    The published vmoe_b16_imagenet21k_randaug_strong was made so: 85.6 % on ImageNet after fine-tuning at 384 px.
    Cost of the paper's JFT-300M runs, TPUv3-core-days (ImageNet top-1 fine-tuned): S/32 every 2 17.6 (77.1 %),
    B/16 every 2 201 (85.3 %), L/16 every 2 1,206 (87.4 %), 15B 16,776 (90.35 %).
    vmoe_15b gets Adafactor and the inverse square root schedule.
    """
    name = "vmoe_b16_e8_every2" if model is None else model
    config = get_config(name).replace(image_size=224, num_classes=21_843, head_bias_init=-10.0)
    optimizer = _adam(_pretraining_rate(name), warmup_steps=10_000, weight_decay=0.1, linear_to=1e-5)
    if name == "vmoe_15b":
        optimizer = _adafactor(num_experts=config.moe.num_experts)
    return TrainConfig(
        recipe="imagenet21k",
        out=f"runs/imagenet21k_{name}",
        model=config,
        data=DataConfig(
            source="folder:data/imagenet21k", eval_split="val", image_size=224, in_channels=3, batch_size=4096,
            workers=16, crop="inception", randaugment_ops=2, randaugment_magnitude=20, mixup_alpha=0.5, cache_mb=0,
        ),
        loss="sigmoid",
        optimizer=optimizer,
        epochs=300,
        precision="bfloat16",
        eval_every=10_000,
        checkpoint_every=5_000,
    )  # fmt: skip


def imagenet1k(model: str | None = None) -> TrainConfig:
    """From scratch on ImageNet-1k, google-research/vmoe (vmoe_s32_last2_ilsvrc2012_randaug_light1); any model by name.

    `visionmoe train --recipe imagenet1k --data folder:PATH` (default model vmoe_s32_e8_last2).
    300 epochs of 1024 images at 224 px, RandAugment(2, 10), mixup 0.2, expert dropout 0.2, decay on matrices only.
    Evaluate it at capacity factor 4. Fine-tuned at 384 px the published model has 75.9 % on ImageNet.
    """
    name = "vmoe_s32_e8_last2" if model is None else model
    config = get_config(name).replace(image_size=224, num_classes=1000, head_bias_init=-math.log(1000))
    if config.moe.layers:
        config = config.replace(expert_dropout_rate=0.2)
    optimizer = _adam(3e-3, warmup_steps=10_000, weight_decay=((KERNELS, 0.1),), linear_to=1e-5)
    return TrainConfig(
        recipe="imagenet1k",
        out=f"runs/imagenet1k_{name}",
        model=config,
        data=DataConfig(
            source="folder:data/imagenet", eval_split="val", image_size=224, in_channels=3, batch_size=1024,
            workers=16, crop="inception", randaugment_ops=2, randaugment_magnitude=10, mixup_alpha=0.2, cache_mb=0,
        ),
        loss="sigmoid",
        optimizer=dataclasses.replace(optimizer, gradient_clip=ClipConfig(global_norm=1.0)),
        epochs=300,
        precision="bfloat16",
        eval_every=10_000,
        checkpoint_every=5_000,
    )  # fmt: skip


def finetune(init_from: str, init_config: str | None = None) -> TrainConfig:
    """Fine-tuning on any images, with the reference's optimizer at a size for one machine.

    `visionmoe finetune PATH --data folder:PATH`. Images have the checkpoint's own size and channels. SGD with momentum,
    clip 10, cosine; 2,000 steps of 64 images. As in all recipes of fine-tuning, the head is kept where the checkpoint
    has the same classes as the images, else it starts from zeros.
    """
    image_size, in_channels = _stored_size(init_from, init_config)
    data = DataConfig(image_size=image_size, in_channels=in_channels, batch_size=64, crop="inception")
    config = _finetuning("finetune", init_from, init_config, data, 3e-3, steps=2_000, warmup_steps=100)
    return dataclasses.replace(config, model_options={}, eval_every=500, checkpoint_every=250)


def finetune_imagenet(init_from: str, init_config: str | None = None) -> TrainConfig:
    """Fine-tuning on ImageNet-1k at 384 px, arXiv 2106.05974 (appendix B.5) and google-research/vmoe.

    `visionmoe finetune vmoe_b16_imagenet21k_randaug_strong --recipe finetune_imagenet --data folder:PATH`.
    10,000 steps of 1024 images, capacity factor 1.5. Published: B/16 85.6 %, S/32 75.9 % top-1. The latter began with a
    new head although it was pretrained on the same classes, with another loss: --head new.
    """
    data = DataConfig(
        source="folder:data/imagenet", eval_split="val", image_size=384, in_channels=3, batch_size=1024, workers=16,
        crop="inception", cache_mb=0,
    )  # fmt: skip
    return _finetuning("finetune_imagenet", init_from, init_config, data, 3e-3, steps=10_000, warmup_steps=500)


def finetune_cifar10(init_from: str, init_config: str | None = None) -> TrainConfig:
    """Fine-tuning on CIFAR-10 at 128 px, google-research/vmoe: 1,000 steps of 1024 images, at half of ImageNet's rate.

    `visionmoe finetune vmoe_b16_imagenet21k_randaug_strong --recipe finetune_cifar10 --data parquet:PATH`.
    Published: B/16 98.7 % top-1, mean of three seeds, on the original images.
    """
    data = DataConfig(
        source="torchvision:CIFAR10", image_size=128, in_channels=3, batch_size=1024, crop="inception", workers=4
    )
    return _finetuning("finetune_cifar10", init_from, init_config, data, 1.5e-3, steps=1_000, warmup_steps=100)


FROM_SCRATCH: dict[str, Callable[[str | None], TrainConfig]] = {
    "fashion_mnist": fashion_mnist,
    "fashion_mnist_dense": fashion_mnist_dense,
    "cifar10_small": cifar10_small,
    "cifar10_small_dense": cifar10_small_dense,
    "imagenet21k": imagenet21k,
    "imagenet1k": imagenet1k,
}
FINETUNING: dict[str, Callable[[str, str | None], TrainConfig]] = {
    "finetune": finetune,
    "finetune_imagenet": finetune_imagenet,
    "finetune_cifar10": finetune_cifar10,
}


def get_recipe(name: str, model: str | None = None) -> TrainConfig:
    """The config of a run from scratch; model: a name (`visionmoe.list_models`) in the place of the recipe's own.

    Raises ValueError with the nearest name for an unknown recipe or model.
    """
    if name in FINETUNING:
        raise ValueError(f"recipe {name!r} fine-tunes trained weights: use visionmoe finetune PATH --recipe {name}")
    _check_recipe(name, FROM_SCRATCH)
    return FROM_SCRATCH[name](model)


def get_finetuning(name: str, init_from: str, init_config: str | None = None) -> TrainConfig:
    """The config of a fine-tuning run from `init_from`, anything that `visionmoe.load` reads, with `init_config`."""
    if name in FROM_SCRATCH:
        raise ValueError(f"recipe {name!r} starts from scratch: use visionmoe train --recipe {name}")
    _check_recipe(name, FINETUNING)
    return FINETUNING[name](init_from, init_config)


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The dense ViT of equal FLOPs in training: what the experts of K choices and their capacity cost goes to wider
    MLPs, the same in every block."""
    moe = model.moe
    share = min(1.0, moe.capacity_factor) * moe.num_selected_experts  # MLP passes that a token pays for
    extra = len(moe.layers) * (share - 1) / model.num_layers
    width = round(model.mlp_dim * (1 + extra) / 8) * 8
    return dataclasses.replace(model, mlp_dim=width, moe=MoEConfig(layers=()))


def _dense(config: TrainConfig) -> TrainConfig:
    """The same run with the dense twin of its model."""
    assert config.model is not None
    name = f"{config.recipe}_dense"
    return dataclasses.replace(config, recipe=name, out=f"runs/{name}", model=dense_twin(config.model))


def _adam(
    rate: float,
    *,
    warmup_steps: int,
    weight_decay: float | tuple[tuple[str, float], ...],
    linear_to: float | None = None,
) -> OptimizerConfig:
    """Adam 0.9/0.999 with decoupled decay; cosine to 0, or linear to `linear_to`."""
    schedule = ScheduleConfig("warmup_cosine_decay", peak_value=rate, warmup_steps=warmup_steps)
    if linear_to is not None:
        schedule = ScheduleConfig(
            "warmup_linear_decay", peak_value=rate, end_value=linear_to, warmup_steps=warmup_steps
        )
    return OptimizerConfig(name="adam", learning_rate=schedule, weight_decay=weight_decay)


def _adafactor(num_experts: int) -> OptimizerConfig:
    """The 15B model's optimizer; the rate, decay and lengths are big_vision's usual ones (arXiv 2106.04560)."""
    return OptimizerConfig(
        name="big_vision_adafactor",
        learning_rate=ScheduleConfig(
            "big_vision_rsqrt", peak_value=8e-4, timescale=10_000, warmup_steps=10_000, cooldown_steps=50_000
        ),
        weight_decay=((r"^head\.weight$", 3.0), (KERNELS, 0.03)),
        gradient_clip=ClipConfig(global_norm=1.0),
        options={"min_dim_size_to_factor": num_experts + 1, "momentum_dtype": "bfloat16"},
    )


def _finetuning(
    name: str, init_from: str, init_config: str | None, data: DataConfig, rate: float, steps: int, warmup_steps: int
) -> TrainConfig:
    schedule = ScheduleConfig("warmup_cosine_decay", peak_value=rate, end_value=1e-5, warmup_steps=warmup_steps)
    return TrainConfig(
        recipe=name,
        out=f"runs/{name}",
        init_from=init_from,
        init_config=init_config,
        model_options={"capacity_factor": 1.5},
        data=data,
        loss="softmax",
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=schedule,
            gradient_clip=ClipConfig(global_norm=10.0),
            options={"momentum": 0.9},
        ),
        steps=steps,
        eval_every=max(1, steps // 10),
        checkpoint_every=max(1, steps // 10),
    )


def _pretraining_rate(name: str) -> float:
    """S 1e-3, B 8e-4, L/32 6e-4, L/16 (and /14) 4e-4, H 3e-4."""
    size = name.split("_")[1][:1]
    if size == "l":
        return 6e-4 if name.split("_")[1] == "l32" else 4e-4
    return {"s": 1e-3, "b": 8e-4, "h": 3e-4}.get(size, 3e-4)


def _stored_size(init_from: str, init_config: str | None) -> tuple[int | tuple[int, int], int]:
    """image_size and in_channels of the stored model; 224 and 3 where it cannot be read: loading it says why."""
    try:
        stored = open_source(init_from, init_config).config
    except (OSError, ValueError):
        return 224, 3
    return stored.image_size, stored.in_channels


def _check_recipe(name: str, allowed: dict[str, Callable[..., TrainConfig]]) -> None:
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        raise ValueError(
            f"unknown recipe {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}")
        )
