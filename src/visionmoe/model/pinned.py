"""Weights from the host's memory to a GPU, one expert's while the one before it computes."""

from collections.abc import Iterator

import torch
from torch import Tensor

Expert = tuple[int, Tensor, Tensor]


class _Slot:
    """Room for one expert: pinned memory on the host, memory on the device, and who is done with them."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.host = [torch.empty(size, dtype=dtype, pin_memory=True) for size in sizes]
        self.device = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
        self.arrived, self.used = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, weights: tuple[Tensor, ...], side: torch.cuda.Stream) -> list[Tensor]:
        """Starts the copy on `side` and returns the device's tensors, valid behind `arrived`."""
        self.arrived.synchronize()  # the host's memory is still being read otherwise; at once where never recorded
        for host, weight in zip(self.host, weights, strict=True):
            host.copy_(weight.reshape(-1))
        side.wait_event(self.used)
        with torch.cuda.stream(side):
            for device, host in zip(self.device, self.host, strict=True):
                device.copy_(host, non_blocking=True)
            self.arrived.record(side)
        return [device.view(weight.shape) for device, weight in zip(self.device, weights, strict=True)]


def copied(experts: Iterator[Expert], device: torch.device, dtype: torch.dtype) -> Iterator[Expert]:
    """The same experts on a CUDA device, in `dtype`, through pinned memory and a stream of its own.

    Two experts' weights are on the device. Kernels are queued, so the host copies an expert while another computes.
    """
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    slots: list[_Slot] = []
    for number, (expert, *weights) in enumerate(experts):
        if number < 2:
            slots.append(_Slot(tuple(weight.numel() for weight in weights), device, dtype))
        slot = slots[number % 2]
        first, second = slot.fill(tuple(weights), side)
        main.wait_event(slot.arrived)
        yield expert, first, second
        slot.used.record(main)
    main.synchronize()  # the slots' memory goes back to the allocator, which knows nothing of `side`
