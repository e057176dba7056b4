"""How much of a layer's time is not its experts' matrix products: routing, sorting, gathering, combining.

The share is (layer - products alone) / layer, both in turns: the products on contiguous rows of the same numbers, in
the fastest way that this machine has. So it also holds what the layer's own products lose against that way, and the
allocation of its buffers. Beside it each stage is timed by itself, as plain torch operations do it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from visionmoe.bench.layer import BuiltLayer, LayerSize, build_layer, sizes
from visionmoe.bench.measure import DTYPES, Case, Row, Setup, in_turns
from visionmoe.bench.products import per_expert
from visionmoe.config import RoutingSetting
from visionmoe.model.routing import Routing


def cases(setup: Setup) -> list[Case]:
    large, small = sizes(setup)
    limits = ((large, 0.04), (small, 0.06))
    effort = setup.effort(30, 12.0)
    found = []
    for size, limit in limits:
        for dtype in DTYPES:
            settings = asdict(size) | asdict(effort) | {"dtype": dtype}
            measure = _case(setup, size, dtype, limit)
            found.append(Case("share", f"{dtype} {size.text}", settings, measure))
    return found


def _case(setup: Setup, size: LayerSize, dtype: str, limit: float) -> Callable[[], list[Row]]:
    def measure() -> list[Row]:
        layer = build_layer(size, DTYPES[dtype], setup.device)
        with torch.no_grad():
            return [*_share(setup, size, dtype, layer, limit), _priority(setup, size, dtype, layer)]

    return measure


def _share(setup: Setup, size: LayerSize, dtype: str, layer: BuiltLayer, limit: float) -> list[Row]:
    """The share, and the stages alone as shares of the layer."""
    calls = {"layer": lambda: layer.moe(layer.tokens), "products": products_of(layer)} | stages(layer)
    times = in_turns(calls, setup.effort(30, 12.0), setup.device)
    rows = [
        Row(
            what=f"routing, sort, gather, combine: share of the layer; {size.text}",
            value=times.median(lambda now: 1 - now["products"] / now["layer"]),
            unit="share",
            dtype=dtype,
            ms=times.ms("layer"),
            reference_ms=times.ms("products"),
            target=setup.target(limit),
            rounds=times.rounds,
            details={"kept_requests": layer.kept},
        )
    ]
    for name in stages(layer):
        rows.append(
            Row(
                what=f"{name} by itself, as plain torch does it: share of the layer; {size.name}",
                value=times.ratio(name, "layer"),
                unit="share",
                dtype=dtype,
                ms=times.ms(name),
                reference_ms=times.ms("layer"),
                rounds=times.rounds,
                details={"stage": name, "size": size.name},
            )
        )
    return rows


def _priority(setup: Setup, size: LayerSize, dtype: str, layer: BuiltLayer) -> Row:
    """Batch-priority order over the order by position; as many requests are kept in both."""
    setting = layer.moe.setting

    def at(own: RoutingSetting) -> Callable[[], Any]:
        def call() -> None:
            layer.moe.setting = own
            layer.moe(layer.tokens)

        return call

    calls = {"vanilla": at(setting), "priority": at(replace(setting, batch_priority=True))}
    times = in_turns(calls, setup.effort(30, 12.0), setup.device)
    layer.moe.setting = setting
    return Row(
        what=f"batch-priority routing: time that it adds to the layer; {size.text}",
        value=times.ratio("priority", "vanilla") - 1,
        unit="share",
        dtype=dtype,
        ms=times.ms("priority"),
        reference_ms=times.ms("vanilla"),
        target=setup.target(0.02),
        rounds=times.rounds,
    )


def products_of(layer: BuiltLayer) -> Callable[[], Any]:
    """The products of the layer's own experts on as many rows as each has, without anything around them."""
    fc1, fc2 = layer.moe.experts.fc1, layer.moe.experts.fc2
    parts = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    experts = [[part[e].detach() for part in parts] for e in range(len(layer.counts))]
    return per_expert(layer.tokens.shape[-1], layer.counts, experts)


def stages(layer: BuiltLayer) -> dict[str, Callable[[], Any]]:
    """What stands around the products, stage by stage."""
    moe, tokens = layer.moe, layer.tokens
    flat = tokens.flatten(0, 1)
    with torch.no_grad():
        routing = moe.router(tokens, moe.setting)[0]
        token, weights = by_expert(routing)
        rows = flat.index_select(0, token)
    return {
        "routing": lambda: moe.router(tokens, moe.setting),
        "sort by expert": lambda: by_expert(routing),
        "gather": lambda: flat.index_select(0, token),
        "combine": lambda: combine(flat, rows, token, weights),
    }


def by_expert(routing: Routing) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and weights (R,) of the kept requests of one group, sorted by expert."""
    request = routing.kept.view(-1).nonzero().squeeze(1)
    order = torch.argsort(routing.expert_index.reshape(-1)[request], stable=True)
    request = request[order]
    return routing.token_index.reshape(-1)[request], routing.combine_weights.reshape(-1)[request]


def combine(tokens: Tensor, rows: Tensor, token: Tensor, weights: Tensor) -> Tensor:
    """Weighted rows (R, D) added to their tokens (N, D)."""
    return torch.zeros_like(tokens).index_add_(0, token, rows * weights[:, None].to(rows.dtype))
