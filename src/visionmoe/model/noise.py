"""Router noise that does not depend on how a batch is divided over processes and parts.

Every row of a global batch has its own place in one stream of normal numbers, so a process that holds some rows draws
what one process with all of them would draw for these rows.
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # SplitMix64's, as int64
_UNIT = 2.0**-24


def normal_like(logits: Tensor, tokens: int, first_token: Tensor | int) -> Tensor:
    """Independent standard normal numbers, float32, of the shape of `logits`: those of `tokens` tokens, in order.

    They follow from torch's generator of the device (one draw) and the tokens' numbers in the global batch, of which
    the first is first_token. Processes with equal generators get slices of the same numbers. Box-Muller over a counter
    that is scrambled as in SplitMix64 (Steele et al., 2014).
    """
    return _normal(tokens, logits.numel() // tokens, first_token, logits.device).view(logits.shape)


def _normal(rows: int, width: int, first_row: Tensor | int, device: torch.device) -> Tensor:
    """(rows, width)"""
    pairs = (width + 1) // 2
    key = torch.randint(-(2**62), 2**62, (), device=device)
    counter = torch.arange(rows * pairs, device=device) + first_row * pairs
    bits = _scramble(counter * _MULTIPLIERS[0] + key)
    radius = ((bits & 0xFFFFFF).float() + 0.5).mul_(_UNIT).log_().mul_(-2.0).sqrt_()
    angle = ((bits >> 24) & 0xFFFFFF).float().mul_(2 * math.pi * _UNIT)
    both = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=-1)
    return both.view(rows, 2 * pairs)[:, :width]


def _scramble(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; its shifts fill with zeros, so those of torch are masked."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MULTIPLIERS[1]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MULTIPLIERS[2]
    return x ^ ((x >> 31) & (2**33 - 1))
