"""Patches and their positions."""

import torch
from torch import Tensor, nn

from visionmoe.model.router import lecun_normal_


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each: a convolution whose stride is its kernel."""

    def __init__(self, in_channels: int, patch_hw: tuple[int, int], hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_hw, stride=patch_hw)

    def reset_parameters(self) -> None:
        lecun_normal_(self.proj.weight, fan_in=self.proj.weight[0].numel())
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> (B, H/ph * W/pw, D) in row-major order, and the grid."""
        channels, patch = self.proj.in_channels, self.proj.kernel_size
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be (B, {channels}, H, W), got {tuple(images.shape)}")
        if images.shape[2] % patch[0] or images.shape[3] % patch[1]:
            raise ValueError(
                f"images must be a multiple of the patch size {patch[0]} x {patch[1]}, "
                f"got {images.shape[2]} x {images.shape[3]}"
            )
        x = self.proj(images.to(self.proj.weight.dtype))
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def sincos2d(grid: tuple[int, int], hidden_size: int, device: torch.device | None = None) -> Tensor:
    """Fixed position embeddings (1, rows * columns, D), as in MoCo v3 (arXiv 2104.02057).

    omega_i = 10000^(-i / (D/4 - 1)); sin(x w), cos(x w), sin(y w), cos(y w), x the column and y the row.
    """
    quarter = hidden_size // 4
    omega = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=device) / (quarter - 1))
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None]
