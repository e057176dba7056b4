"""The typed configuration of images: where they come from and what is done to them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

MAX_PIXELS = 178_956_970  # Pillow's own limit: what decodes to 512 MiB of RGB


@dataclass(frozen=True)
class DataConfig:
    """Which images a run reads, and how they become batches. Sizes are in pixels.

    source: "fashion-mnist", "folder:PATH", "parquet:PATH", "wds:SHARDS", "torchvision:NAME", "hf:NAME" or
    "hf-stream:NAME"; see `sources.open_source`. Images of shards and of large parquet files are shuffled so that few
    pieces are read at a time; see `order`.
    train_split, eval_split: names with an optional slice, as "train[:99%]"; see `splits`.
    image_size: one number or (height, width). in_channels: 1 (grey) or 3 (RGB).
    batch_size: images per step of all processes together. workers: processes that prepare images, 0: none.
    crop: what training makes of an image before the flip: "inception" (random area from crop_area_min to 1, aspect 3/4
    to 4/3), "pad" (resized, crop_padding black pixels around it, random crop) or "resize" (resized only).
    randaugment_ops, randaugment_magnitude: the reference's RandAugment(ops, magnitude); 0 ops: none.
    mixup_alpha: concentration of the mixing weights, 0: no mixup. The training step mixes, not the loader.
    eval_resize: None resizes to image_size (the reference's way); a number resizes the smaller side to it and crops the
    centre.
    max_broken: share of broken images that stops a run. max_pixels: an image that declares more counts as broken.
    cache_mb: memory in which decoded images of small data sets are kept, 0: none.
    """

    source: str = "fashion-mnist"
    train_split: str = "train"
    eval_split: str = "test"
    image_size: int | tuple[int, int] = 28
    in_channels: int = 1
    batch_size: int = 256
    eval_batch_size: int = 256
    workers: int = 0
    crop: Literal["inception", "pad", "resize"] = "pad"
    crop_area_min: float = 0.05
    crop_padding: int = 2
    flip: bool = True
    randaugment_ops: int = 0
    randaugment_magnitude: float = 10.0
    mixup_alpha: float = 0.0
    eval_resize: int | None = None
    max_broken: float = 0.01
    max_pixels: int = MAX_PIXELS
    cache_mb: int = 1024

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (RGB), got {self.in_channels}")
        if self.crop not in ("inception", "pad", "resize"):
            raise ValueError(f"crop must be one of inception, pad, resize, got {self.crop!r}")
        for size in self.image_hw:
            _between("image_size", size, 1, 65535)
        for name in ("batch_size", "eval_batch_size"):
            _between(name, getattr(self, name), 1, 2**31)
        for name in ("workers", "crop_padding", "randaugment_ops", "cache_mb"):
            _between(name, getattr(self, name), 0, 2**31)
        _between("crop_area_min", self.crop_area_min, 1e-6, 1)
        _between("randaugment_magnitude", self.randaugment_magnitude, 0, 30)
        _between("mixup_alpha", self.mixup_alpha, 0, 1e6)
        _between("max_broken", self.max_broken, 0, 1)
        _between("max_pixels", self.max_pixels, 1, MAX_PIXELS)
        if self.eval_resize is not None and self.eval_resize < max(self.image_hw):
            raise ValueError(f"eval_resize must be at least image_size {self.image_size}, got {self.eval_resize}")

    def at_size(self, image_size: int | tuple[int, int]) -> "DataConfig":
        """The same images at another size; eval_resize, where it is set, keeps its proportion to it."""
        new = dataclasses.replace(self, image_size=image_size, eval_resize=None)
        if self.eval_resize is None:
            return new
        return dataclasses.replace(new, eval_resize=round(self.eval_resize * max(new.image_hw) / max(self.image_hw)))

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width)"""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


def _between(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be between {lowest} and {highest}, got {value}")
