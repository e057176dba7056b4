"""A model without numbers, to be given stored ones: making random ones first would cost time for nothing."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from visionmoe.distributed.tensors import local, own_part

if TYPE_CHECKING:
    from visionmoe.model.vit import VisionTransformer

T = TypeVar("T")
_FILLING = frozenset(
    f"{name}_" for name in ("uniform", "normal", "trunc_normal", "kaiming_uniform", "constant", "fill", "zero", "copy")
)


def skeleton(make: Callable[..., T], *arguments: Any) -> T:
    """make(*arguments) with all tensors on torch's meta device, their initialisation left out."""
    with torch.device("meta"), _Unfilled():
        return make(*arguments)


def materialise(model: "VisionTransformer") -> None:
    """Gives a model with empty parameters, of which this process perhaps holds parts only, their first numbers from
    torch's generator.

    One layer at a time is there as a whole, on the CPU. The numbers are the same whatever the parts and the device.
    """
    model.reset_parameters(whole)


@contextlib.contextmanager
def whole(module: nn.Module, recurse: bool = True) -> Iterator[None]:
    """Within it the module has whole, empty parameters on the CPU; at its end its own get their parts of them."""
    own = [(inner, name, p) for inner in (module.modules() if recurse else [module])
           for name, p in inner.named_parameters(recurse=False)]  # fmt: skip
    for inner, name, parameter in own:
        inner._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
    try:
        yield
    finally:
        for inner, name, parameter in own:
            filled, inner._parameters[name] = inner._parameters[name], parameter
            assert filled is not None
            part = own_part(filled.to(local(parameter).device), parameter)
            local(parameter.detach()).copy_(part)


class _Unfilled(TorchFunctionMode):
    """Within it, what only gives values to a meta tensor returns it as it is."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function.__name__ in _FILLING:
            tensor = args[0] if args else options["tensor"]  # of torch.nn.init
            if tensor.is_meta:
                return tensor
        return function(*args, **options)
