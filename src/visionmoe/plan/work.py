"""What is planned: a model, its step, and the device's rates."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from visionmoe.config import ModelConfig
from visionmoe.model.routing import rounded_capacity
from visionmoe.model.soft import slots_per_expert

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Rates:
    """flops: per second; bandwidth: bytes per second of the device's memory; link: bytes per second between devices,
    each way. Peaks of the data sheets, of which a run reaches a part."""

    flops: float
    bandwidth: float
    link: float


# device -> precision -> rates. NVIDIA's data sheets of H100 SXM and A100 SXM (80 GB): tensor cores without sparsity,
# in float32 with TF32 (torch's default for products is full float32: then 67 and 19.5 TFLOP/s), NVLink one way. "cpu":
# a server with a few cores.
PRESETS: dict[str, dict[str, Rates]] = {
    "h100": {"bfloat16": Rates(989e12, 3350e9, 450e9), "float32": Rates(67e12, 3350e9, 450e9)},
    "a100": {"bfloat16": Rates(312e12, 2039e9, 300e9), "float32": Rates(19.5e12, 2039e9, 300e9)},
    "cpu": {"bfloat16": Rates(0.8e12, 20e9, 1e9), "float32": Rates(0.18e12, 20e9, 1e9)},
}


@dataclass(frozen=True)
class Work:
    """One training step, or one call of inference, over all devices.

    batch_size: images of the whole step. accumulation: parts in which each device runs its images. precision: of the
    products; in training parameters are float32 and "bfloat16" is autocast, in inference it is the parameters' dtype.
    optimizer, options: as in `visionmoe.train.optim.create_optimizer`. loss: "softmax" or "sigmoid".
    gpu: the experts run by the Triton kernels, else on segments; with ep > 1 on buffers in both cases.
    """

    config: ModelConfig
    batch_size: int
    accumulation: int = 1
    mode: Literal["train", "inference"] = "train"
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: str = "adam"
    options: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False

    def __post_init__(self) -> None:
        for name in ("accumulation", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.mode == "inference" and self.accumulation > 1:
            raise ValueError(f"accumulation must be 1 in inference, got {self.accumulation}")

    @property
    def training(self) -> bool:
        return self.mode == "train"

    @property
    def compute_bytes(self) -> int:
        """Of a value that goes into a product."""
        return DTYPE_BYTES[self.precision]

    @property
    def parameter_bytes(self) -> int:
        return 4 if self.training else self.compute_bytes

    def images(self, devices: int) -> int:
        """Of one part of one device's share. ValueError where the batch cannot be cut so."""
        if self.batch_size % (devices * self.accumulation):
            raise ValueError(
                f"the batch size must be a multiple of devices x accumulation, got {self.batch_size} and {devices} x "
                f"{self.accumulation}"
            )
        return self.batch_size // devices // self.accumulation


@dataclass(frozen=True)
class Routed:
    """One sparse layer's requests in one part of a device's batch.

    kept: rows that the experts compute on segments, at most: what the tokens ask for and there are places for. places:
    rows of all buffers, E*G*C. largest: rows of one expert at most. k: requests per token (top_k).
    """

    kept: int
    places: int
    largest: int
    k: int


def routed(config: ModelConfig, layer: int, images: int) -> Routed:
    """For sparse layer `layer` and so many images; ensemble copies are counted in."""
    moe, setting = config.moe, config.moe.routing(layer)
    per_image = config.num_tokens * config.ensemble_size
    tokens = images * per_image
    if moe.router == "soft":
        slots = slots_per_expert(config=moe, num_tokens=config.num_tokens)
        size = moe.group_size if isinstance(moe.group_size, int) else config.num_tokens
        rows = tokens // size * slots
        return Routed(rows * moe.num_experts, rows * moe.num_experts, rows, 1)
    size = per_image if moe.group_size == "image" else tokens if moe.group_size == "batch" else int(moe.group_size)
    if tokens % size:
        raise ValueError(f"group_size must divide the tokens of a part of the batch, got {size} and {tokens}")
    groups, k = tokens // size, setting.num_selected_experts
    choosing = moe.router == "expert_choice"
    asked = size if choosing else size * k
    capacity = rounded_capacity(
        asked, moe.num_experts, setting.capacity_factor, moe.capacity_ceil_or_round, moe.capacity_multiple_of
    )
    places = moe.num_experts * groups * capacity
    kept = moe.num_experts * groups * min(capacity, size) if choosing else min(tokens * k, places)
    return Routed(kept, places, groups * min(capacity, size), 0 if choosing else k)


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
