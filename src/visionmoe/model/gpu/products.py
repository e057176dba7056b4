"""The four products of the experts on rows sorted by expert, as Triton kernels. Axes: see `schedule`.

first: hidden = weight * gelu(token @ W1.T + b1), the gather and all of the epilogue inside.
second: row = hidden @ W2.T + weight * b2, or without the bias; `reductions.combine_kernel` sums a token's rows.
first_backward: gradient before GELU from the gradient of the output, gathered; and what other gradients need of it.
weight_gradient: the gradient of one expert's weights, sums over its rows, one operand gathered.
"""

import triton
import triton.language as tl

from visionmoe.model.gpu.configs import BACKWARD_CONFIGS, FORWARD_CONFIGS, WEIGHT_CONFIGS, prune
from visionmoe.model.gpu.tiles import dot, find_tile, gelu, gelu_and_slope, halves, multiply, swizzle

_TUNING = {
    "key": ["ROWS", "M", "N", "K", "E", "SAVE", "K_LAST", "GATHER_A"],  # those that a kernel has
    "prune_configs_by": {"early_config_prune": prune},
    "cache_results": True,
}
_SIZES = ["num_rows", "ROWS"]  # no kernel of its own for sizes that are multiples of 16


@triton.autotune(configs=FORWARD_CONFIGS, **_TUNING)
@triton.jit(do_not_specialize=_SIZES)
def first_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    token_ptr,
    weight_ptr,
    offsets_ptr,
    before_ptr,
    hidden_ptr,
    num_rows,
    ROWS,
    E: tl.constexpr,
    E_LANES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TANH: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a (tokens, K), w (E, N, K), bias (E, N) -> hidden (P, N) times the combine weight, and before GELU if SAVE."""
    num_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = swizzle(tl.cdiv(num_rows, BLOCK_M) + E, num_n, 8)
    expert, first, end = find_tile(offsets_ptr, tile_m, E, E_LANES, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(token_ptr + tl.minimum(row, end - 1))
    acc = multiply(a_ptr, token, w_ptr, expert, column, N, K, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    bias = tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < N, other=0.0).to(tl.float32)
    x = acc + bias[None, :]
    base = first.to(tl.int64) * N  # the tile's own offsets fit into 32 bits, which saves registers
    place = (row - first)[:, None] * N + column[None, :]
    mask = (row < end)[:, None] & (column < N)[None, :]
    if SAVE:
        tl.store(before_ptr + base + place, x.to(before_ptr.dtype.element_ty), mask=mask)
    weight = tl.load(weight_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + base + place, (gelu(x, TANH) * weight[:, None]).to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.autotune(configs=FORWARD_CONFIGS, **_TUNING)
@triton.jit(do_not_specialize=_SIZES)
def second_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    weight_ptr,
    offsets_ptr,
    out_ptr,
    num_rows,
    ROWS,
    E: tl.constexpr,
    E_LANES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    K_LAST: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a (P, K), w (E, N, K) if K_LAST else (E, K, N) -> out (P, N), plus weight (P,) times bias (E, N) if BIAS."""
    num_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = swizzle(tl.cdiv(num_rows, BLOCK_M) + E, num_n, 8)
    expert, first, end = find_tile(offsets_ptr, tile_m, E, E_LANES, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row = tl.minimum(row, end - 1)
    acc = multiply(a_ptr, a_row, w_ptr, expert, column, N, K, K_LAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < N, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + row, mask=row < end, other=0.0).to(tl.float32)
        acc += weight[:, None] * bias[None, :]
    base = first.to(tl.int64) * N  # the tile's own offsets fit into 32 bits, which saves registers
    place = (row - first)[:, None] * N + column[None, :]
    mask = (row < end)[:, None] & (column < N)[None, :]
    tl.store(out_ptr + base + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.autotune(configs=BACKWARD_CONFIGS, **_TUNING)
@triton.jit(do_not_specialize=_SIZES)
def first_backward_kernel(
    a_ptr,
    w_ptr,
    token_ptr,
    weight_ptr,
    offsets_ptr,
    before_ptr,
    grad_before_ptr,
    hidden_ptr,
    dots_ptr,
    bias_sums_ptr,
    num_rows,
    ROWS,
    E: tl.constexpr,
    E_LANES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a (tokens, K): gradient of the output; w (E, K, N): W2; before (P, N).

    Writes grad_before and hidden (P, N), the latter times the combine weight as in the forward pass; dots (P, DOTS),
    in its first columns the parts, of COLUMN_UNIT each, of (gradient @ W2) . gelu(before), which the combine weight's
    gradient sums; and bias_sums (units, N): sums of grad_before over the rows of a tile, in the tile's first unit, 0
    in its others.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = swizzle(tl.cdiv(num_rows, BLOCK_M) + E, num_n, 8)
    expert, first, end = find_tile(offsets_ptr, tile_m, E, E_LANES, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(token_ptr + tl.minimum(row, end - 1))
    acc = multiply(a_ptr, token, w_ptr, expert, column, N, K, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    # Column by column of COLUMN_UNIT, so that few registers are needed beside the sums.
    if BLOCK_N == COLUMN_UNIT:
        parts = (acc,)
    elif BLOCK_N == 2 * COLUMN_UNIT:
        parts = halves(acc, BLOCK_M, BLOCK_N)
    else:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        parts = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    weight = tl.load(weight_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    begin = tl.load(offsets_ptr + expert)
    unit = begin // ROW_UNIT + expert + (first - begin) // ROW_UNIT + tl.arange(0, BLOCK_M // ROW_UNIT)
    unit_row = first + tl.arange(0, BLOCK_M // ROW_UNIT) * ROW_UNIT
    base = first.to(tl.int64) * N
    for i in tl.static_range(BLOCK_N // COLUMN_UNIT):
        part = parts[i]
        own = tile_n * BLOCK_N + i * COLUMN_UNIT + tl.arange(0, COLUMN_UNIT)
        place = (row - first)[:, None] * N + own[None, :]
        mask = (row < end)[:, None] & (own < N)[None, :]
        before = tl.load(before_ptr + base + place, mask=mask, other=0.0).to(tl.float32)
        value, slope = gelu_and_slope(before, TANH)
        tl.store(hidden_ptr + base + place, (value * weight[:, None]).to(hidden_ptr.dtype.element_ty), mask=mask)
        part = tl.where(mask, part, 0.0)
        grad_before = part * slope * weight[:, None]
        tl.store(grad_before_ptr + base + place, grad_before.to(grad_before_ptr.dtype.element_ty), mask=mask)
        number = tile_n * (BLOCK_N // COLUMN_UNIT) + i
        dot_place = dots_ptr + row.to(tl.int64) * DOTS + number
        tl.store(dot_place, tl.sum(part * value, 1), mask=(row < end) & (number < DOTS - 1))
        sums = tl.where((unit_row == first)[:, None], tl.sum(grad_before, 0)[None, :], 0.0)
        sums_mask = (unit_row < end)[:, None] & (own < N)[None, :]
        tl.store(bias_sums_ptr + unit.to(tl.int64)[:, None] * N + own[None, :], sums, mask=sums_mask)


@triton.autotune(configs=WEIGHT_CONFIGS, **_TUNING)
@triton.jit(do_not_specialize=["ROWS"])
def weight_gradient_kernel(
    a_ptr,
    b_ptr,
    token_ptr,
    offsets_ptr,
    out_ptr,
    ROWS,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (E, M, N): sum over an expert's rows of a (., M) times b (., N); 0 for an expert without rows.

    One of them is (tokens, .) and gathered: a if GATHER_A, else b. The other one is (P, .).
    Programs of one expert are neighbours, so that its rows are read from the L2 cache.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * num_n
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = (tile // num_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    token = tl.load(token_ptr + begin + k, mask=begin + k < end, other=0)
    for start in range(begin, end, BLOCK_K):
        row = start + k
        inside = row < end
        a_row = token if GATHER_A else row
        b_row = row if GATHER_A else token
        # The next tokens are read one step ahead: loads that wait for loads in the same step shorten the pipeline.
        token = tl.load(token_ptr + row + BLOCK_K, mask=row + BLOCK_K < end, other=0)
        a_mask = inside[None, :] if M % BLOCK_M == 0 else inside[None, :] & (m < M)[:, None]
        b_mask = inside[:, None] if N % BLOCK_N == 0 else inside[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + a_row.to(tl.int64)[None, :] * M + m[:, None], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_row.to(tl.int64)[:, None] * N + n[None, :], mask=b_mask, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    base = expert.to(tl.int64) * (M * N)
    place = m[:, None] * N + n[None, :]
    tl.store(out_ptr + base + place, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
