"""Which way the experts run where nobody chose: by device, dtype and shape. See `visionmoe.model.dispatch`."""

import functools
import importlib.util
import os
import shutil
from typing import Literal

import torch
from torch import Tensor

Dispatch = Literal["segments", "buffers", "grouped", "triton"]


def choose_dispatch(tokens: Tensor, width: int) -> Dispatch:
    """For tokens (N, D) as the experts get them, and experts of this width F."""
    if tokens.device.type == "cpu":
        return "buffers" if torch.compiler.is_compiling() else "segments"
    if tokens.device.type != "cuda" or torch.compiler.is_exporting():
        return "buffers"  # exported programs hold nothing but torch's own operators
    capability, triton, grouped_mm = _abilities(tokens.device.index or 0)
    return choose_on_cuda(capability, triton, grouped_mm, tokens.dtype, (tokens.shape[1], width))


def choose_on_cuda(
    capability: tuple[int, int], triton: bool, grouped_mm: bool, dtype: torch.dtype, sizes: tuple[int, int]
) -> Dispatch:
    """capability: of the device, (0, 0) where it is not NVIDIA's; triton, grouped_mm: there or not; sizes: (D, F)."""
    if triton and capability >= (8, 0) and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return "triton"
    # Elsewhere torch's grouped product is a loop that brings the offsets to the host, or refuses.
    if grouped_mm and capability[0] in (9, 10) and dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes):
        return "grouped"
    return "buffers"


@torch.compiler.assume_constant_result
def _abilities(device: int) -> tuple[tuple[int, int], bool, bool]:
    """Capability, Triton, grouped_mm; device: number of the CUDA device."""
    return _asked_once(device)


@functools.cache
def _asked_once(device: int) -> tuple[tuple[int, int], bool, bool]:
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # Triton builds its launcher by it
    triton = importlib.util.find_spec("triton") is not None and compiler is not None
    return capability, triton, hasattr(torch.nn.functional, "grouped_mm")
