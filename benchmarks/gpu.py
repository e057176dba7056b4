"""What the GPU path is measured by, in one run: experts, layer, memory, latency, training. Needs one CUDA device.

    python benchmarks/gpu.py --out benchmarks/results/gpu_h100.json

Times are medians of CUDA events over interleaved repetitions, after calls that compile and tune. bfloat16; E=8, K=2,
capacity 1.05; 254 images of 197 tokens (50,038) for single layers. The dense MLP has one expert's shape and as many
rows as the layer keeps requests, so both do the same products. MFU counts the products that the routing pays for,
three times in training, over the bfloat16 peak of the device without sparsity.
"""

import argparse
import copy
import datetime
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visionmoe as vm
from visionmoe.config import MoEConfig
from visionmoe.evaluate.timing import device_name
from visionmoe.files import write_json
from visionmoe.model.experts import Experts
from visionmoe.model.gpu.grouped import run_grouped
from visionmoe.model.gpu.ops import run_triton
from visionmoe.model.layers import Mlp
from visionmoe.model.moe import MoE

SHAPES = {"B/16": (768, 3072), "L/16": (1024, 4096)}
IMAGES, TOKENS, EXPERTS, K = 254, 197, 8, 2
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # bfloat16 without sparsity, NVIDIA's data sheets (SXM)
TRAINING = {"B/16": ("vmoe_b16_e8_every2", "vit_b16", "vit_base_patch16_224", 128),
            "L/16": ("vmoe_l16_e8_every2", "vit_l16", "vit_large_patch16_224", 64)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    result: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "device": device_name(device),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
    }
    for name, measure in (("experts", experts), ("layer", layers), ("saved", saved), ("latency", latencies),
                          ("training", training)):  # fmt: skip
        result[name] = measure(arguments.repeats)
        print(name, result[name], flush=True)
        write_json(arguments.out, result)
    return 0


def experts(repeats: int) -> dict[str, Any]:
    """Experts alone, routing given: TFLOP/s of the kept requests, and times against other ways on the same work."""
    return {shape: _experts(*sizes, repeats) for shape, sizes in SHAPES.items()}


def _experts(dim: int, width: int, repeats: int) -> dict[str, Any]:
    tokens, routing, module = _routed(dim, width)
    kept = int(routing.kept.sum())
    runs = {
        "triton": lambda: run_triton(tokens, routing, module),
        "grouped_mm": lambda: run_grouped(tokens, routing, module),
    }
    scattermoe = _scattermoe(tokens, routing, dim, width)
    if scattermoe is not None:
        runs["scattermoe"] = scattermoe
    with torch.no_grad():
        forward = _take_turns(runs, repeats)
    both = _take_turns({name: _with_backward(run, module, tokens) for name, run in runs.items()}, repeats)
    return {
        "kept_requests": kept,
        "forward_ms": forward,
        "forward_backward_ms": both,
        "forward_tflops": round(4 * kept * dim * width / forward["triton"] / 1e9, 1),
        "forward_backward_tflops": round(12 * kept * dim * width / both["triton"] / 1e9, 1),
        "speedup_forward": _ratios(forward),
        "speedup_forward_backward": _ratios(both),
    }


def layers(repeats: int) -> dict[str, Any]:
    """The whole layer, router included, against a dense MLP of equal operations; both eager and both compiled."""
    kinds = ("eager", "compiled")
    return {f"{shape}, {kind}": _layers(*sizes, kind, repeats) for shape, sizes in SHAPES.items() for kind in kinds}


def _layers(dim: int, width: int, kind: str, repeats: int) -> dict[str, Any]:
    moe, mlp = _layer(dim, width), Mlp(dim, width).cuda().bfloat16()
    x = torch.randn(IMAGES, TOKENS, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        routing, _, _ = moe.router(x.view(1, -1, dim), moe.setting)
    dense_x = torch.randn(int(routing.kept.sum()), dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer, dense = (torch.compile(m) if kind == "compiled" else m for m in (moe, mlp))
    runs = {"moe": lambda: layer(x).tokens, "dense": lambda: dense(dense_x)}
    with torch.no_grad():
        forward = _take_turns(runs, repeats)
    steps = {"moe": _with_backward(runs["moe"], moe, x), "dense": _with_backward(runs["dense"], mlp, dense_x)}
    both = _take_turns(steps, repeats)
    return {
        "forward_ms": forward,
        "forward_backward_ms": both,
        "forward_ratio": round(forward["moe"] / forward["dense"], 3),
        "forward_backward_ratio": round(both["moe"] / both["dense"], 3),
    }


def saved(repeats: int) -> dict[str, Any]:
    """Bytes that a layer saves for its backward pass, parameters left out, for the same tokens as a dense MLP."""
    rows = {}
    for shape, (dim, width) in SHAPES.items():
        x = torch.randn(IMAGES, TOKENS, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        moe, mlp = _layer(dim, width), Mlp(dim, width).cuda().bfloat16()
        sizes = {"moe": _saved_bytes(moe, x), "dense": _saved_bytes(mlp, x)}
        rows[shape] = sizes | {"ratio": round(sizes["moe"] / sizes["dense"], 3)}
    return rows


def latencies(repeats: int) -> dict[str, Any]:
    """One image through V-MoE-B/16 in bfloat16."""
    model = vm.create_model("vmoe_b16_e8_every2").cuda().bfloat16().eval()
    image = torch.rand(1, 3, 224, 224, device="cuda", dtype=torch.bfloat16) * 2 - 1
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    with torch.no_grad():
        graph = _captured(lambda: model(image).logits)
        runs = {"eager": lambda: model(image), "compiled": lambda: compiled(image), "cuda_graph": graph.replay}
        times = _take_turns(runs, repeats * 3)
    return times | {f"{name}_to_eager": round(times[name] / times["eager"], 3) for name in ("compiled", "cuda_graph")}


def training(repeats: int) -> dict[str, Any]:
    """Images per second and MFU of whole training steps (autocast, compiled, AdamW) beside the dense ViTs."""
    import timm

    peak = next((p for name, p in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)
    rows = {}
    for shape, (sparse, dense, theirs, batch) in TRAINING.items():
        makers = {
            sparse: lambda name=sparse: vm.create_model(name),
            dense: lambda name=dense: vm.create_model(name),
            f"timm {theirs}": lambda name=theirs: timm.create_model(name, num_classes=1000),
        }
        operations = {name: vm.count_flops(vm.create_model(name), batch_size=batch) for name in (sparse, dense)}
        operations[f"timm {theirs}"] = operations[dense]
        rows[shape] = {"batch": batch}
        for name, make in makers.items():
            torch._dynamo.reset()
            ms = _take_turns({"step": _training_step(make().cuda().train(), batch)}, max(5, repeats // 3))["step"]
            tflops = 3 * operations[name] * batch / ms / 1e9
            mfu = None if peak is None else round(tflops / peak, 3)
            rows[shape][name] = {"images_per_s": round(batch / ms * 1e3, 1), "tflops": round(tflops, 1), "mfu": mfu}
    return rows


def _routed(dim: int, width: int) -> tuple[Tensor, Any, Experts]:
    moe = _layer(dim, width)
    tokens = torch.randn(IMAGES * TOKENS, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        routing, _, _ = moe.router(tokens[None], moe.setting)
    return tokens, routing, moe.experts


def _layer(dim: int, width: int) -> MoE:
    torch.manual_seed(0)
    moe = MoE(MoEConfig(num_experts=EXPERTS, num_selected_experts=K, layers=(0,)), 0, dim, width)
    moe.reset_parameters()
    return moe.cuda().bfloat16()


def _scattermoe(tokens: Tensor, routing: Any, dim: int, width: int) -> Callable[[], Tensor] | None:
    """ScatterMoE's MLP on the same requests, where it is installed. It drops none and adds no biases."""
    if importlib.util.find_spec("scattermoe") is None:
        return None
    from scattermoe.mlp import MLP

    mlp = MLP(input_size=dim, hidden_size=width, num_experts=EXPERTS, top_k=K, activation=nn.GELU(approximate="tanh"))
    mlp = mlp.cuda().bfloat16()
    weights = routing.combine_weights.view(-1, K).to(tokens.dtype)
    expert = routing.expert_index.view(-1, K)
    return lambda: mlp(tokens, weights, expert)


def _with_backward(run: Callable[[], Tensor], module: nn.Module, x: Tensor) -> Callable[[], None]:
    def both() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = run()
        out.backward(torch.ones_like(out))

    return both


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)  # kept until the end, so that no address is used twice
    del out
    return sum(sizes.values())


def _training_step(model: nn.Module, batch: int) -> Callable[[], None]:
    images = torch.rand(batch, 3, 224, 224, device="cuda") * 2 - 1
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = compiled(images)
        logits, auxiliary = (out, 0.0) if isinstance(out, Tensor) else (out.logits, out.auxiliary_loss)
        (nn.functional.cross_entropy(logits.float(), labels) + auxiliary).backward()
        optimizer.step()

    return step


def _captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _take_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other in every round; five uncounted rounds first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 5):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 5:
                times[name].append(start.elapsed_time(end))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def _ratios(times: dict[str, float]) -> dict[str, float]:
    return {name: round(value / times["triton"], 3) for name, value in times.items() if name != "triton"}


if __name__ == "__main__":
    sys.exit(main())
