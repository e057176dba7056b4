"""oneDNN's linear layer on a CPU: GELU inside the product, and weights that are laid out for it once.

oneDNN, and MKL too, multiply by weights in a layout of their own. They would bring them into it on every call, which
costs as much as the product of a few rows (float32) or a few hundred (bfloat16); `PackedWeights` keeps them instead.
decisions/0012 has the measurements.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

FUSED_PRODUCT = 1 << 27  # multiply-adds of a float32 product from which on a new kernel's making does not matter
PACKED_SIZE = 1 << 18  # values of a float32 weight from which on packing pays
PACKED_ROWS = 256  # of a float32 product up to which packing pays where MKL is fast
MAX_PACKED_BYTES = 512 << 20  # of one stack of weights: larger ones are not held twice
_SAMPLES_PER_EXPERT = 16
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """x @ weight.T + bias, with GELU behind it where its form is given ("tanh" or "none"). (..., in) -> (..., out).

    No gradients. weight is plain, or packed by `PackedWeights` for the dtype of x.
    """
    if weight.is_mkldnn or uses_onednn(x, weight, x.numel() // x.shape[-1], gelu is not None):
        weight = weight if weight.is_mkldnn else weight.to(x.dtype)
        return _LINEAR(x, weight, bias, *(("none", [], "") if gelu is None else ("gelu", [], gelu)))
    out = F.linear(x, weight.to(x.dtype), bias)
    return out if gelu is None else F.gelu(out, approximate=gelu)


def uses_onednn(x: Tensor, weight: Tensor, rows: int, gelu: bool) -> bool:
    """Whether oneDNN's product pays for `rows` times a plain `weight` (..., out, in), and is there.

    In bfloat16 always. In float32 MKL makes large products as fast, but not GELU inside them; but for other makers'
    CPUs than Intel's MKL has no AVX-512 code, there oneDNN makes them all.
    """
    if not _can_use(x, weight):
        return False
    large = rows * weight.shape[-1] * weight.shape[-2] >= FUSED_PRODUCT
    return x.dtype == torch.bfloat16 or (large and (gelu or mkl_is_slow()))


def _can_use(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's linear layer is there for these tensors."""
    if x.device.type != "cpu" or not available():
        return False
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter):  # fake, sharded or wrapped
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A copy of weight (out, in) in oneDNN's own layout, for `linear`. Where it is `available`."""
    return _PACK(weight, None)


def available() -> bool:
    """Whether this torch has oneDNN's linear layer, and may use it now: it has no forward-mode derivative, and no rule
    of torch.func."""
    found = _LINEAR is not None and _PACK is not None and bool(torch.backends.mkldnn.enabled)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return found and not transformed and not torch.jit.is_tracing()


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is an x86 CPU of another maker than Intel: MKL takes its AVX2 code there."""
    try:
        return torch.backends.mkl.is_available() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class PackedWeights:
    """Every expert's weight as the products want it: packed for oneDNN where that pays, else as it is.

    Packed weights are made at first use, and again when the parameter has changed: by its address, its version (every
    in-place operation counts it up) and some of its values, which sees what changes all of it through `.data`. Who
    changes single values through `.data` calls `release` afterwards. Copies of a model start without packed weights,
    and training releases them.
    """

    def __init__(self) -> None:
        self._origin: tuple[int, int, torch.dtype] | None = None
        self._sample = torch.empty(0)
        self._packed: list[Tensor] = []

    def release(self) -> None:
        """Gives the memory back."""
        self._origin, self._packed = None, []

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeights, ()

    def of(self, weight: Tensor, x: Tensor, rows: int) -> Sequence[Tensor]:
        """weight (E, out, in) of any dtype -> E weights, packed in the dtype of x, or as they are.

        rows: of x that each of them gets on average.
        """
        if not _packs(weight, x, rows):
            return weight.unbind()
        origin = (weight.data_ptr(), weight._version, x.dtype)
        if self._origin != origin or not torch.equal(self._sample, _sample(weight)):
            packed = [pack(part.detach().to(x.dtype)) for part in weight]
            # the origin last: until then another thread packs for itself
            self._packed, self._sample, self._origin = packed, _sample(weight).clone(), origin
        return self._packed


def _packs(weight: Tensor, x: Tensor, rows: int) -> bool:
    """In bfloat16 always. In float32 large weights for few rows, and for any number of them where MKL is slow."""
    size = weight.numel() * x.element_size()
    if size > MAX_PACKED_BYTES or not weight.is_contiguous() or weight.is_inference() or not _can_use(x, weight):
        return False
    few = rows <= PACKED_ROWS or mkl_is_slow()
    return x.dtype == torch.bfloat16 or (few and weight.numel() >= PACKED_SIZE * len(weight))


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().view(-1)
    step = max(1, len(flat) // (_SAMPLES_PER_EXPERT * len(weight))) | 1  # odd: not the same column in every row
    return flat[::step]


class Linear(nn.Linear):
    """torch.nn.Linear that can hold GELU; without gradients on a CPU by oneDNN with packed weights where that pays."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.packed = PackedWeights()

    def forward(self, x: Tensor, gelu: str | None = None) -> Tensor:
        """(..., in) -> (..., out), behind GELU where its form is given, "tanh" or "none"."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            self.packed.release()
            out = super().forward(x)
            return out if gelu is None else F.gelu(out, approximate=gelu)
        x = autocast(x)
        weight = self.packed.of(self.weight[None], x, x.numel() // x.shape[-1])[0]
        return linear(x, weight, self.bias.to(x.dtype), gelu)


def autocast(x: Tensor) -> Tensor:
    """Casts as autocast, where it is on, would cast for a matrix product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _linear_flop(x_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **options: Any) -> int:
    return mm_flop((math.prod(x_shape[:-1]), x_shape[-1]), (weight_shape[1], weight_shape[0]))


if _LINEAR is not None and _LINEAR not in flop_registry:
    register_flop_formula(_LINEAR)(_linear_flop)  # so that torch's FlopCounterMode sees these products
