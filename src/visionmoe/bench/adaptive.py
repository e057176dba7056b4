"""Whether fewer places for tokens save the time that they save operations (arXiv 2106.05974, section 4).

The expert part of the layer is the layer less its router alone, which no capacity makes cheaper; all in turns.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from visionmoe.bench.layer import BuiltLayer, LayerSize, build_layer, kept_counts, layer_bytes, layer_flops, sizes
from visionmoe.bench.measure import DTYPES, Case, Row, Setup, in_turns
from visionmoe.config import RoutingSetting

LIMITS = {0.5: 0.55, 0.15: 0.22}  # capacity factor -> expert part over that at 1


def cases(setup: Setup) -> list[Case]:
    size = replace(sizes(setup)[0], capacity_factor=1.0)
    effort = setup.effort(20, 12.0)
    found = []
    for dtype in DTYPES:
        for priority in (False, True):
            order = "batch-priority" if priority else "vanilla"
            settings = asdict(size) | asdict(effort) | {"dtype": dtype, "factors": [1.0, *LIMITS], "order": order}
            found.append(Case("adaptive", f"{dtype} {order}", settings, _case(setup, size, dtype, order)))
    return found


def _case(setup: Setup, size: LayerSize, dtype: str, order: str) -> Callable[[], list[Row]]:
    def measure() -> list[Row]:
        layer = build_layer(size, DTYPES[dtype], setup.device)
        settings = {c: RoutingSetting(size.num_selected_experts, c, order != "vanilla") for c in (1.0, *LIMITS)}
        with torch.no_grad():
            return _rows(setup, size, dtype, order, layer, settings)

    return measure


def _rows(
    setup: Setup, size: LayerSize, dtype: str, order: str, layer: BuiltLayer, settings: dict[float, RoutingSetting]
) -> list[Row]:
    calls: dict[str, Callable[[], Any]] = {}
    for factor, setting in settings.items():
        calls[f"layer {factor}"] = _layer_call(layer, setting)
        calls[f"router {factor}"] = _router_call(layer, setting)
    times = in_turns(calls, setup.effort(20, 12.0), setup.device)
    rows = []
    for factor, limit in LIMITS.items():
        kept = sum(kept_counts(layer.moe, layer.tokens, settings[factor]))

        def share(now: dict[str, float], factor: float = factor) -> float:
            own = now[f"layer {factor}"] - now[f"router {factor}"]
            return own / (now["layer 1.0"] - now["router 1.0"])

        rows.append(
            Row(
                what=f"expert part at C {factor:g} over C 1, {order}; {size.text}",
                value=times.median(share),
                unit="ratio",
                dtype=dtype,
                ms=times.ms(f"layer {factor}") - times.ms(f"router {factor}"),
                reference_ms=times.ms("layer 1.0") - times.ms("router 1.0"),
                target=setup.target(limit),
                flops=layer_flops(size, kept),
                bytes=layer_bytes(size, DTYPES[dtype]),
                rounds=times.rounds,
                details={
                    "kept_requests": kept,
                    "kept_over_kept_at_1": kept / sum(kept_counts(layer.moe, layer.tokens, settings[1.0])),
                    "whole_layer_ratio": times.ratio(f"layer {factor}", "layer 1.0"),
                    "router_ms": times.ms(f"router {factor}"),
                },
            )
        )
    return rows


def _layer_call(layer: BuiltLayer, setting: RoutingSetting) -> Callable[[], None]:
    def call() -> None:
        layer.moe.setting = setting
        layer.moe(layer.tokens)

    return call


def _router_call(layer: BuiltLayer, setting: RoutingSetting) -> Callable[[], None]:
    return lambda: layer.moe.router(layer.tokens, setting)
