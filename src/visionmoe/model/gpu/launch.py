"""Calls of the Triton kernels: memory for their results, grids, constants. Nothing here waits for the device."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from visionmoe.model.gpu import products, reductions
from visionmoe.model.gpu.configs import COLUMN_UNIT, ROW_UNIT, bucket


class Rows(NamedTuple):
    """The schedule of the P rows, see `schedule.Schedule`."""

    offsets: Tensor
    token: Tensor
    weights: Tensor
    rows_of_token: Tensor

    @property
    def experts(self) -> int:
        return self.rows_of_token.shape[1]

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """Arguments that all products over rows take; dtype: of their operands."""
        experts = self.experts
        return {
            "ROWS": bucket(len(self.token), experts),
            "E": experts,
            "E_LANES": triton.next_power_of_2(max(2, experts)),
            "PRECISION": precision(dtype),
        }


def first(tokens: Tensor, rows: Rows, weight: Tensor, bias: Tensor, tanh: bool, save: bool) -> tuple[Tensor, Tensor]:
    """tokens (N, D), weight (E, F, D), bias (E, F) -> hidden (P, F) times the combine weight; before GELU (P, F), or
    (0, F) unless `save`."""
    width, size = weight.shape[1], len(rows.token)
    hidden = tokens.new_empty(size, width)
    before = tokens.new_empty(size if save else 0, width)
    with _on(tokens):
        products.first_kernel[_row_grid(rows, width)](
            tokens, weight, bias, rows.token, rows.weights, rows.offsets, before if save else hidden, hidden, size,
            N=width, K=weight.shape[2], TANH=tanh, SAVE=save, **rows.constants(tokens.dtype),
        )  # fmt: skip
    return hidden, before


def second(a: Tensor, rows: Rows, weight: Tensor, bias: Tensor | None, out_features_last: bool) -> Tensor:
    """a (P, K), weight (E, N, K), or (E, K, N) if `out_features_last` -> (P, N); bias (E, N) times combine weights."""
    width = weight.shape[2 if out_features_last else 1]
    out = a.new_empty(len(a), width)
    with _on(a):
        products.second_kernel[_row_grid(rows, width)](
            a, weight, weight if bias is None else bias, rows.weights, rows.offsets, out, len(a),
            N=width, K=a.shape[1], K_LAST=not out_features_last, BIAS=bias is not None, **rows.constants(a.dtype),
        )  # fmt: skip
    return out


def combine(values: Tensor, rows: Rows) -> Tensor:
    """values (P, D) -> (N, D), the sum of each token's rows."""
    num_tokens, dim = len(rows.rows_of_token), values.shape[1]
    out = values.new_empty(num_tokens, dim)
    block_t, block_d = 8, min(256, triton.next_power_of_2(dim))
    with _on(values):
        reductions.combine_kernel[triton.cdiv(num_tokens, block_t), triton.cdiv(dim, block_d)](
            values, rows.rows_of_token, out, num_tokens, E=rows.experts, D=dim, BLOCK_T=block_t, BLOCK_D=block_d
        )
    return out


class BackwardRows(NamedTuple):
    """grad_before, hidden (P, F), the latter times the combine weight; grad_weights (P,), 0 for unused rows;
    bias1_sums (units, F) and bias2_sums (units, D) per unit of rows."""

    grad_before: Tensor
    hidden: Tensor
    grad_weights: Tensor
    bias1_sums: Tensor
    bias2_sums: Tensor


def first_backward(grad: Tensor, rows: Rows, weight: Tensor, bias: Tensor, before: Tensor, tanh: bool) -> BackwardRows:
    """grad (N, D): of the output; weight (E, D, F) and bias (E, D) of the second layer; before (P, F)."""
    (size, width), dim, experts = before.shape, grad.shape[1], rows.experts
    units = size // ROW_UNIT + experts
    dots = grad.new_empty(size, triton.cdiv(width, COLUMN_UNIT) + 1, dtype=torch.float32)
    grad_before, hidden = torch.empty_like(before), torch.empty_like(before)
    bias1_sums = grad.new_empty(units, width, dtype=torch.float32)
    bias2_sums = grad.new_empty(units, dim, dtype=torch.float32)
    constants = rows.constants(grad.dtype)
    with _on(grad):
        products.first_backward_kernel[_row_grid(rows, width)](
            grad, weight, rows.token, rows.weights, rows.offsets, before, grad_before, hidden, dots, bias1_sums, size,
            N=width, K=dim, TANH=tanh, ROW_UNIT=ROW_UNIT, COLUMN_UNIT=COLUMN_UNIT, DOTS=dots.shape[1], **constants,
        )  # fmt: skip
        reductions.second_bias_kernel[(triton.cdiv(size, ROW_UNIT) + experts,)](
            grad, bias, rows.token, rows.weights, rows.offsets, dots, bias2_sums, E=experts,
            E_LANES=constants["E_LANES"], D=dim, DOTS=dots.shape[1], ROW_UNIT=ROW_UNIT,
            BLOCK_D=min(128, triton.next_power_of_2(dim)),
        )  # fmt: skip
    used = torch.arange(size, device=grad.device) < rows.offsets[-1]
    grad_weights = torch.where(used, dots.sum(dim=1), 0.0).to(rows.weights.dtype)
    return BackwardRows(grad_before, hidden, grad_weights, bias1_sums, bias2_sums)


def weight_gradient(a: Tensor, b: Tensor, rows: Rows, gathered: str, dtype: torch.dtype) -> Tensor:
    """Sum over each expert's rows of a (., M) times b (., N); `gathered`, "a" or "b", has tokens instead of rows."""
    m, n = a.shape[1], b.shape[1]
    out = a.new_empty(rows.experts, m, n, dtype=dtype)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (rows.experts * triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    with _on(a):
        products.weight_gradient_kernel[grid](
            a, b, rows.token, rows.offsets, out, ROWS=bucket(len(rows.token), rows.experts), M=m, N=n,
            GATHER_A=gathered == "a", PRECISION=precision(a.dtype),
        )  # fmt: skip
    return out


def sum_units(sums: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """sums (units, N) -> (E, N)."""
    width = sums.shape[1]
    out = sums.new_empty(rows.experts, width, dtype=dtype)
    block_n = min(64, triton.next_power_of_2(width))
    with _on(sums):
        reductions.sum_units_kernel[rows.experts, triton.cdiv(width, block_n)](
            sums, rows.offsets, out, N=width, ROW_UNIT=ROW_UNIT, BLOCK_U=32, BLOCK_N=block_n
        )
    return out


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless torch's own products may use TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _row_grid(rows: Rows, width: int):  # type: ignore[no-untyped-def]
    def grid(meta: dict[str, int]) -> tuple[int]:
        most = triton.cdiv(len(rows.token), meta["BLOCK_M"]) + rows.experts
        return (most * triton.cdiv(width, meta["BLOCK_N"]),)

    return grid


@contextlib.contextmanager
def _on(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device; the interpreter on none."""
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield
