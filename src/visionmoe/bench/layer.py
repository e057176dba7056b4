"""One MoE layer against a dense MLP over as many rows as the layer keeps requests: the same matrix products."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.bench.measure import DTYPES, Case, Effort, Row, Setup, Target, in_turns
from visionmoe.bench.products import can_pack, mlp, mlp_parameters, packed, packed_mlp
from visionmoe.config import MoEConfig, RoutingSetting
from visionmoe.model.moe import MoE


@dataclass(frozen=True)
class LayerSize:
    """tokens: N, of all images of a batch, one routing group."""

    name: str
    tokens: int
    hidden_size: int
    mlp_dim: int
    num_experts: int = 8
    num_selected_experts: int = 2
    capacity_factor: float = 1.05

    @property
    def text(self) -> str:
        return (f"{self.name}: {self.tokens} tokens, D {self.hidden_size}, F {self.mlp_dim}, E {self.num_experts}, "
                f"K {self.num_selected_experts}, C {self.capacity_factor:g}")  # fmt: skip


B16 = LayerSize("B/16", 8 * 197, 768, 3072)
S32 = LayerSize("S/32", 8 * 50, 512, 2048)
QUICK_B16 = LayerSize("B/16 (small)", 256, 128, 512)
QUICK_S32 = LayerSize("S/32 (small)", 96, 64, 256, num_experts=4)


@dataclass(frozen=True)
class BuiltLayer:
    """A layer in evaluation mode, tokens (1, N, D), and the kept requests of each expert (E,)."""

    moe: MoE
    tokens: Tensor
    counts: list[int]

    @property
    def kept(self) -> int:
        return sum(self.counts)


def sizes(setup: Setup) -> tuple[LayerSize, LayerSize]:
    """The layer of V-MoE-B/16 and that of S/32, for eight images."""
    return (QUICK_B16, QUICK_S32) if setup.quick else (B16, S32)


def cases(setup: Setup) -> list[Case]:
    large, small = sizes(setup)
    many = replace(large, num_experts=4 * large.num_experts)
    inference = (
        ("bfloat16", large, 0.80, None),
        ("bfloat16", many, 1.0, None),
        ("float32", large, 0.50, 1.10),
        ("bfloat16", small, 1.10, None),
        ("float32", many, None, None),
        ("float32", small, None, None),
    )
    found = [_inference_case(setup, size, dtype, plain, pack) for dtype, size, plain, pack in inference]
    for dtype, autocast in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        found.append(_training_case(setup, large, dtype, autocast))
    return found


def _inference_case(
    setup: Setup, size: LayerSize, dtype: str, plain_limit: float | None, packed_limit: float | None
) -> Case:
    effort = setup.effort(30, 12.0)

    def target(limit: float | None) -> Target | None:
        return None if limit is None else setup.target(limit)

    def measure() -> list[Row]:
        return inference_rows(size, dtype, setup.device, effort, target(plain_limit), target(packed_limit))

    return Case("layer", f"inference {dtype} {size.text}", asdict(size) | asdict(effort) | {"dtype": dtype}, measure)


def inference_rows(
    size: LayerSize,
    dtype: str,
    device: torch.device,
    effort: Effort,
    plain_target: Target | None = None,
    packed_target: Target | None = None,
) -> list[Row]:
    """The layer without gradients over the plain dense MLP and, where oneDNN packs, over the packed one."""
    layer = build_layer(size, DTYPES[dtype], device)
    rows = _random(layer.kept, size.hidden_size, layer.tokens)
    parameters = mlp_parameters(size.hidden_size, size.mlp_dim, layer.tokens)
    calls: dict[str, Callable[[], Any]] = {
        "layer": lambda: layer.moe(layer.tokens),
        "dense": lambda: mlp(rows, parameters),
    }
    if can_pack(device):
        laid_out = packed(parameters)
        calls["packed"] = lambda: packed_mlp(rows, laid_out)
    with torch.no_grad():
        times = in_turns(calls, effort, device)
    names = {"dense": "dense F.linear MLP", "packed": "dense MLP with packed weights (oneDNN)"}
    targets = {"dense": plain_target, "packed": packed_target}
    return [
        Row(
            what=f"MoE layer / {name} of equal FLOPs, inference; {size.text}",
            value=times.ratio("layer", key),
            unit="ratio",
            dtype=dtype,
            ms=times.ms("layer"),
            reference_ms=times.ms(key),
            target=targets[key],
            flops=layer_flops(size, layer.kept),
            bytes=layer_bytes(size, DTYPES[dtype]),
            rounds=times.rounds,
            details={"kept_requests": layer.kept},
        )
        for key, name in names.items()
        if key in calls
    ]


def _training_case(setup: Setup, size: LayerSize, dtype: str, autocast: bool) -> Case:
    effort = setup.effort(15, 12.0)
    how = "autocast, float32 weights" if autocast else dtype
    target = setup.target(1.05)
    settings = asdict(size) | asdict(effort) | {"dtype": dtype, "autocast": autocast}

    def measure() -> list[Row]:
        return [training_row(size, dtype, autocast, setup.device, effort, target)]

    return Case("layer", f"forward+backward {how} {size.text}", settings, measure)


def training_row(
    size: LayerSize, dtype: str, autocast: bool, device: torch.device, effort: Effort, target: Target | None
) -> Row:
    """Forward and backward, gradients of tokens and parameters included, over those of the dense MLP."""
    layer = build_layer(size, torch.float32 if autocast else DTYPES[dtype], device)
    tokens = layer.tokens.requires_grad_()
    rows = _random(layer.kept, size.hidden_size, layer.tokens).requires_grad_()
    parameters = [p.requires_grad_() for p in mlp_parameters(size.hidden_size, size.mlp_dim, layer.tokens.detach())]
    context = torch.autocast(device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()

    def step(run: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], None]:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            with context:
                out = run()
            out.backward(grad.to(out.dtype))

        return call

    grads = [_random(len(x.view(-1, size.hidden_size)), size.hidden_size, layer.tokens) for x in (tokens, rows)]
    leaves = [tokens, *layer.moe.parameters()]
    calls = {
        "layer": step(lambda: layer.moe(tokens).tokens, leaves, grads[0].view_as(tokens)),
        "dense": step(lambda: mlp(rows, parameters), [rows, *parameters], grads[1]),
    }
    times = in_turns(calls, effort, device)
    how = "autocast over float32 weights" if autocast else f"{dtype} weights"
    return Row(
        what=f"MoE layer / dense F.linear MLP of equal FLOPs, forward+backward, {how}; {size.text}",
        value=times.ratio("layer", "dense"),
        unit="ratio",
        dtype=dtype,
        ms=times.ms("layer"),
        reference_ms=times.ms("dense"),
        target=target,
        flops=3 * layer_flops(size, layer.kept),
        bytes=3 * layer_bytes(size, torch.float32 if autocast else DTYPES[dtype]),
        rounds=times.rounds,
        details={"kept_requests": layer.kept},
    )


def build_layer(size: LayerSize, dtype: torch.dtype, device: torch.device) -> BuiltLayer:
    """A layer whose experts are about equally loaded, as training leaves them, without any noise.

    The gate's rows are orthonormal and the tokens normal, so the experts' logits are independent and alike.
    """
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=size.num_experts,
        layers=(0,),
        num_selected_experts=size.num_selected_experts,
        capacity_factor=size.capacity_factor,
    )
    moe = MoE(config, 0, size.hidden_size, size.mlp_dim)
    moe.reset_parameters()
    nn.init.orthogonal_(moe.router.gate.weight)
    moe = moe.to(device, dtype).eval()
    tokens = torch.randn(1, size.tokens, size.hidden_size).to(device, dtype)
    return BuiltLayer(moe, tokens, kept_counts(moe, tokens, moe.setting))


@torch.no_grad()
def kept_counts(moe: MoE, tokens: Tensor, setting: RoutingSetting) -> list[int]:
    """Requests that each expert keeps of tokens (1, N, D)."""
    routing = moe.router(tokens, setting)[0]
    return torch.bincount(routing.expert_index[routing.kept], minlength=moe.config.num_experts).tolist()


def layer_flops(size: LayerSize, kept: int) -> float:
    """Operations of the experts on the kept requests and of the router's product."""
    experts = 4.0 * kept * size.hidden_size * size.mlp_dim
    return experts + 2.0 * size.tokens * size.hidden_size * size.num_experts


def layer_bytes(size: LayerSize, dtype: torch.dtype) -> float:
    """All experts' weights, the tokens and the output, each once."""
    weights = 2 * size.num_experts * size.hidden_size * size.mlp_dim
    return float(dtype.itemsize * (weights + 2 * size.tokens * size.hidden_size))


def _random(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(like.detach())
