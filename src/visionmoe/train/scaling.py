"""How each optimizer turns gradients into updates: Adam, SGD with momentum, and big_vision's Adafactor.

A `Scaling` updates a list of parameters in place, p <- p - rate * (scaled gradient + weight_decay * p); its state is
a dict of tensors per parameter. torch's `_foreach_` operations keep the number of kernels small. Of parameters that are
DTensors every process updates, and keeps the state of, its own part.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from visionmoe.config import check_names, from_dict
from visionmoe.distributed.tensors import local

State = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Scaling(Protocol):
    """step counts the updates already made; the lists belong together, element by element."""

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        *,
        step: int,
        rate: float,
        weight_decay: float,
    ) -> None: ...


def create_scaling(name: str, parameters: dict[str, Tensor], options: dict[str, Any]) -> Scaling:
    """Returns the scaling `name`; unknown names, options and values are ValueErrors."""
    classes: dict[str, Any] = {
        "adam": Adam,
        "adamw": Adam,
        "sgd": SGD,
        "big_vision_adafactor": Adafactor,
        "adafactor": Adafactor,
    }
    if name not in classes:
        check_names("the optimizer's name", [name], classes)
    cls = classes[name]
    known = [f for f in cls.__dataclass_fields__ if f != "plans"]
    given = {k: v for k, v in options.items() if v is not None or k == "momentum"}
    check_names(f"optimizer {name!r}", given, known)
    if cls is not Adafactor:
        return from_dict(cls, given, "optimizer.options")
    scaling = from_dict(Adafactor, {"plans": {}, **given}, "optimizer.options")
    scaling.plans = {p: factor_plan(n, p, scaling.min_dim_size_to_factor) for n, p in parameters.items()}
    return scaling


@dataclass
class Adam:
    """arXiv 1412.6980, as optax.scale_by_adam; mu_dtype stores the first moment in another type."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    mu_dtype: str | None = None

    def __post_init__(self) -> None:
        _check_rates(self, "b1", "b2")
        _check_dtype(self, "mu_dtype")

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        *,
        step: int,
        rate: float,
        weight_decay: float,
    ) -> None:
        params, grads = [local(p) for p in params], [local(g) for g in grads]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["mu"] = torch.zeros_like(param, dtype=DTYPES[self.mu_dtype] if self.mu_dtype else None)
                state["nu"] = torch.zeros_like(param)
        mus, nus = [s["mu"] for s in states], [s["nu"] for s in states]
        if self.mu_dtype is None and self.eps_root == 0.0:
            # torch's own kernel, one pass over the memory; it counts the steps up by itself
            steps = torch.full((len(params),), float(step), device=params[0].device).unbind()
            adamw(params, grads, mus, nus, [], list(steps), fused=params[0].is_floating_point(), amsgrad=False,
                  beta1=self.b1, beta2=self.b2, lr=rate, weight_decay=weight_decay, eps=self.eps,
                  maximize=False)  # fmt: skip
            return
        new_mus = [m.mul(self.b1).to(g.dtype).add_(g, alpha=1 - self.b1) for m, g in zip(mus, grads, strict=True)]
        torch._foreach_copy_(mus, new_mus)
        torch._foreach_mul_(nus, self.b2)
        torch._foreach_addcmul_(nus, grads, grads, 1 - self.b2)
        roots = torch._foreach_div(nus, 1 - self.b2 ** (step + 1))
        torch._foreach_add_(roots, self.eps_root)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.eps)
        torch._foreach_div_(new_mus, 1 - self.b1 ** (step + 1))
        torch._foreach_div_(new_mus, roots)
        _apply(params, list(new_mus), rate, weight_decay)


@dataclass
class SGD:
    """Gradient descent, with momentum as optax.trace: trace <- gradient + momentum * trace."""

    momentum: float | None = 0.0
    nesterov: bool = False
    accumulator_dtype: str | None = None

    def __post_init__(self) -> None:
        _check_rates(self, "momentum")
        _check_dtype(self, "accumulator_dtype")

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        *,
        step: int,
        rate: float,
        weight_decay: float,
    ) -> None:
        params, grads = [local(p) for p in params], [local(g) for g in grads]
        updates = grads
        if self.momentum:
            dtype = DTYPES[self.accumulator_dtype] if self.accumulator_dtype else None
            for param, state in zip(params, states, strict=True):
                if not state:
                    state["trace"] = torch.zeros_like(param, dtype=dtype)
            traces = [s["trace"] for s in states]
            updates = [t.mul(self.momentum).to(g.dtype).add_(g) for t, g in zip(traces, grads, strict=True)]
            torch._foreach_copy_(traces, updates)
            if self.nesterov:
                updates = list(torch._foreach_add(grads, updates, alpha=self.momentum))
        _apply(params, updates, rate, weight_decay)


@dataclass(frozen=True)
class FactorPlan:
    """The reference's array behind one of our parameters, and the two axes whose second moment is factored.

    view: shape in which our parameter shows the reference's axes (fused q, k and v in front, as a batch axis).
    row, column: axes of `view`; None: the second moment is kept whole.
    """

    view: tuple[int, ...]
    row: int | None = None
    column: int | None = None


@dataclass
class Adafactor:
    """big_vision's Adafactor (arXiv 2106.04560, section 3.4; V-MoE-15B's optimizer), as optax.scale_by_factored_rms.

    Second moment with decay min(decay_rate_max, 1 - t^-decay_rate), factored over the two largest axes of the
    REFERENCE's array when both have min_dim_size_to_factor elements, never over the experts; then momentum.
    """

    plans: dict[Tensor, FactorPlan] = field(repr=False)
    decay_rate: float = 0.8
    decay_rate_max: float = 0.999
    decay_offset: int = 0
    eps: float = 1e-30
    min_dim_size_to_factor: int = 32
    momentum: float | None = 0.9
    momentum_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_rates(self, "decay_rate_max", "momentum")
        _check_dtype(self, "momentum_dtype")

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        *,
        step: int,
        rate: float,
        weight_decay: float,
    ) -> None:
        decay = min(self.decay_rate_max, 1.0 - max(1.0, step - self.decay_offset + 1.0) ** -self.decay_rate)
        updates = [self._scaled(self.plans[p], g, s, decay) for p, g, s in zip(params, grads, states, strict=True)]
        if self.momentum:
            for update, state in zip(updates, states, strict=True):
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(update, dtype=DTYPES[self.momentum_dtype])
            averages = [s["momentum"] for s in states]
            updates = [
                a.mul(self.momentum).to(u.dtype).add_(u, alpha=1 - self.momentum)
                for a, u in zip(averages, updates, strict=True)
            ]
            torch._foreach_copy_(averages, updates)
        _apply([local(p) for p in params], updates, rate, weight_decay)

    def _scaled(self, plan: FactorPlan, grad: Tensor, state: State, decay: float) -> Tensor:
        """The gradient divided by the root of its (factored) running second moment: this process's part of it."""
        row, column = plan.row, plan.column
        if row is None or column is None:
            grad = local(grad)
            second = _running(state, "second", grad.float().square().add_(self.eps), decay)
            return grad * second.rsqrt().to(grad.dtype)
        whole, back = gathered(grad, plan)
        view = (-1, *plan.view[1:])
        square = whole.float().square().add_(self.eps).view(view)
        rows = _running(state, "rows", square.mean(dim=column, keepdim=True), decay)
        columns = _running(state, "columns", square.mean(dim=row, keepdim=True), decay)
        scale = (rows / rows.mean(dim=row, keepdim=True)).rsqrt_() * columns.rsqrt()
        return back((whole.view(view) * scale.to(grad.dtype)).view(whole.shape))


def gathered(grad: Tensor, plan: FactorPlan) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A gradient with the axes whole that Adafactor takes means over, and the way from there to this process's part."""
    if not hasattr(grad, "placements"):
        return grad, lambda update: update
    from torch.distributed.tensor import DTensor

    assert isinstance(grad, DTensor)
    mesh, own, wanted = grad.device_mesh, grad.placements, factored_placements(grad, plan)

    def back(update: Tensor) -> Tensor:
        return DTensor.from_local(update, mesh, wanted, run_check=False).redistribute(placements=own).to_local()

    return grad.redistribute(placements=wanted).to_local(), back


def state_placements(scaling: Scaling, param: Tensor, name: str) -> list[Any] | None:
    """How the state `name` of a DTensor is divided; None: as the parameter."""
    if isinstance(scaling, Adafactor) and name in ("rows", "columns") and hasattr(param, "placements"):
        return factored_placements(param, scaling.plans[param])
    return None


def factored_placements(tensor: Any, plan: FactorPlan) -> list[Any]:
    """How the factored state of a DTensor lies: divided over the first axis only, and only if that is not factored."""
    from torch.distributed.tensor import Replicate

    free = 0 not in (plan.row, plan.column) and plan.view[0] == tensor.shape[0]
    return [p if free and p.is_shard(0) else Replicate() for p in tensor.placements]


_PLANS = (
    # pattern, whether the first axis of ours fuses q, k, v (or k, v), the reference's axes in its order:
    # o = our rows, split in heads h and their width d where the reference has them apart; i = our columns
    (r"(^|\.)(attn\.qkv|attn_pool\.(q|kv))\.weight$", "fhdi", "ihd"),
    (r"(^|\.)(attn\.qkv|attn_pool\.(q|kv))\.bias$", "fhd", "hd"),
    (r"(^|\.)(attn|attn_pool)\.proj\.weight$", "ohd", "hdo"),
    (r"(^|\.)patch_embed\.proj\.weight$", "oihw", "hwio"),
    (r"(^|\.)experts\.fc[12]\.weight$", "eoi", "io"),
    (r"(^|\.)router\.mu$", "epi", "ip"),
    (r"(^|\.)(experts\.fc[12]\.bias|router\.gate\.weight)$", "eo", ""),
    (r"(^|\.)pos_embed$|latent$|cls_token$", "abc", "abc"),
)


def factor_plan(name: str, param: Tensor, min_dim_size_to_factor: int) -> FactorPlan:
    """The plan for our parameter `name`: which two axes Adafactor factors, as the reference would.

    Attention parameters need the number of heads, which their shape hides: VisionTransformer.named_parameters
    marks them with it (`param.num_heads`).
    """
    axes, reference = "oi"[: param.dim()], "io"[-param.dim() :] if param.dim() else ""
    for pattern, ours, theirs in _PLANS:
        if re.search(pattern, name):
            axes, reference = ours, theirs
    view = tuple(param.shape)
    if "d" in axes:
        view = _split_heads(name, param, axes)
    elif len(axes) != param.dim():  # a parameter of another model: its own axes
        axes = reference = "abcdefgh"[: param.dim()]
    sizes = sorted(reference, key=lambda axis: view[axes.index(axis)])  # stable, as the reference's
    if len(sizes) < 2 or view[axes.index(sizes[-2])] < min_dim_size_to_factor:
        return FactorPlan(view)
    return FactorPlan(view, row=axes.index(sizes[-2]), column=axes.index(sizes[-1]))


def _split_heads(name: str, param: Tensor, axes: str) -> tuple[int, ...]:
    heads = getattr(param, "num_heads", None)
    if heads is None:
        raise ValueError(f"Adafactor needs the number of heads of {name}: give it model.named_parameters()")
    if axes == "ohd":
        return (param.shape[0], heads, param.shape[1] // heads)
    fused = {"qkv": 3, "kv": 2, "q": 1}[name.rsplit(".", 2)[-2]]
    return (fused, heads, param.shape[0] // fused // heads, *param.shape[1:])


def _running(state: State, name: str, value: Tensor, decay: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].mul_(decay).add_(value, alpha=1.0 - decay)


def _apply(params: list[Tensor], updates: list[Tensor], rate: float, weight_decay: float) -> None:
    """p <- p - rate * (update + weight_decay * p)."""
    if weight_decay:
        torch._foreach_mul_(params, 1.0 - rate * weight_decay)
    torch._foreach_add_(params, updates, alpha=-rate)


def _check_rates(scaling: Any, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be >= 0 and < 1, got {value}")


def _check_dtype(scaling: Any, name: str) -> None:
    value = getattr(scaling, name)
    if value is not None and value not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
