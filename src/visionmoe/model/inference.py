"""Experts on segments without a backward pass: GELU inside the product, and weights that oneDNN has laid out once.

oneDNN multiplies by weights in a layout of its own. In bfloat16 it would bring an expert's weights into it on every
call, which costs as much as the product of a few hundred rows; `PackedWeights` keeps them instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

from visionmoe.model.segments import Segments, filled

FUSED_PRODUCT = 1 << 27  # multiply-adds of a float32 product from which on a new kernel's making does not matter
FILLED_ROWS = 256  # of float32 from which on the fillers do not matter
MAX_PACKED_BYTES = 512 << 20  # of one stack of weights: larger ones are not held twice
_SAMPLES_PER_EXPERT = 16
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def infer_segments(tokens: Tensor, weights: Tensor, segments: Segments, experts: nn.Module) -> Tensor:
    """What `segments.SegmentExperts` computes. tokens (N, D), weights (R,) -> (N, D)."""
    fc1: Any = experts.fc1
    fc2: Any = experts.fc2
    first, second = fc1.packed.of(fc1.weight, tokens), fc2.packed.of(fc2.weight, tokens)
    bias1, bias2 = fc1.bias.to(tokens.dtype), fc2.bias.to(tokens.dtype)
    results = []
    for expert, _, token in segments.runs():
        fused = _fuses(tokens, len(token) * fc1.weight[0].numel())
        fills = fused and (tokens.dtype == torch.bfloat16 or len(token) >= FILLED_ROWS)
        index = filled(token) if fills else token
        hidden = _linear(tokens.index_select(0, index), first[expert], bias1[expert], fused, experts.approximate)
        results.append(_linear(hidden, second[expert], bias2[expert], fused)[: len(token)])
    return _combine(torch.cat(results), weights, segments.token, len(tokens)) if results else torch.zeros_like(tokens)


def _combine(rows: Tensor, weights: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    """Weighted sum of each token's rows in one pass over them. rows (R, D), weights and token (R,) -> (N, D)."""
    order = torch.argsort(token, stable=True)
    counts = torch.bincount(token, minlength=num_tokens)
    share = weights[order].to(rows.dtype)
    return F.embedding_bag(order, rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=share)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, fused: bool, gelu: Any = None) -> Tensor:
    """x @ weight.T + bias, with GELU behind it where its form is given. (N, in) -> (N, out)."""
    if not weight.is_mkldnn:
        weight = weight.to(x.dtype)
    if fused:
        return _LINEAR(x, weight, bias, *(("none", [], "") if gelu is None else ("gelu", [], gelu)))
    out = F.linear(x, weight, bias)
    return out if gelu is None else F.gelu(out, approximate=gelu)


def _fuses(tokens: Tensor, multiply_adds: int) -> bool:
    """Whether oneDNN's product with GELU is there for this device and dtype, and pays for a product of this size."""
    if tokens.device.type != "cpu" or _LINEAR is None or not torch.backends.mkldnn.enabled:
        return False
    if tokens.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tokens.dtype == torch.float32 and multiply_adds >= FUSED_PRODUCT


class _Origin(NamedTuple):
    """What tells whether a weight is still the one that was packed."""

    address: int
    version: int
    sample: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "_Origin":
        flat = weight.detach().view(-1)
        step = max(1, len(flat) // (_SAMPLES_PER_EXPERT * len(weight))) | 1  # odd: not the same column in every row
        return cls(weight.data_ptr(), weight._version, flat[::step].clone())

    def same(self, other: "_Origin") -> bool:
        return self[:2] == other[:2] and torch.equal(self.sample, other.sample)


class PackedWeights:
    """Every expert's weight as the products want it: packed for oneDNN in bfloat16 on a CPU, else as it is.

    Packed weights are made at first use, and again when the parameter has changed: by its address, its version (every
    in-place operation counts it up) and some of its values, which sees what changes all of it through `.data`. Who
    changes single values through `.data` calls `release` afterwards. Copies of a model start without packed weights,
    and training releases them.
    """

    def __init__(self) -> None:
        self._origin: _Origin | None = None
        self._packed: list[Tensor] = []

    def release(self) -> None:
        """Gives the memory back."""
        self._origin, self._packed = None, []

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeights, ()

    def of(self, weight: Tensor, tokens: Tensor) -> Sequence[Tensor]:
        """weight (E, out, in) of any dtype -> E weights, packed in the dtype of `tokens`, or as they are."""
        if not self._packs(weight, tokens):
            return weight.unbind()
        origin, packed = _Origin.of(weight), self._packed
        if self._origin is None or not self._origin.same(origin):
            packed = [_PACK(part.detach().to(torch.bfloat16), None) for part in weight]
            self._origin, self._packed = origin, packed
        return packed

    def _packs(self, weight: Tensor, tokens: Tensor) -> bool:
        size = 2 * weight.numel()
        ready = tokens.dtype == torch.bfloat16 and _PACK is not None and _fuses(tokens, 0)
        return ready and size <= MAX_PACKED_BYTES and weight.is_contiguous() and not weight.is_inference()


def _linear_flop(x_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **options: Any) -> int:
    return mm_flop(x_shape, (weight_shape[1], weight_shape[0]))


if _LINEAR is not None and _LINEAR not in flop_registry:
    register_flop_formula(_LINEAR)(_linear_flop)  # so that torch's FlopCounterMode sees the experts
