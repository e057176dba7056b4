"""bfloat16 training on a CPU: products, attention and GELU in the forms that oneDNN runs fast.

Equal to torch's own operations to rounding, forward and backward; without second derivatives. Where they are used is
decided by device and dtype (`applies`), never by a timing. benchmarks/LOG.md has the measurements.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionmoe.model import packed

MAX_TOKENS = 256  # of attention whose probabilities are kept; they are no more than q, k and v with heads of 64
_LANES = 16
_PART = 32
_CONVOLUTION: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def applies(x: Tensor) -> bool:
    """Whether an operation on x is to be one of this module: in bfloat16 on a CPU, in eager mode."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or type(x) is not Tensor:
        return False
    return packed.available() and not torch.compiler.is_compiling() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def transposed(rows: Tensor) -> Tensor:
    """(R, C) -> (C, R), contiguous: a few rows at a time, which is three times as fast as all at once."""
    out = rows.new_empty(rows.shape[1], rows.shape[0])
    for start in range(0, len(rows), _PART):
        out[:, start : start + _PART] = rows[start : start + _PART].t()
    return out


def left_factor(grad_out: Tensor) -> Tensor:
    """grad_out.t(), the left factor of a linear layer's weight gradient. (R, out) -> (out, R).

    oneDNN reads a transposed matrix there so slowly that transposing it beforehand halves the time.
    """
    return transposed(grad_out) if applies(grad_out) else grad_out.t()


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU of (R, F), no gradients: oneDNN's, behind a convolution by 1, takes a third of the time of torch's."""
    if not applies(x) or x.shape[1] % _LANES or _CONVOLUTION is None:
        return F.gelu(x, approximate=approximate)
    pixels = x.view(1, len(x), -1, _LANES).permute(0, 3, 1, 2)  # (1, 16, R, F / 16), channels last
    one = x.new_ones(_LANES, 1, 1, 1)
    out = _CONVOLUTION(pixels, one, None, [0, 0], [1, 1], [1, 1], _LANES, "gelu", [], approximate)
    return out.permute(0, 2, 3, 1).reshape(x.shape)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. (B, H, T, d) three times -> (B, H, T, d)."""
    if applies(q) and torch.is_grad_enabled() and q.shape[2] <= MAX_TOKENS:
        return _Attention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class _Attention(torch.autograd.Function):
    """Keeps the probabilities; torch's backward pass makes them again, and runs at a tenth of the products' rate.

    Scores and softmax are in float32, as in torch's.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)
            probabilities = torch.softmax(scores, dim=-1).to(q.dtype)
            ctx.save_for_backward(q, k, v, probabilities)
            return probabilities @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, probabilities = ctx.saved_tensors
        grad_v = probabilities.transpose(2, 3) @ grad
        grad_scores = torch.ops.aten._softmax_backward_data(grad @ v.transpose(2, 3), probabilities, -1, q.dtype)
        grad_scores *= q.shape[-1] ** -0.5
        return grad_scores @ k, grad_scores.transpose(2, 3) @ q, grad_v
