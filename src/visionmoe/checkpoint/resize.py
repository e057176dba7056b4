"""Position embeddings for another number of patches."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pos_embed(
    pos_embed: Tensor | np.ndarray,
    num_tokens: int,
    *,
    old_grid: tuple[int, int] | None = None,
    new_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Resizes learned position embeddings (1, T, D) to (1, num_tokens, D); REFERENCE: scipy.ndimage.zoom, order 1.

    The grid part is interpolated linearly, corners map to corners; a class token's entry, in front, is kept.
    Grids are (rows, columns) of patches, by default squares: T = n*n (no class token) or n*n + 1 (class token).
    ValueError for grids that do not fit, or when only one of the two has a class token.
    """
    source = torch.from_numpy(pos_embed) if isinstance(pos_embed, np.ndarray) else pos_embed
    if source.ndim != 3 or source.shape[0] != 1 or source.shape[1] < 1:
        raise ValueError(f"pos_embed must be (1, T, D), got {tuple(source.shape)}")
    old, old_token = _grid(source.shape[1], old_grid, "old_grid")
    new, new_token = _grid(num_tokens, new_grid, "new_grid")
    if old_token != new_token:
        lost = "has a class token and the new one has not" if old_token else "has no class token and the new one has"
        raise ValueError(f"the old position embedding ({source.shape[1]} tokens) {lost} ({num_tokens} tokens)")
    if old == new:
        return source.clone()
    token, grid = source[:, : int(old_token)], source[:, int(old_token) :]
    image = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).double()  # (1, rows * columns, D) -> (1, D, rows, columns)
    resized = F.interpolate(image, size=new, mode="bilinear", align_corners=True)
    grid = resized.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(source.dtype)
    return torch.cat([token, grid], dim=1)


def _grid(num_tokens: int, grid: tuple[int, int] | None, name: str) -> tuple[tuple[int, int], bool]:
    """Rows and columns of patches, and whether a class token is in front."""
    if grid is not None:
        if min(grid) < 1 or num_tokens - grid[0] * grid[1] not in (0, 1):
            raise ValueError(f"{name} must have {num_tokens} or {num_tokens - 1} patches, got {grid[0]} x {grid[1]}")
        return (grid[0], grid[1]), num_tokens > grid[0] * grid[1]
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be >= 1, got {num_tokens}")
    for patches in (num_tokens, num_tokens - 1):
        side = math.isqrt(patches)
        if side * side == patches and side:
            return (side, side), patches < num_tokens
    raise ValueError(f"{num_tokens} tokens are neither a square of patches nor one with a class token; give {name}")
