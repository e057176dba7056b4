"""Routing arithmetic as pure functions: who goes to which expert, and the losses that balance it.

Sources: V-MoE (arXiv 2106.05974, sections 2-3 and appendix A), GShard (arXiv 2006.16668, algorithm 1),
expert choice (arXiv 2202.09368). Axes (visionmoe.config): G groups, S tokens per group, E experts,
C capacity, K selected experts; R requests per group (S*K, or E*C for expert choice).
Nothing here is larger than (G, S, E) or (G, R): dense (G, S, E, C) tensors exist only in `Routing.to_dense`.
"""

import dataclasses
import functools
import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger("visionmoe")


@dataclass(frozen=True)
class Routing:
    """Requests of tokens to experts, and the buffer place that each got.

    token_index, expert_index, buffer_index: (G, R) int64; combine_weights: (G, R), 0 <= w <= 1.
    A request is kept when its buffer_index is below `capacity`, else it is dropped.
    Top-K requests are ordered by token, then by rank: `x.view(G, S, K)`.
    """

    token_index: Tensor
    expert_index: Tensor
    buffer_index: Tensor
    combine_weights: Tensor
    num_tokens: int
    num_experts: int
    capacity: int

    @property
    def kept(self) -> Tensor:
        """(G, R) bool: the requests that found a place."""
        return self.buffer_index < self.capacity

    def expert_load(self) -> Tensor:
        """(E,) the share of all requests that asked for each expert, dropped ones included."""
        count = torch.zeros(self.num_experts, device=self.expert_index.device)
        ones = torch.ones((), device=count.device).expand(self.expert_index.numel())
        return count.scatter_add(0, self.expert_index.reshape(-1), ones) / max(1, self.expert_index.numel())

    def dropped(self) -> Tensor:
        """() the share of requests that found no place."""
        return 1 - self.kept.float().mean()

    def tokens_kept(self) -> Tensor:
        """(G, S) int64: how many experts process each token."""
        zeros = torch.zeros(self.kept.shape[0], self.num_tokens, dtype=torch.int64, device=self.kept.device)
        return zeros.scatter_add(1, self.token_index, self.kept.long())

    def to_dense(self) -> tuple[Tensor, Tensor]:
        """The reference's dense form, for tests and small cases: dispatch (G, S, E, C) bool, combine (G, S, E, C)."""
        groups = self.token_index.shape[0]
        shape = (groups, self.num_tokens, self.num_experts, self.capacity)
        group = torch.arange(groups, device=self.kept.device)[:, None].expand_as(self.token_index)
        where = tuple(x[self.kept] for x in (group, self.token_index, self.expert_index, self.buffer_index))
        dispatch = torch.zeros(shape, dtype=torch.bool, device=self.kept.device)
        combine = torch.zeros(shape, dtype=self.combine_weights.dtype, device=self.kept.device)
        dispatch[where] = True
        return dispatch, combine.index_put(where, self.combine_weights[self.kept])


def compute_capacity(
    num_tokens: int,
    num_experts: int,
    capacity_factor: float,
    ceil_or_round: Literal["ceil", "round"] = "ceil",
    multiple_of: int | None = 4,
) -> int:
    """Buffer places per expert and group for `num_tokens` requests (tokens of a group times K).

    multiple_of raises the result to a multiple (None or 0: off). ValueError when it is below 1 before that.
    A result that changes the factor is said in the log; `rounded_capacity` is the same without a word.
    """
    capacity = rounded_capacity(num_tokens, num_experts, capacity_factor, ceil_or_round, multiple_of)
    if not torch.compiler.is_compiling():
        _say_rounded(num_tokens, num_experts, capacity_factor, capacity)
    return capacity


def rounded_capacity(
    num_tokens: int,
    num_experts: int,
    capacity_factor: float,
    ceil_or_round: Literal["ceil", "round"],
    multiple_of: int | None,
) -> int:
    """See `compute_capacity`."""
    if ceil_or_round not in ("ceil", "round"):
        raise ValueError(f"ceil_or_round must be 'ceil' or 'round', got {ceil_or_round!r}")
    asked = num_tokens * capacity_factor / num_experts
    capacity = math.ceil(asked) if ceil_or_round == "ceil" else round(asked)
    if capacity < 1:
        raise ValueError(
            f"capacity must be at least 1, got {capacity} from num_tokens={num_tokens}, "
            f"num_experts={num_experts}, capacity_factor={capacity_factor}"
        )
    return capacity + (-capacity % multiple_of if multiple_of else 0)


@functools.lru_cache(maxsize=1024)  # each case is said once
def _say_rounded(num_tokens: int, num_experts: int, capacity_factor: float, capacity: int) -> None:
    actual = capacity * num_experts / num_tokens
    change = abs(actual - capacity_factor)
    if change > 1e-6:
        level = logging.WARNING if change > 0.05 * capacity_factor else logging.INFO
        text = "capacity_factor %g was asked; %d places per expert for %d requests to %d experts make it %g"
        logger.log(level, text, capacity_factor, capacity, num_tokens, num_experts, actual)


def top_k_routing(probs: Tensor, num_selected_experts: int, capacity: int, batch_priority: bool) -> Routing:
    """Every token asks for its K best experts; experts fill their buffers in order of priority.

    All first choices go before all second choices; among equals by position ("vanilla"), or with
    `batch_priority` by the token's largest probability, stable (Batch Prioritized Routing, section 4).

    probs: (G, S, E). Returns a Routing of R = S*K requests per group. Weights are not renormalised.
    """
    groups, tokens, experts = probs.shape
    if not 1 <= num_selected_experts <= experts:
        raise ValueError(f"num_selected_experts must be between 1 and {experts}, got {num_selected_experts}")
    weights, chosen = _top_k(probs, num_selected_experts)
    ranked = chosen.transpose(1, 2)  # (G, S, K) -> (G, K, S)
    order = None
    if batch_priority:
        order = torch.argsort(weights[..., 0].detach(), dim=1, descending=True, stable=True)[:, None].expand_as(ranked)
        ranked = ranked.gather(2, order)
    places = _places(ranked.reshape(groups, -1), experts).view(ranked.shape)
    if order is not None:
        places = torch.empty_like(places).scatter_(2, order, places)
    token = torch.arange(tokens, device=probs.device)[:, None].expand(tokens, num_selected_experts)
    return Routing(
        token_index=token.reshape(1, -1).expand(groups, -1),
        expert_index=chosen.reshape(groups, -1),
        buffer_index=places.transpose(1, 2).reshape(groups, -1),  # (G, K, S) -> (G, S*K)
        combine_weights=weights.reshape(groups, -1),
        num_tokens=tokens,
        num_experts=experts,
        capacity=capacity,
    )


def expert_choice_routing(probs: Tensor, capacity: int) -> Routing:
    """Every expert takes the `capacity` tokens of a group that have its highest probability.

    probs: (G, S, E). Returns a Routing of R = E*C requests per group, all kept. An expert cannot take more
    tokens than there are: places beyond S stay empty.
    """
    groups, tokens, experts = probs.shape
    taken = min(capacity, tokens)
    weights, token = _sorted_top(probs.transpose(1, 2), taken)  # (G, E, C)
    expert = torch.arange(experts, device=probs.device)[:, None].expand(experts, taken)
    place = torch.arange(taken, device=probs.device).expand(experts, taken)
    return Routing(
        token_index=token.reshape(groups, -1),
        expert_index=expert.reshape(1, -1).expand(groups, -1),
        buffer_index=place.reshape(1, -1).expand(groups, -1),
        combine_weights=weights.reshape(groups, -1),
        num_tokens=tokens,
        num_experts=experts,
        capacity=capacity,
    )


def normalize_combine_weights(routing: Routing) -> Routing:
    """The same requests, with the weights of each token's kept ones divided by their sum; those of dropped ones are 0.

    So equal experts give what one of them gives, whichever a token gets and as long as it gets one (sparse upcycling,
    arXiv 2212.05055, section 3).
    """
    kept = torch.where(routing.kept, routing.combine_weights, 0.0)
    total = kept.new_zeros(kept.shape[0], routing.num_tokens).scatter_add(1, routing.token_index, kept)
    share = kept / total.gather(1, routing.token_index).clamp_min(torch.finfo(kept.dtype).tiny)
    return dataclasses.replace(routing, combine_weights=share)


def _top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, in order; equal values by position (torch.topk promises no order).

    While k is small the arg-max, which returns the first of equal values, is taken k times: cheaper than a sort.
    """
    if k > 4:
        return _sorted_top(values, k)
    left, found = values.detach(), []
    for _ in range(k):
        found.append(left.argmax(dim=-1, keepdim=True))
        if len(found) < k:
            left = left.scatter(-1, found[-1], float("-inf"))
    index = torch.cat(found, dim=-1)
    return values.gather(-1, index), index


def _sorted_top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by a stable sort, for any k."""
    index = torch.argsort(values.detach(), dim=-1, descending=True, stable=True)[..., :k]
    return values.gather(-1, index), index


def _places(expert_index: Tensor, num_experts: int) -> Tensor:
    """How many earlier requests of the same group asked for the same expert. (G, R) -> (G, R)."""
    groups, requests = expert_index.shape
    order = torch.argsort(expert_index, dim=1, stable=True)
    count = torch.zeros(groups, num_experts, dtype=torch.int64, device=expert_index.device)
    count = count.scatter_add(1, expert_index, torch.ones_like(expert_index))
    start = count.cumsum(1) - count  # (G, E) where each expert's run begins in the sorted order
    position = torch.arange(requests, device=expert_index.device).expand(groups, requests)
    place_sorted = position - start.gather(1, expert_index.gather(1, order))
    return torch.empty_like(expert_index).scatter_(1, order, place_sorted)


def importance_loss(logits: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' summed probabilities (appendix A.2). (G, S, E) -> (G,)."""
    return importance_loss_of(torch.softmax(logits, dim=-1))


def importance_loss_of(probs: Tensor) -> Tensor:
    """`importance_loss` of noise-free probabilities that are there already. (G, S, E) -> (G,)."""
    return _squared_variation(probs.sum(dim=1))


def load_loss(logits: Tensor, noisy_logits: Tensor, noise_std: float, k: int) -> Tensor:
    """Squared coefficient of variation of each expert's mean chance to be among the top k (appendix A.2).

    The chance is that of a new noise draw of `noise_std` (already divided by the number of experts) lifting the
    noise-free logit above the token's k-th largest noisy logit. (G, S, E), (G, S, E) -> (G,).
    """
    threshold = _top_k(noisy_logits, k)[0][..., -1:]
    chance = 1 - torch.special.ndtr((threshold - logits) / noise_std)
    return _squared_variation(chance.mean(dim=1))


def gshard_loss(probs: Tensor) -> Tensor:
    """E^2 * mean over experts of (mean probability * share of tokens whose best expert it is). (G, S, E) -> (G,)."""
    experts = probs.shape[-1]
    best = probs.argmax(dim=-1, keepdim=True)
    top1 = torch.zeros_like(probs).scatter(-1, best, 1.0).mean(dim=1)
    return experts**2 * (top1 * probs.mean(dim=1)).mean(dim=-1)


def _squared_variation(values: Tensor) -> Tensor:
    """(std / mean)^2 over the last axis, with the population's std."""
    variance, mean = torch.var_mean(values, dim=-1, correction=0)
    return variance / mean.square()
