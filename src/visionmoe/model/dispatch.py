"""Tokens to the experts and back. Four ways, equal to float rounding; memory grows with S*K, never with S*E*C.

segments: the kept requests are sorted by expert and each expert runs on its contiguous rows. Cost follows the kept
requests; the number of rows depends on the data, so the host must know it. No dropout inside the experts.
buffers: every expert has G*C places, empty ones are zero rows. Shapes are static: compilation, graphs, export.
triton, grouped (`visionmoe.model.gpu`): the rows of segments with the static shapes of buffers, for GPUs. Who kept
what stays on the device. Triton kernels, or torch's grouped product. No dropout inside the experts.
"""

import torch
from torch import Tensor

from visionmoe.model.experts import Experts
from visionmoe.model.inference import infer_segments
from visionmoe.model.routing import Routing
from visionmoe.model.segments import Kept, SegmentExperts, Segments, flat_tokens


def run_segments(tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Weighted sum of each token's kept experts; 0 for a token with none. (N, D) -> (N, D), N = G*S."""
    kept = Kept.of(routing)
    weights = routing.combine_weights.reshape(-1).index_select(0, kept.request)
    if experts.stream is not None or not torch.is_grad_enabled():
        return infer_segments(tokens, weights, kept, experts)
    for linear in (experts.fc1, experts.fc2):
        linear.packed.release()
    order = torch.empty_like(kept.request)  # of the requests, sorted by expert
    order.scatter_(0, kept.positions(kept.counts), torch.arange(len(order), device=order.device))
    parameters = (experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias)
    segments = Segments(kept.token[order], kept.counts)
    return SegmentExperts.apply(tokens, weights[order], segments, experts.approximate, *parameters)


def run_buffers(tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The same as `run_segments`, over all E*G*C places. (N, D) -> (N, D), N = G*S."""
    groups = routing.token_index.shape[0]
    num_slots = routing.num_experts * groups * routing.capacity
    group = torch.arange(groups, device=tokens.device)[:, None]
    slot = (routing.expert_index * groups + group) * routing.capacity + routing.buffer_index  # (G, R) in (E, G, C)
    slot = torch.where(routing.kept, slot, num_slots).view(-1)  # dropped requests meet in one place behind the end
    empty = torch.full((num_slots + 1,), len(tokens), dtype=torch.int64, device=tokens.device)
    token = empty.scatter(0, slot, flat_tokens(routing).view(-1))[:-1]
    weights = routing.combine_weights.new_zeros(num_slots + 1).scatter(0, slot, routing.combine_weights.reshape(-1))
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])  # row N: what an empty place holds
    rows = experts(padded.index_select(0, token).view(routing.num_experts, -1, tokens.shape[1]))
    weighted = rows.flatten(0, 1) * weights[:-1, None].to(rows.dtype)
    return weighted.new_zeros(len(padded), tokens.shape[1]).index_add(0, token, weighted)[:-1]
