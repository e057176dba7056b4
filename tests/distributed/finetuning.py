"""What a fine-tuned run starts with: other images than the model's, at another resolution."""

from pathlib import Path

import torch
from tests.distributed.training import whole_tensor

from visionmoe.data.config import DataConfig
from visionmoe.train.config import TrainConfig
from visionmoe.train.setup import prepare

LAYOUTS = ("ep=2", "fsdp=2")


def config_of(model: Path, out: Path, layout: str | None) -> TrainConfig:
    data = DataConfig(image_size=42, train_split="train[:32]", batch_size=8)
    return TrainConfig(out=str(out), init_from=str(model), new_head=True, data=data, steps=1, device="cpu",
                       parallel=layout, model_options={"head_bias_init": -3.0})  # fmt: skip


def first_parameters(model: Path, out: Path, layout: str | None) -> dict[str, torch.Tensor]:
    started = prepare(config_of(model, out, layout), resume=False).model
    assert started.class_names is None
    return {name: whole_tensor(p.detach()).clone() for name, p in started.named_parameters()}


def of_all_layouts(model: Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {layout: first_parameters(model, out / layout, layout) for layout in LAYOUTS}
