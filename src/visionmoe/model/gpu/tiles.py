"""What the Triton kernels share: which rows a tile has, the product of one tile, GELU and its derivative."""

import triton
import triton.language as tl

from visionmoe.model.gpu.configs import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)  # Triton's interpreter multiplies bfloat16 as integers


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with float32 sums."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def find_tile(offsets_ptr, number, E: tl.constexpr, E_LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile with this number among all experts' tiles of BLOCK_M rows: (expert, first row, end of its expert).

    Each expert's last tile may be short. Numbers behind the last tile yield a first row that is not below the end.
    """
    lane = tl.arange(0, E_LANES)
    begin = tl.load(offsets_ptr + lane, mask=lane < E, other=0)
    end = tl.load(offsets_ptr + lane + 1, mask=lane < E, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(tiles, 0)
    expert = tl.sum((behind <= number).to(tl.int32), 0)
    own = lane == expert
    first = tl.sum(tl.where(own, begin + (number - behind + tiles) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)
    return expert, first, last


@triton.jit
def swizzle(num_m, num_n, GROUP_M: tl.constexpr):
    """Program number -> (row tile, column tile): GROUP_M row tiles by all column tiles together, for the L2 cache."""
    program = tl.program_id(0)
    in_group = GROUP_M * num_n
    first = (program // in_group) * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    within = program % in_group
    return first + within % size, within // size


@triton.jit
def multiply(
    a_ptr,
    a_rows,
    w_ptr,
    expert,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    K_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows a_rows (BLOCK_M,) of a (., K) times one expert's weights: (N, K) if K_LAST, else (K, N). float32 sums.

    Addresses are 64 bits wide across experts and rows, 32 bits within one expert's weights.
    """
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + a_rows.to(tl.int64)[:, None] * K + k[None, :]
    w_tile = w_ptr + expert.to(tl.int64) * (N * K)
    if K_LAST:
        w_tile += column[None, :] * K + k[:, None]
        step = BLOCK_K
    else:
        w_tile += column[None, :] + k[:, None] * N
        step = BLOCK_K * N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        inside = k < K - done
        if K % BLOCK_K == 0:
            a = tl.load(a_tile)
            w = tl.load(w_tile) if N % BLOCK_N == 0 else tl.load(w_tile, mask=column[None, :] < N, other=0.0)
        else:
            a = tl.load(a_tile, mask=inside[None, :], other=0.0)
            w = tl.load(w_tile, mask=inside[:, None] & (column[None, :] < N), other=0.0)
        acc = dot(a, w, acc, PRECISION)
        a_tile += BLOCK_K
        w_tile += step
    return acc


@triton.jit
def halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns of x (BLOCK_M, BLOCK_N)."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU of float32; 0.5 * (1 + tanh(u)) is the logistic function of 2u."""
    if TANH:
        return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_and_slope(x, TANH: tl.constexpr):
    """GELU and its derivative, float32."""
    if TANH:
        share = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        value = x * share
        slope = share + value * (1 - share) * (1.5957691216057308 + 0.2140644488178008 * x * x)
    else:
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return value, slope
