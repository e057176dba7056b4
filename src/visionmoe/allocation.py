"""How the C library's allocator treats the memory that torch frees on a CPU."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def give_back_freed_memory() -> None:
    """To the system, what glibc has kept."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_freed_memory() -> None:
    """glibc keeps freed blocks below 1 GiB for the next ones, and does not give them back to the system each time.

    Else the pages of every large activation are cleared anew in every step (benchmarks/LOG.md has what that costs, and
    what it costs in memory).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
