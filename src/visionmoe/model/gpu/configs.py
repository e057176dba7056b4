"""Tile sizes of the Triton kernels: the candidates of the tuner, and which of them fit a shape and a device.

A tile of BLOCK_M x BLOCK_N does BLOCK_M * BLOCK_N / (BLOCK_M + BLOCK_N) operations per byte of bfloat16 that it loads:
64 for 128 x 128, 85 for 128 x 256. An H100 does 295 operations in the time of a byte from memory (989 TFLOP/s, 3.35
TB/s), so neighbouring tiles must find each other's rows and weights in the L2 cache.
"""

import functools
from typing import Any

import torch
import triton
from triton import Config

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Partial sums are stored per unit of this many rows or columns, whatever tile the tuner chose.
ROW_UNIT, COLUMN_UNIT = (16, 16) if INTERPRETED else (64, 64)
_SHARED_MEMORY_LEFT = 4096  # bytes that a kernel needs beside its tiles


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)


_SMALL_TEST = [
    _config(16, 32, 16, 4, 1)
]  # the interpreter runs one configuration: small, so that tests have many tiles
# Few rows per expert: inference on single images.
_THIN = [_config(16, 64, 128, 4, 4), _config(32, 64, 128, 4, 4)]
_ROWS = [
    _config(64, 64, 64, 4, 4),
    _config(64, 128, 64, 4, 4),
    _config(128, 64, 64, 4, 4),
    _config(128, 128, 32, 4, 4),
    _config(128, 128, 64, 4, 3),
    _config(128, 128, 64, 8, 4),
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(256, 128, 64, 8, 3),
    _config(64, 64, 32, 4, 3),  # fits float32 and the smaller GPUs
]

FORWARD_CONFIGS = _SMALL_TEST if INTERPRETED else _THIN + _ROWS
# Kernels that store sums per unit of rows and columns, so tiles are multiples of the units.
BACKWARD_CONFIGS = _SMALL_TEST if INTERPRETED else _ROWS
# The inner axis of weight gradients is the rows, of which there are many.
WEIGHT_CONFIGS = _SMALL_TEST if INTERPRETED else _ROWS


def prune(configs: list[Config], named: dict[str, Any], **rest: Any) -> list[Config]:
    """For `triton.autotune`: the candidates for these arguments of a kernel and this device.

    Reads the arguments a_ptr (a tensor of the products' dtype), ROWS (rows per expert), and those of M, N, K that the
    kernel has: the missing one is the axis of the rows.
    """
    values = named | rest
    sizes = tuple(values.get(axis, values["ROWS"]) for axis in ("M", "N", "K"))
    device = values["a_ptr"].device.index or 0
    return candidates(configs, sizes, values["a_ptr"].element_size(), shared_memory(device) - _SHARED_MEMORY_LEFT)


def candidates(configs: list[Config], sizes: tuple[int, ...], itemsize: int, memory: int) -> list[Config]:
    """Configurations whose tiles fit into `memory` bytes and suit the product's sizes (M, N, K); at least one.

    Tiles are less than twice a size, and not below 64 rows where there are many.
    """

    def size_of(config: Config) -> int:
        return shared_bytes(config, itemsize)

    def suits(config: Config) -> bool:
        blocks = [config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
        small = all(block < 2 * max(size, 32) for block, size in zip(blocks, sizes, strict=True))
        return small and (blocks[0] >= 64 or sizes[0] <= 512)

    fitting = [c for c in configs if size_of(c) <= memory] or [min(configs, key=size_of)]
    return [c for c in fitting if suits(c)] or [min(fitting, key=size_of)]


def shared_bytes(config: Config, itemsize: int) -> int:
    """Shared memory of the tiles of one configuration's pipeline, in bytes."""
    m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return config.num_stages * (m + n) * k * itemsize


@functools.cache
def shared_memory(device: int) -> int:
    """Shared memory that one program may use on this CUDA device, in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the attribute
    return properties.shared_memory_per_block_optin


def bucket(rows: int, experts: int) -> int:
    """Rows per expert rounded up to a power of two: one tuning for all batches of about one size."""
    return triton.next_power_of_2(max(16, triton.cdiv(rows, experts)))
