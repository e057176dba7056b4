"""A model without numbers, to be given stored ones: making random ones first would cost time for nothing."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
_FILLING = frozenset(
    f"{name}_" for name in ("uniform", "normal", "trunc_normal", "kaiming_uniform", "constant", "fill", "zero", "copy")
)


def skeleton(make: Callable[..., T], *arguments: Any) -> T:
    """make(*arguments) with all tensors on torch's meta device, their initialisation left out."""
    with torch.device("meta"), _Unfilled():
        return make(*arguments)


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
