"""Where a model comes from: one of our directories, a released checkpoint, or a dense ViT's .npz, alike to `load`."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from visionmoe.checkpoint.download import download
from visionmoe.checkpoint.mapping import check_arrays, compare, complain, our_shapes, place, reference_views
from visionmoe.checkpoint.names import rules
from visionmoe.checkpoint.npz import NpzReader
from visionmoe.checkpoint.registry import PUBLISHED
from visionmoe.checkpoint.vmoe_format import Block, VmoeReader
from visionmoe.config import ModelConfig, from_dict
from visionmoe.files import read_json
from visionmoe.model.hub import fetch, split_name
from visionmoe.model.pretrained import (
    CONFIG_NAME,
    FORMAT,
    Preprocessing,
    open_pretrained_weights,
    read_pretrained_config,
)
from visionmoe.model.tensor_file import Box

HUB = "hf-hub:"
_FLOATS = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


class Source(Protocol):
    """Stored parameters. config, preprocessing: the model that they belong to, and its images. class_names: of the
    head's outputs, None where the checkpoint does not say them."""

    config: ModelConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None

    def check(self, left_out: Iterable[str]) -> None:
        """Raises ValueError when the stored parameters are not the config's; `left_out`: top-level names to ignore."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a parameter (our name) is stored."""

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copies stored parameters into these tensors (our names)."""


class Reader(Protocol):
    """Arrays under the reference's names that are read block by block: `VmoeReader`, `NpzReader`."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def path(self) -> str: ...

    def blocks(self, names: Collection[str] | None = None) -> Iterator[Block]: ...


class DirectorySource:
    """config.json and model.safetensors, as `save_pretrained` writes them."""

    def __init__(self, directory: Path) -> None:
        stored = read_pretrained_config(directory)
        self.config, self.preprocessing = stored.model, stored.preprocessing or Preprocessing.of(stored.model)
        self.class_names = stored.class_names
        self.weights = open_pretrained_weights(directory)

    def check(self, left_out: Iterable[str]) -> None:
        ignored = set(left_out)
        shapes, wanted = (
            {n: s for n, s in shapes.items() if n.split(".")[0] not in ignored}
            for shapes in (self.weights.shapes, our_shapes(self.config))
        )
        complain(str(self.weights.path), compare(shapes, wanted))

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.tensors[name].dtype

    def fill(self, state: Mapping[str, Tensor]) -> None:
        self.weights.read_into(state)

    def read_box(self, name: str, box: Box, target: Tensor) -> None:
        """Fills `target`, of the box's shape, with a part of a parameter; only this part is read."""
        self.weights.read_box(name, box, target)

    def mapped(self) -> dict[str, Tensor]:
        """All parameters in the file's own memory (mapped, private), of which the system keeps what it has room for."""
        size = self.weights.path.stat().st_size
        memory = torch.from_file(str(self.weights.path), shared=False, size=size, dtype=torch.uint8)
        return {
            name: memory[stored.offset : stored.offset + stored.nbytes].view(stored.dtype).view(stored.shape)
            for name, stored in self.weights.tensors.items()
        }


class ReferenceSource:
    """Arrays under the reference's names. Of a whole training state only "params/..." is taken."""

    def __init__(self, reader: Reader, config: ModelConfig) -> None:
        self.config, self.preprocessing, self._reader = config, Preprocessing.of(config), reader
        self.class_names: tuple[str, ...] | None = None
        self._prefix = "params/" if "params/embedding/kernel" in reader.shapes else ""
        self._shapes = {
            name.removeprefix(self._prefix): shape
            for name, shape in reader.shapes.items()
            if name.startswith(self._prefix)
        }

    def check(self, left_out: Iterable[str]) -> None:
        check_arrays(self._shapes, self.config, where=self._reader.path, left_out=left_out)
        wrong = {n: d for n, d in self._reader.dtypes.items() if n.startswith(self._prefix) and d not in _FLOATS}
        for name, dtype in wrong.items():
            raise ValueError(f"{self._reader.path}: {name} has dtype {dtype}, allowed: {', '.join(_FLOATS)}")

    def dtype(self, name: str) -> torch.dtype:
        names = [self._prefix + rule.reference_name for rule in rules(self.config) if rule.our_name == name]
        dtypes = [_FLOATS[self._reader.dtypes[n]] for n in names]
        result = dtypes[0]
        for dtype in dtypes[1:]:
            result = torch.promote_types(result, dtype)
        return result

    def fill(self, state: Mapping[str, Tensor]) -> None:
        views = {self._prefix + name: view for name, view in reference_views(state, self.config).items()}
        # An ensemble's router kernel may be stored as (D, E).
        views = {n: v.flatten(1) if v.ndim > len(self._reader.shapes[n]) else v for n, v in views.items()}
        halves = [name for name, dtype in self._reader.dtypes.items() if dtype == "bfloat16"]
        place(self._reader.blocks(views), views, bfloat16=halves)


def open_source(
    path: str | os.PathLike,
    config: ModelConfig | str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Source:
    """Finds out what `path` is; reads descriptions only. See `visionmoe.load`."""
    path = os.fspath(path)
    if path.startswith(HUB):
        if config is not None:
            raise ValueError(f"{path} has a config of its own; config is for checkpoint prefixes")
        return DirectorySource(fetch(*split_name(path.removeprefix(HUB)), cache_dir))
    path = model_of_run(path)
    prefix = path.removesuffix(".index")
    has_index = os.path.isfile(f"{prefix}.index")
    if os.path.isfile(os.path.join(path, CONFIG_NAME)) or (os.path.isdir(path) and not has_index):
        if config is not None:
            raise ValueError(f"{path} is a directory with a config of its own; config is for checkpoint prefixes")
        return DirectorySource(Path(path))
    if path.endswith(".npz"):
        reader: Reader = NpzReader(path)
        if config is None:
            raise ValueError(f"{path} needs config=: a ModelConfig or a config.json")
        return ReferenceSource(reader, resolve_config(config))
    if not has_index:
        if path not in PUBLISHED:
            raise _unknown(path)
        prefix = os.fspath(download(path, cache_dir))
    vmoe = VmoeReader(prefix)
    if config is not None:
        return ReferenceSource(vmoe, resolve_config(config))
    entry = PUBLISHED.get(os.path.basename(prefix))
    if entry is None:
        raise ValueError(f"{prefix} needs config=: a ModelConfig or a config.json, ours or the reference's")
    # The configs of some pretraining runs are not public: whether they had this layer the checkpoint says.
    width = vmoe.shapes.get("pre_logits/bias", (None,))[0]
    return ReferenceSource(vmoe, entry.config.replace(representation_size=width))


def model_of_run(path: str) -> str:
    """PATH/model where `path` is the folder of a run that has one, else `path`."""
    model = os.path.join(path, "model")
    return model if os.path.isfile(os.path.join(model, CONFIG_NAME)) else path


def on_disk(path: str) -> bool:
    """Whether `path` is one of files that are here; False: it is fetched. FileNotFoundError where it is neither."""
    if path.startswith(HUB) or (path in PUBLISHED and not os.path.exists(path)):
        return False
    if not os.path.exists(path) and not os.path.isfile(f"{path}.index"):
        raise _unknown(path)
    return True


def _unknown(path: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path!r} is neither a directory, nor a checkpoint (no {path.removesuffix('.index')}.index), nor a published "
        f"name; published: {', '.join(PUBLISHED)}"
    )


def resolve_config(config: ModelConfig | str | os.PathLike) -> ModelConfig:
    """A model's config from a config.json: one of ours, of a run, or of the reference ("model" with "image_size")."""
    if isinstance(config, ModelConfig):
        return config
    path = Path(config)
    path = path / CONFIG_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: config must be a ModelConfig or a config.json")
    data = read_json(path)
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return read_pretrained_config(path).model
    try:
        return _from_table(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_table(data: Any) -> ModelConfig:
    model = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(model, dict):
        raise ValueError(f"a model's config must be a table of options, got {model!r:.60}")
    if "encoder" in model:
        return ModelConfig.from_reference(model, image_size=_image_size(data.get("image_size")))
    return from_dict(ModelConfig, model)


def _image_size(value: Any) -> int | tuple[int, int] | None:
    return tuple(value) if isinstance(value, list) else value
