"""How the processes of a job share a model: data parallel, fully sharded, experts split, and their products."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Layout:
    """dp groups of processes with a whole copy of the model each; within a group the dense parameters are sharded over
    fsdp * ep processes where fsdp > 1 (copied to all where it is 1), and the experts split over ep. Every process has
    its own images. Ranks count ep fastest, then fsdp, then dp, so that tokens travel between neighbours.
    """

    dp: int = 1
    fsdp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"parallel: {field.name} must be >= 1, got {getattr(self, field.name)}")

    @property
    def size(self) -> int:
        return self.dp * self.fsdp * self.ep

    @property
    def dense_shards(self) -> int:
        """Processes over which a dense parameter is divided."""
        return self.fsdp * self.ep if self.fsdp > 1 else 1

    @property
    def expert_shards(self) -> int:
        """Processes over which the experts of a layer are divided."""
        return self.fsdp * self.ep

    def __str__(self) -> str:
        return f"dp={self.dp},fsdp={self.fsdp},ep={self.ep}"

    @classmethod
    def parse(
        cls, text: str | None, processes: int | None = None, hint: str = "start as many with torchrun or --nproc"
    ) -> Self:
        """From a text such as "dp=2,ep=2"; None: all processes are data parallel. A missing dp follows from the others.

        processes: of the job; None: as many as the text says. ValueError for another text, or one whose product is not
        the number of processes; hint: what to do about that.
        """
        names, given = [field.name for field in fields(cls)], {}
        for part in filter(None, (part.strip() for part in (text or "").split(","))):
            name, _, number = part.partition("=")
            if name not in names or not number.isdecimal() or name in given:
                raise ValueError(f"parallel must be like dp=2,fsdp=2,ep=2 (each once, in numbers), got {text!r}")
            given[name] = int(number)
        rest = cls(**{"dp": 1} | given)
        if processes is None:
            return rest
        if "dp" not in given and processes % rest.size == 0:
            given["dp"] = processes // rest.size
        layout = cls(**given)
        if layout.size != processes:
            raise ValueError(f"parallel {text!r} is for {layout.size} processes, but the job has {processes}: {hint}")
        return layout

    @classmethod
    def every(cls, processes: int) -> list[Self]:
        """All layouts of so many processes, those with few parts of the experts first."""
        return [
            cls(processes // ep // fsdp, fsdp, ep) for ep in _divisors(processes) for fsdp in _divisors(processes // ep)
        ]

    def check(self, *, num_experts: int, widths: tuple[int, int]) -> None:
        """ValueError where it does not fit a model. num_experts: per layer, 0: none. widths: the experts' (D, F)."""
        if self.ep > 1 and not num_experts:
            raise ValueError(f"parallel: ep={self.ep} splits experts, but the model has none")
        if num_experts % self.ep:
            raise ValueError(f"parallel: ep must divide the {num_experts} experts, got {self.ep}")
        if self.ep > 1 and any(width % self.fsdp for width in widths):
            raise ValueError(f"parallel: fsdp beside ep must divide the experts' widths {widths}, got {self.fsdp}")

    def meshes(self, device: torch.device) -> "Meshes":
        """Collective: every process of the job takes part."""
        whole = init_device_mesh(device.type, (self.dp, self.fsdp, self.ep), mesh_dim_names=("dp", "fsdp", "ep"))
        ranks = torch.arange(self.size).view(self.dp, self.fsdp * self.ep)
        return Meshes(whole, DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard")))


@dataclass(frozen=True)
class Meshes:
    """whole: (dp, fsdp, ep). dense: (replicate, shard), over which FSDP lays out what is not an expert."""

    whole: DeviceMesh
    dense: DeviceMesh


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
