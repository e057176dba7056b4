"""Sums that follow the products, each in a fixed order so that equal inputs give equal bits. Triton kernels."""

import triton
import triton.language as tl

from visionmoe.model.gpu.tiles import find_tile


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    rows_ptr,
    table_ptr,
    out_ptr,
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows (P, D), table (tokens, E): row numbers or -1 -> out (tokens, D), the sum of each token's rows by expert."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for expert in range(E):
        row = tl.load(table_ptr + token.to(tl.int64) * E + expert, mask=token < num_tokens, other=-1)
        mask = (row >= 0)[:, None] & (column < D)[None, :]
        acc += tl.load(rows_ptr + row.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    place = token.to(tl.int64)[:, None] * D + column[None, :]
    mask = (token < num_tokens)[:, None] & (column < D)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def second_bias_kernel(
    grad_ptr,
    bias_ptr,
    token_ptr,
    weight_ptr,
    offsets_ptr,
    dots_ptr,
    bias_sums_ptr,
    E: tl.constexpr,
    E_LANES: tl.constexpr,
    D: tl.constexpr,
    DOTS: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad (tokens, D): gradient of the output; bias (E, D): b2. One unit of rows per program.

    Writes gradient . b2 of every row in the last column of dots (P, DOTS), and bias_sums (units, D): the sum of the
    unit's gradients times their combine weights.
    """
    expert, first, end = find_tile(offsets_ptr, tl.program_id(0), E, E_LANES, ROW_UNIT)
    if first >= end:
        return
    row = first + tl.arange(0, ROW_UNIT)
    token = tl.load(token_ptr + row, mask=row < end, other=0).to(tl.int64)
    weight = tl.load(weight_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    begin = tl.load(offsets_ptr + expert)
    unit = begin // ROW_UNIT + expert + (first - begin) // ROW_UNIT
    dot = tl.zeros((ROW_UNIT,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < end)[:, None] & (column < D)[None, :]
        grad = tl.load(grad_ptr + token[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * D + column, mask=column < D, other=0.0).to(tl.float32)
        dot += tl.sum(grad * bias[None, :], 1)
        sums = tl.sum(grad * weight[:, None], 0)
        tl.store(bias_sums_ptr + unit.to(tl.int64) * D + column, sums, mask=column < D)
    tl.store(dots_ptr + row.to(tl.int64) * DOTS + DOTS - 1, dot, mask=row < end)


@triton.jit
def sum_units_kernel(
    sums_ptr,
    offsets_ptr,
    out_ptr,
    N: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sums (units, N) -> out (E, N), the sum of each expert's units; 0 for an expert without rows."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    first = begin // ROW_UNIT + expert
    units = tl.cdiv(end - begin, ROW_UNIT)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, units, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        mask = (unit < units)[:, None] & (column < N)[None, :]
        place = (first + unit).to(tl.int64)[:, None] * N + column[None, :]
        acc += tl.sum(tl.load(sums_ptr + place, mask=mask, other=0.0), 0)
    place = expert.to(tl.int64) * N + column
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=column < N)
