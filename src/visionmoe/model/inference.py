"""Experts on segments without a backward pass: one gather, the experts' products, one pass that combines the rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionmoe.model.packed import linear, uses_onednn
from visionmoe.model.segments import ROWS, Kept

FILLED_ROWS = 256  # of float32 from which on fillers up to a multiple of ROWS do not matter
FEW_ROWS = 4  # what fewer rows of float32 are filled to a multiple of


def infer_segments(tokens: Tensor, weights: Tensor, kept: Kept, experts: nn.Module) -> Tensor:
    """What `segments.SegmentExperts` computes, for weights in the order of `kept`. (N, D), (R,) -> (N, D).

    Where oneDNN makes the products, an expert's rows are filled up to a multiple of ROWS: with token 0, whose
    results nobody reads.
    """
    if not len(kept.token):
        return torch.zeros_like(tokens)
    fc1: Any = experts.fc1
    fc2: Any = experts.fc2
    bias1, bias2 = (layer.bias.to(tokens.dtype).unbind() for layer in (fc1, fc2))
    packed, weights_of = _weights(tokens, kept, experts)
    sizes = [_filled(count, tokens, fc1.weight, packed) for count in kept.counts]
    parts, position = gather_rows(tokens, kept, sizes)
    results = []
    for expert, first, second in weights_of:
        hidden = linear(parts[expert], first, bias1[expert], experts.approximate)  # type: ignore[arg-type]
        results.append(linear(hidden, second, bias2[expert]))
    return combine_rows(torch.cat(results), position, weights, kept.token, len(tokens))


def _weights(tokens: Tensor, kept: Kept, experts: nn.Module) -> tuple[bool, Iterator[tuple[int, Tensor, Tensor]]]:
    """Whether the weights are packed, and (expert, fc1, fc2) of the experts that have requests, in their order."""
    stream: Any = experts.stream
    if stream is not None:
        return False, stream.run(kept.counts, tokens)
    fc1: Any = experts.fc1
    fc2: Any = experts.fc2
    rows = len(kept.token) // len(kept.counts)
    first, second = (layer.packed.of(layer.weight, tokens, rows) for layer in (fc1, fc2))
    own = ((expert, first[expert], second[expert]) for expert, count in enumerate(kept.counts) if count)
    return first[0].is_mkldnn, own


def _filled(count: int, tokens: Tensor, weight: Tensor, packed: bool) -> int:
    """How many rows are computed for an expert's `count` requests; see `segments.ROWS`."""
    if tokens.dtype != torch.bfloat16 and count < FILLED_ROWS:
        return count + -count % FEW_ROWS if packed else count
    return count + -count % ROWS if packed or uses_onednn(tokens, weight, count, gelu=True) else count


def gather_rows(tokens: Tensor, kept: Kept, sizes: Sequence[int]) -> tuple[Sequence[Tensor], Tensor]:
    """The rows of each expert, E times (sizes[e], D), filled up with token 0; and (R,) the requests' rows in all."""
    position = kept.positions(sizes)
    index = kept.token.new_zeros(sum(sizes)).scatter_(0, position, kept.token)
    return tokens.index_select(0, index).split(list(sizes)), position


def combine_rows(rows: Tensor, position: Tensor, weights: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    """Weighted sum of each token's rows, rows[position], in one pass. position, weights and token (R,) -> (N, D)."""
    if (token[1:] < token[:-1]).any():  # expert choice: ordered by expert, not by token
        order = torch.argsort(token, stable=True)
        position, weights = position[order], weights[order]
    counts = torch.bincount(token, minlength=num_tokens)
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(position, rows, offsets, mode="sum", per_sample_weights=weights.to(rows.dtype))
