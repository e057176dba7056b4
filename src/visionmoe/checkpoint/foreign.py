"""Parameters of other libraries' dense ViTs as a `Source`: names, joined matrices, and what is folded into weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionmoe.checkpoint.errors import CheckpointError, MissingFileError, printable
from visionmoe.checkpoint.mapping import compare, complain, our_shapes
from visionmoe.config import ModelConfig
from visionmoe.model.pretrained import Preprocessing

_SHOWN = 3  # names in an error


class StateTensors:
    """Tensors by name: of a file (read one by one when they are needed) or in memory. where: for errors."""

    def __init__(self, tensors: Mapping[str, Tensor] | Path, where: str) -> None:
        self.where = where
        self._tensors = tensors if isinstance(tensors, Mapping) else None
        self._path = None if isinstance(tensors, Mapping) else tensors
        if self._tensors is not None:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
            return
        assert self._path is not None
        if not self._path.is_file():
            raise MissingFileError(f"{self._path} is missing; only safetensors files are read, nothing is unpickled")
        try:
            with safe_open(self._path, "pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self._path} is not a valid safetensors file: {error}") from None

    def length(self, name: str) -> int:
        """Of axis 0; ValueError for a scalar."""
        if not self.shapes[name]:
            raise ValueError(f"{self.where}: {name} must have axes, got a scalar")
        return self.shapes[name][0]

    def read(self, name: str) -> Tensor:
        if self._tensors is not None:
            return self._tensors[name].detach().cpu()
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class Entry:
    """Where one of our parameters is: tensors joined on axis 0; none of them: zeros.

    scale: a vector over axis 0 by which it is multiplied (layer-scale, which follows the last linear layer of a
    branch and is one with it). zero_row: zeros in front of axis 1 (positions that leave the class token out).
    """

    names: tuple[str, ...]
    scale: str | None = None
    zero_row: bool = False


@dataclass(frozen=True)
class Normalization:
    """What the source's images are: (p - mean) / std for pixels p in [0, 1]; one number per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ForeignSource:
    """Parameters of a dense ViT under other names; see `visionmoe.checkpoint.sources.Source`.

    kind: the library. normalization is folded into the patch embedding, which is linear and has no padding, so that
    images in [-1, 1] give what the source gives for its own. original: the source's own model, where there is one:
    images (B, C, H, W) in [-1, 1] -> its outputs.
    """

    def __init__(
        self,
        kind: str,
        tensors: StateTensors,
        config: ModelConfig,
        entries: Mapping[str, Entry],
        normalization: Normalization,
        unused: Iterable[str] = (),
        original: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.kind, self.config, self.normalization, self.original = kind, config, normalization, original
        self.preprocessing = Preprocessing.of(config)
        self.class_names: tuple[str, ...] | None = None
        self._tensors, self._entries = tensors, entries
        self._check_channels()
        self._check_all_used(unused)

    def check(self, left_out: Iterable[str]) -> None:
        ignored = set(left_out)
        wanted = {n: s for n, s in our_shapes(self.config).items() if n.split(".")[0] not in ignored}
        found = {}
        for name, shape in wanted.items():
            entry = self._entries.get(name)
            if entry is None or any(n not in self._tensors.shapes for n in entry.names):
                continue
            found[name] = self._shape(entry) if entry.names else shape
            scale = self._tensors.shapes[entry.scale] if entry.scale else shape[:1]
            if scale != shape[:1]:
                raise ValueError(f"{self._tensors.where}: {entry.scale} must be {shape[:1]}, got {scale}")
        complain(self._tensors.where, compare(found, wanted))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32  # folded and joined values are computed; all are given in this one

    def fill(self, state: Mapping[str, Tensor]) -> None:
        for name, target in state.items():
            if name == "patch_embed.proj.weight":
                target.copy_(fold_weight(self._value(name, target), self.normalization))
            elif name == "patch_embed.proj.bias":
                kernel = self._tensors.read(self._entries["patch_embed.proj.weight"].names[0])
                target.copy_(fold_bias(kernel, self._value(name, target), self.normalization))
            else:
                target.copy_(self._value(name, target))

    def _value(self, name: str, target: Tensor) -> Tensor:
        entry = self._entries[name]
        if not entry.names:
            return torch.zeros_like(target)
        parts = [self._tensors.read(n) for n in entry.names]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if entry.scale is not None:
            scale = self._tensors.read(entry.scale).float()
            value = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        if entry.zero_row:
            value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        return value

    def _shape(self, entry: Entry) -> tuple[int, ...]:
        """ValueError where the tensors cannot be joined."""
        shapes = [self._tensors.shapes[name] for name in entry.names]
        if any(len(s) <= entry.zero_row or s[1:] != shapes[0][1:] for s in shapes):
            given = ", ".join(f"{name} {shape}" for name, shape in zip(entry.names, shapes, strict=True))
            raise ValueError(f"{self._tensors.where} has parameters of shapes that do not fit: {given}")
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        return (shape[0], shape[1] + 1, *shape[2:]) if entry.zero_row else shape

    def _check_channels(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self.normalization, name)
            if len(values) != self.config.in_channels:
                raise ValueError(f"{name} must have {self.config.in_channels} numbers, one per channel, got {values}")
        if min(self.normalization.std) <= 0:
            raise ValueError(f"std must be > 0, got {self.normalization.std}")

    def _check_all_used(self, unused: Iterable[str]) -> None:
        """A tensor that no entry reads is a part of the source's model that ours has not."""
        used = set(unused)
        for entry in self._entries.values():
            used |= {*entry.names, *([entry.scale] if entry.scale else [])}
        extra = [name for name in self._tensors.shapes if name not in used]
        if extra:
            more = f" and {len(extra) - _SHOWN} more" if len(extra) > _SHOWN else ""
            raise ValueError(
                f"{self._tensors.where} is no plain ViT: this package's model has no "
                f"{printable(', '.join(extra[:_SHOWN]))}{more}"
            )


def fold_weight(weight: Tensor, normalization: Normalization) -> Tensor:
    """The patch kernel (D, C, h, w) for images x in [-1, 1]: (p - mean) / std = x * 0.5 / std + (0.5 - mean) / std."""
    std = torch.tensor(normalization.std, dtype=torch.float64).view(1, -1, 1, 1)
    return weight.double() * (0.5 / std)


def fold_bias(weight: Tensor, bias: Tensor, normalization: Normalization) -> Tensor:
    """The bias (D,) that belongs to `fold_weight`; weight: the kernel before it was folded."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (normalization.mean, normalization.std))
    return bias.double() + (weight.double() * ((0.5 - mean) / std).view(1, -1, 1, 1)).sum(dim=(1, 2, 3))


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Images in [-1, 1] as the source wants them. (B, C, H, W) -> (B, C, H, W)."""
    mean, std = (torch.tensor(v, dtype=images.dtype).view(1, -1, 1, 1) for v in (normalization.mean, normalization.std))
    return ((images + 1) / 2 - mean) / std
