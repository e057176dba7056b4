"""Parameters (and gradients) between the reference's arrays and ours.

Every reference array is a view of (a part of) one of our tensors with its axes in another order, so translating is
placing blocks through views: linear, without arithmetic.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from visionmoe.checkpoint.errors import printable
from visionmoe.checkpoint.names import axis_sizes, rules
from visionmoe.checkpoint.vmoe_format import Block
from visionmoe.config import ModelConfig
from visionmoe.model.pretrained import empty_tensor

_SHOWN = 4  # names in an error
_COPY_BYTES = 1 << 20


def reference_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the reference's arrays by name."""
    sizes = axis_sizes(config)
    return {rule.reference_name: tuple(sizes[axis] for axis in rule.reference) for rule in rules(config)}


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by name: the `state_dict` of a model."""
    sizes = axis_sizes(config)
    shapes = {}
    for rule in rules(config):
        merged = [math.prod(sizes[axis] for axis in group.strip("()")) for group in _groups(rule.ours)]
        if merged:
            merged[0] *= rule.part[1]
        shapes[rule.our_name] = tuple(merged)
    return shapes


def reference_views(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Views of our tensors with the reference's names, shapes and axes: writing to one writes to `state`."""
    sizes = axis_sizes(config)
    views = {}
    for rule in rules(config):
        if rule.our_name in state:
            tensor = state[rule.our_name]
            if rule.part != (0, 1):
                number, of = rule.part
                tensor = tensor.chunk(of)[number]
            letters = re.sub(r"[()]", "", rule.ours)
            split = tensor.view([sizes[axis] for axis in letters])
            views[rule.reference_name] = split.permute(_order(letters, rule.reference))
    return views


def params_from_vmoe(
    flat: Mapping[str, np.ndarray | Tensor], config: ModelConfig, *, allow_missing_head: bool = False
) -> dict[str, Tensor]:
    """Our parameters from the reference's arrays ("a/b/c"); linear, so it maps gradients too.

    allow_missing_head: arrays without "head/..." are accepted, the result then has no head either.
    ValueError naming the arrays that are missing, too many or of the wrong shape.
    """
    arrays = {name: _tensor(a) for name, a in flat.items()}
    left_out = {"head"} if allow_missing_head and not any(n.startswith("head/") for n in arrays) else set()
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    check_arrays(shapes, config, left_out=left_out)
    state = {}
    for name, shape in our_shapes(config).items():
        if name.split(".")[0] not in left_out:
            dtypes = [arrays[r.reference_name].dtype for r in rules(config) if r.our_name == name]
            state[name] = empty_tensor(shape, max(dtypes, key=lambda dtype: dtype.itemsize))
    for name, view in reference_views(state, config).items():
        _copy(view, arrays[name].reshape(view.shape))
    return state


def params_to_vmoe(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """The reference's arrays from our parameters or gradients; the inverse of `params_from_vmoe`.

    The arrays have memory of their own. bfloat16, which numpy has not, becomes float32. ValueError for missing,
    additional or misshapen tensors.
    """
    return {
        name: (view.float() if view.dtype == torch.bfloat16 else view).contiguous().numpy().copy()
        for name, view in tensors_to_vmoe(state, config).items()
    }


def tensors_to_vmoe(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """As `params_to_vmoe`, but views of the tensors, which keep their dtype and memory."""
    _check_expressible(config)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    complain("the model's state", compare({n: tuple(t.shape) for n, t in state.items()}, our_shapes(config)))
    return reference_views(state, config)


def _check_expressible(config: ModelConfig) -> None:
    """The released format says nothing of these options, and the reference has only one value of each."""
    normalized = bool(config.moe.layers) and config.moe.normalize_combine_weights
    for name, value, only in (
        ("activation", config.activation, "gelu_tanh"),
        ("layer_norm_eps", config.layer_norm_eps, 1e-6),
        ("normalize_combine_weights", normalized, False),
    ):
        if value != only:
            raise ValueError(f"the released format has only models with {name} {only}, got {value}")


def check_arrays(
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    *,
    where: str = "the checkpoint",
    left_out: Iterable[str] = (),
) -> None:
    """Raises ValueError when arrays of these shapes are not those of a model; `left_out`: top-level names to ignore.

    An ensemble's router kernel may also be (D, E), as older checkpoints have it: the same numbers in the same order.
    """
    ignored = set(left_out)
    wanted = {n: s for n, s in reference_shapes(config).items() if n.split("/")[0] not in ignored}
    given = {n: s for n, s in shapes.items() if n.split("/")[0] not in ignored}
    for name, shape in wanted.items():
        if name.endswith("Router/dense/kernel") and given.get(name) == (shape[0], math.prod(shape[1:])):
            given[name] = shape
    complain(where, compare(given, wanted))


def compare(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, too much or misshapen, in words."""
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in given]
    extra = [f"{name} {shape}" for name, shape in given.items() if name not in wanted]
    wrong = [f"{n} is {given[n]}, not {s}" for n, s in wanted.items() if n in given and given[n] != s]
    kinds = (("missing", missing), ("not of this model", extra), ("wrong shape", wrong))
    return [f"{kind}: {_some(names)}" for kind, names in kinds if names]


def complain(where: str, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"{where} does not fit the config; {'; '.join(faults)}")


def place(blocks: Iterable[Block], views: Mapping[str, Tensor], bfloat16: Iterable[str] = ()) -> None:
    """Copies blocks of a file into views of parameters; `bfloat16`: names whose blocks are bits of bfloat16."""
    halves = set(bfloat16)
    for block in blocks:
        view = views[block.name]
        array = torch.from_numpy(block.array)
        if block.name in halves:
            array = array.view(torch.bfloat16)
        view[block.index].copy_(array)


def _copy(target: Tensor, source: Tensor) -> None:
    """target.copy_(source) part by part along the first axes: what is transposed stays in the processor's cache."""
    if source.nbytes <= _COPY_BYTES or not source.ndim:
        target.copy_(source)
        return
    rows = _COPY_BYTES * len(source) // source.nbytes
    for to, given in zip(target.split(rows) if rows else target, source.split(rows) if rows else source, strict=True):
        _copy(to, given)


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    array = np.require(array, requirements=["C", "W"])
    if array.dtype.name == "bfloat16":  # of the package ml_dtypes
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _groups(axes: str) -> list[str]:
    # "(HA)D" -> ["(HA)", "D"]
    return re.findall(r"\(\w+\)|\w", axes)


def _order(ours: str, reference: str) -> list[int]:
    """Where each axis of the reference is among ours; repeated "1"s keep their order."""
    if ours == reference:
        return list(range(len(ours)))
    return [ours.index(axis) for axis in reference]


def _some(names: list[str]) -> str:
    return printable(", ".join(names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
