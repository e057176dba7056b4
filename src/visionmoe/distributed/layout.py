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

    @classmethod
    def parse(cls, text: str | None, processes: int) -> Self:
        """From a text such as "dp=2,ep=2"; None: all processes are data parallel. A missing dp follows from the others.

        ValueError for another text, or one whose product is not the number of processes.
        """
        names, given = [field.name for field in fields(cls)], {}
        for part in filter(None, (part.strip() for part in (text or "").split(","))):
            name, _, number = part.partition("=")
            if name not in names or not number.isdecimal() or name in given:
                raise ValueError(f"parallel must be like dp=2,fsdp=2,ep=2 (each once, in numbers), got {text!r}")
            given[name] = int(number)
        rest = cls(**{"dp": 1} | given)
        if "dp" not in given and processes % rest.size == 0:
            given["dp"] = processes // rest.size
        layout = cls(**given)
        if layout.size != processes:
            raise ValueError(
                f"parallel {text!r} is for {layout.size} processes, but the job has {processes}: start as many with "
                "torchrun or --nproc"
            )
        return layout

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
