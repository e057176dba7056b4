"""The processes of one job, as torchrun starts them; without torchrun a job is one process and nothing here does a
thing."""

import contextlib
import ctypes
import datetime
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from visionmoe.distributed import LAUNCHED
from visionmoe.files import one_line

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: all processes of the job
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
TIMEOUT = datetime.timedelta(minutes=10)  # of one collective call: then a rank is taken to be lost
_LOST = ("connection closed by peer", "connection reset", "connection refused", "broken pipe", "timed out waiting",
         "ncclremoteerror", "remote process")  # fmt: skip


class LostRankError(RuntimeError):
    """Another process of the job is gone, so this one cannot go on."""


@dataclass(frozen=True)
class World:
    """rank of `size` processes; local_rank among those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def requested() -> World:
    """What torchrun's environment variables say; one process without them. ValueError for a broken environment."""
    if "RANK" not in os.environ:
        return World()
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        raise ValueError(
            "RANK is set, so WORLD_SIZE and LOCAL_RANK must be integers, too: start with torchrun"
        ) from None
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be between 0 and WORLD_SIZE - 1, got {rank} of {size}")
    return World(rank, size, local)


def current() -> World:
    """The job that this process has joined; one process where it has not."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None or "auto": a GPU where there is one. ValueError for one that is not there."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    if device.type == "meta":
        raise ValueError(f"device {name!r} cannot be used: it computes nothing")
    return device


def own_device(device: torch.device) -> torch.device:
    """The device of this process: "cuda" is the GPU of its local rank where torchrun started it.

    ValueError where it has none of its own.
    """
    job = requested()
    if device.type != "cuda" or job.size == 1:
        return device
    if device.index is not None:
        raise ValueError(f"several processes cannot share {device}: device must be cuda, for each its own")
    if job.local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {job.local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", job.local_rank)


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Joins the job that torchrun started, and leaves it at the end. NCCL between GPUs, gloo between CPUs.

    In a process that has joined already, or was not started by torchrun, it changes nothing. Errors of communication
    become LostRankErrors. The first rank that fails by a user's mistake or a lost rank raises it; the others that
    follow end with SystemExit and its exit code, so that one line is printed, not one per rank.
    """
    if dist.is_initialized() or requested().size == 1:
        yield current()
        return
    if LAUNCHED in os.environ:
        _end_with_parent()
    backend = "gloo"
    if torch.cuda.is_available() and requested().local_rank < torch.cuda.device_count():
        torch.cuda.set_device(requested().local_rank)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        with lost_ranks_named():
            yield current()
    except (ValueError, OSError, ModuleNotFoundError, LostRankError) as error:
        if store.add("visionmoe/failed", 1) > 1:
            raise SystemExit(int(store.get("visionmoe/exit_code"))) from error
        store.set("visionmoe/exit_code", "1" if isinstance(error, LostRankError) else "2")
        raise
    else:
        dist.destroy_process_group()  # after an error the process ends; NCCL would wait for ranks that do not come


def _end_with_parent() -> None:
    """SIGTERM when the process that started this one is gone, however and whenever it went (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ[LAUNCHED] != str(os.getppid()):
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Within it, an error of communication is a LostRankError of one line."""
    try:
        yield
    except RuntimeError as error:
        text = one_line(error)
        if isinstance(error, LostRankError) or not any(sign in text.lower() for sign in _LOST):
            raise
        raise LostRankError(
            f"rank {current().rank} of {current().size} stops: another process of the job has ended or does not answer"
        ) from error


def rank_of(group: Group) -> int:
    """This process's rank in a group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather(value: T, group: Group = None) -> list[T]:
    """Every process's `value` (small, plain Python), by rank, on every process of the group (None: of the job).
    Collective."""
    if size_of(group) == 1:
        return [value]
    values: list[T | None] = [None] * size_of(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def gather_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every process's tensor (on the CPU, of any shape and size), by rank, on every process. Collective."""
    world = current()
    if world.size == 1:
        return [tensor]
    found = []
    for rank, (shape, dtype) in enumerate(gather((tuple(tensor.shape), tensor.dtype))):
        found.append(tensor.contiguous() if rank == world.rank else torch.empty(shape, dtype=dtype))
        if found[-1].numel():
            dist.broadcast(found[-1], src=rank)
    return found


def tensor_of_first(tensor: torch.Tensor | None) -> torch.Tensor:
    """The first process's tensor (on the CPU), on every process; what the others give is not looked at. Collective."""
    tensor = tensor if current().is_first else None
    about = from_first(None if tensor is None else (tuple(tensor.shape), tensor.dtype))
    assert about is not None
    found = torch.empty(about[0], dtype=about[1]) if tensor is None else tensor.contiguous()
    if current().size > 1 and found.numel():
        dist.broadcast(found, src=0)
    return found


def sum_of_all(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes of tensors (on the CPU, of one shape), a new one on every process. Collective."""
    total = tensor.clone()
    if current().size > 1:
        dist.all_reduce(total)
    return total


def from_first(value: T) -> T:
    """The first process's `value` (small, plain Python), on every process. Collective."""
    if current().size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def first_before_others(when: bool = True) -> Iterator[None]:
    """The first process runs the body, then the others do: what it fetches from elsewhere they find. Collective.

    when: False runs it in all at the same time.
    """
    if when and not current().is_first:
        barrier()
    yield
    if when and current().is_first:
        barrier()


def barrier() -> None:
    """Waits until every process is here."""
    if current().size > 1:
        dist.barrier()
