"""The same work through what people would use instead: one MoE layer, and a dense ViT-B/16.

    python benchmarks/peers/run.py --out benchmarks/results/peers_cpu.json

A peer that is not installed is named with what installs it, and left out. Layer: B/16 size (8 images, 1576 tokens,
D 768, F 3072, E 8, K 2) and S/32 size (400 tokens, D 512, F 2048), nothing dropped, since the peers know no capacity.
Every peer has the same weights and a plain softmax-and-top-k router in float32, and must give our layer's numbers
before it is timed. Each peer takes turns with our layer and the dense MLP alone, so that a slow one, which empties the
caches, disturbs no other. Whole models: images per second at batch 8, all in turns. One uncounted round before;
medians, and medians of the rounds' ratios to ours. A comparison takes no more rounds than --seconds allow.
"""

import argparse
import datetime
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ImageWork, LayerCalls, LayerWork, MissingError

from visionmoe.bench.build import build_model
from visionmoe.bench.layer import LayerSize, build_layer
from visionmoe.bench.measure import DTYPES, Effort, Times, in_turns
from visionmoe.bench.products import mlp, mlp_parameters
from visionmoe.bench.run import machine
from visionmoe.files import write_json
from visionmoe.variants import get_config

LAYER_PEERS = ("torch_grouped_mm", "huggingface_experts", "jax_ragged_dot", "scattermoe_gpu")
IMAGE_PEERS = ("timm_vit", "onnxruntime_vit")
OURS, DENSE = "visionmoe MoE layer", "dense F.linear MLP over as many rows"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest output
FULL = (LayerSize("B/16", 8 * 197, 768, 3072), LayerSize("S/32", 8 * 50, 512, 2048))
QUICK = (LayerSize("small", 64, 64, 128, num_experts=4),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", nargs="+", default=[*LAYER_PEERS, *IMAGE_PEERS], choices=LAYER_PEERS + IMAGE_PEERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the counted rounds of one comparison")
    parser.add_argument("--quick", action="store_true", help="small layers alone, to see that it runs")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for size in QUICK if arguments.quick else FULL:
        for dtype in DTYPES:
            for gradients in (False, True):
                rows += layer_rows(arguments, size, dtype, gradients, missing)
                write(arguments, rows, missing)
    if not arguments.quick and set(IMAGE_PEERS) & set(arguments.peers):
        for dtype in DTYPES:
            rows += image_rows(arguments, dtype, missing)
            write(arguments, rows, missing)
    for name, reason in missing.items():
        print(f"{name}: {reason}")


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    write_json(
        arguments.out,
        {
            "date": str(datetime.date.today()),
            "machine": machine(torch.device(arguments.device)),
            "versions": versions(),
            "command": " ".join(["python", *sys.argv]),
            "rows": rows,
            "missing": missing,
        },
    )


def layer_rows(
    arguments: argparse.Namespace, size: LayerSize, dtype: str, gradients: bool, missing: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of every peer that is there, each with those of ours and of the dense MLP that were timed beside it."""
    device = torch.device(arguments.device)
    what = f"{'forward+backward' if gradients else 'forward'}, {dtype}, {size.name}"
    print(what, flush=True)
    # capacity for every request: no expert gets more than all tokens
    layer = build_layer(replace(size, capacity_factor=float(size.num_experts)), DTYPES[dtype], device)
    work = work_of(layer, gradients)
    parameters = [p.requires_grad_(gradients) for p in mlp_parameters(size.hidden_size, size.mlp_dim, work.tokens)]
    rows = torch.randn(layer.kept, size.hidden_size).to(layer.tokens).requires_grad_(gradients)
    own: LayerCalls = {OURS: lambda: layer.moe(work.tokens[None]).tokens[0], DENSE: lambda: mlp(rows, parameters)}
    with torch.no_grad():
        expected = own[OURS]().float()
    leaves = [work.tokens, *work.parameters, *layer.moe.parameters(), rows, *parameters]
    effort = Effort(arguments.rounds, arguments.seconds)
    found = []
    for name, call in peer_calls(arguments.peers, work, expected, TOLERANCE[dtype], gradients, missing).items():
        calls = own | {name: call}
        with torch.set_grad_enabled(gradients):
            timed = {n: backward_of(c, leaves) for n, c in calls.items()} if gradients else calls
            times = in_turns(timed, effort, device)
        found += [as_row(n, what, times, OURS) | {"beside": name} for n in calls]
    return found


def peer_calls(
    peers: list[str],
    work: LayerWork,
    expected: torch.Tensor,
    tolerance: float,
    gradients: bool,
    missing: dict[str, str],
) -> LayerCalls:
    """The checked calls of the layer's peers that are there; the others and why go to `missing`."""
    calls: LayerCalls = {}
    for name in LAYER_PEERS:
        peer = importlib.import_module(name) if name in peers else None
        if peer is None or (gradients and not peer.GRADIENTS):
            continue
        try:
            calls |= checked(peer, work, expected, tolerance)
        except MissingError as reason:
            missing[name] = str(reason)
    return calls


def work_of(layer: Any, gradients: bool) -> LayerWork:
    """The layer's own weights as plain tensors, leaves where gradients are wanted."""
    experts = layer.moe.experts

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone().requires_grad_(gradients)

    return LayerWork(
        tokens=leaf(layer.tokens[0]),
        gate=leaf(layer.moe.router.gate.weight.float()),
        up=leaf(experts.fc1.weight),
        up_bias=leaf(experts.fc1.bias),
        down=leaf(experts.fc2.weight),
        down_bias=leaf(experts.fc2.bias),
        num_selected_experts=layer.moe.setting.num_selected_experts,
    )


def checked(peer: Any, work: LayerWork, expected: torch.Tensor, tolerance: float) -> LayerCalls:
    """The peer's calls, after each has given the expected output to within `tolerance` of its largest value."""
    calls = peer.layer_calls(work)
    for name, call in calls.items():
        with torch.no_grad():
            out = call()
        out = peer.as_tensor(out) if hasattr(peer, "as_tensor") else out
        difference = float((out.float() - expected).abs().max() / expected.abs().max())
        if difference > tolerance:
            raise RuntimeError(f"{name} does other work: its output differs by {difference:.2g} of the largest value")
    return calls


def backward_of(call: Callable[[], Any], leaves: list[torch.Tensor]) -> Callable[[], None]:
    grad: list[torch.Tensor] = []

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = call()
        if not grad:
            grad.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out))
        out.backward(grad[0])

    return run


def image_rows(arguments: argparse.Namespace, dtype: str, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Images per second of ours, dense and sparse, and of the peers' dense ViT-B/16."""
    device = torch.device(arguments.device)
    what = f"images per second, batch 8, {dtype}"
    print(what, flush=True)
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    ours = "visionmoe ViT-B/16"
    calls: dict[str, Callable[[], Any]] = {}
    for label, name in ((ours, "vit_b16"), ("visionmoe V-MoE-B/16 E 8 every 2", "vmoe_b16_e8_every2")):
        model, own = build_model(get_config(name), DTYPES[dtype], device), images.to(DTYPES[dtype])
        calls[label] = lambda model=model, own=own: model(own)
    for name in IMAGE_PEERS:
        if name in arguments.peers:
            try:
                calls |= importlib.import_module(name).image_calls(
                    ImageWork(images, DTYPES[dtype], torch.get_num_threads())
                )
            except MissingError as reason:
                missing.setdefault(f"{name}, {dtype}", str(reason))
    with torch.no_grad():
        times = in_turns(calls, Effort(arguments.rounds, 1.5 * arguments.seconds), device)
    return [as_row(name, what, times, ours) | {"images_per_second": round(8e3 / times.ms(name), 2)} for name in calls]


def as_row(name: str, what: str, times: Times, reference: str) -> dict[str, Any]:
    row = {"what": what, "name": name, "ms": round(times.ms(name), 2), "rounds": times.rounds}
    row["time_over_ours"] = round(times.ratio(name, reference), 3)
    print(f"  {name:<44} {row['ms']:9.2f} ms  {row['time_over_ours']:.2f} of ours", flush=True)
    return row


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("torch", "timm", "transformers", "onnxruntime", "jax", "scattermoe"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
