"""A short run, compiled or not."""

import dataclasses
from pathlib import Path

import visionmoe as vm
from visionmoe.data.config import DataConfig
from visionmoe.train.config import TrainConfig
from visionmoe.train.log import read_log
from visionmoe.train.loop import run_training


def losses(out: Path, layout: str) -> tuple[list[float], list[float]]:
    """Of three steps, as they are and compiled."""
    moe = vm.MoEConfig(num_experts=4, layers=(1,), group_size="image")
    model = vm.ModelConfig(image_size=28, patch_size=14, in_channels=1, num_classes=10, hidden_size=16, num_layers=2,
                           mlp_dim=32, num_heads=2, moe=moe)  # fmt: skip
    config = TrainConfig(model=model, data=DataConfig(batch_size=16, train_split="train[:160]"), steps=3, log_every=1,
                         parallel=layout, device="cpu", tensorboard=False, checkpoint_every=None)  # fmt: skip
    plain, compiled = (
        dataclasses.replace(config, out=str(out / f"compiled-{compile}"), compile=compile) for compile in (False, True)
    )
    return _losses(plain), _losses(compiled)


def _losses(config: TrainConfig) -> list[float]:
    run_training(config, show_progress=False)
    records = read_log(Path(config.out) / "log.jsonl")
    return [record["main_loss"] for record in records if record["kind"] == "train"]
