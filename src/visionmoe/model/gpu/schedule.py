"""From a routing to rows sorted by expert, on the device and with static shapes: the host learns nothing.

Axes beside the legend of `visionmoe.config`: N = G*S tokens, P rows. The kept requests fill the first rows, expert by
expert; a kept request's place in the buffer of its (expert, group) also is its place among the rows of that pair, so
no sort is needed. P is the most that can be kept, min(G*R, E*G*C); rows behind the last kept request are unused.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionmoe.model.routing import Routing
from visionmoe.model.segments import flat_tokens


class Schedule(NamedTuple):
    """Where each request's row is. All of it lives on the device of the routing.

    offsets (E+1,) int32: expert e has the rows offsets[e] ... offsets[e+1] - 1. token (P,) int32: the token of a row,
    0 for unused rows. weights (P,): the combine weight of a row, 0 for unused rows; the one part with a gradient.
    rows_of_token (N, E) int32: the row of a token's request to an expert, -1 where there is none or it was dropped.
    """

    offsets: Tensor
    token: Tensor
    weights: Tensor
    rows_of_token: Tensor


def make_schedule(routing: Routing) -> Schedule:
    """Needs buffer places as all routings of this package have them: 0, 1, 2, ... within each (expert, group)."""
    groups, requests = routing.token_index.shape
    experts, device = routing.num_experts, routing.token_index.device
    most = min_size(groups * requests, experts * groups * routing.capacity)
    kept = routing.kept.reshape(-1)
    group = torch.arange(groups, device=device)[:, None]
    cell = (routing.expert_index * groups + group).reshape(-1)  # (G, R) -> (G*R,), values in (E, G)
    counts = torch.zeros(experts * groups, dtype=torch.int64, device=device).scatter_add(0, cell, kept.long())
    ends = counts.cumsum(0)
    row = (ends - counts)[cell] + routing.buffer_index.reshape(-1)
    row = torch.where(kept, row, most)  # dropped requests meet in one row behind the end
    tokens = flat_tokens(routing).view(-1)
    token = torch.zeros(most + 1, dtype=torch.int32, device=device).scatter(0, row, tokens.int())[:-1]
    combine = torch.where(kept, routing.combine_weights.reshape(-1), 0.0)
    weights = combine.new_zeros(most + 1).scatter(0, row, combine)[:-1]
    place = torch.where(
        kept, tokens * experts + routing.expert_index.reshape(-1), groups * routing.num_tokens * experts
    )
    table = torch.full((groups * routing.num_tokens * experts + 1,), -1, dtype=torch.int32, device=device)
    table = table.scatter(0, place, torch.where(kept, row, -1).int())[:-1]
    offsets = torch.nn.functional.pad(ends.view(experts, groups)[:, -1], (1, 0)).int()
    return Schedule(offsets, token, weights, table.view(-1, experts))


def min_size(a: int, b: int) -> Any:
    """The smaller of two sizes, without a guard where torch.compile has made them symbols."""
    return torch.sym_min(a, b)
