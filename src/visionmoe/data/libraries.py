"""Data sets that other libraries know by name: torchvision's and the Hugging Face hub's."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionmoe.data.sources import DEFAULT_CACHE, Source
from visionmoe.data.splits import canonical_name, parse_split
from visionmoe.files import one_line


class TorchvisionSource(Source):
    """A torchvision data set whose items are (Pillow image, class number)."""

    def __init__(self, dataset: Any, title: str):
        labels = next((getattr(dataset, a) for a in ("targets", "labels", "_labels", "y") if hasattr(dataset, a)), None)
        if labels is None:
            labels = [int(dataset[i][1]) for i in range(len(dataset))]
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
            raise ValueError(f"{title} has no class numbers; choose a classification data set")
        names = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
        super().__init__(labels, tuple(str(name) for name in names))
        self.dataset, self.title = dataset, title

    def read(self, index: int) -> Image.Image:
        return self.dataset[index][0]

    def name(self, index: int) -> str:
        return f"{self.title} image {index}"


def open_torchvision(
    name: str, split: str, root: str | None = None, download: str = "0"
) -> tuple[Source, str | None, str | None]:
    """torchvision.datasets.NAME; `download` "1" lets torchvision fetch it."""
    from torchvision import datasets

    cls = getattr(datasets, name, None)
    if name.startswith("_") or not isinstance(cls, type):
        raise ValueError(f"torchvision has no data set {name!r}; names are those of torchvision.datasets, as CIFAR10")
    parameters = inspect.signature(cls).parameters
    if "train" not in parameters and "split" not in parameters:
        raise ValueError(f"torchvision's {name} has no train and test splits")
    allowed = ("train", "test") if "train" in parameters else ("train", "val", "test")
    which, start, stop = parse_split(split, allowed)
    options: dict[str, Any] = {"train": which == "train"} if "train" in parameters else {"split": which}
    if "download" in parameters:
        options["download"] = _flag("download", download)
    place = Path(root).expanduser() if root else DEFAULT_CACHE.expanduser() / "torchvision"
    try:
        dataset = cls(str(place), **options)
    except RuntimeError as error:
        raise ValueError(f"torchvision:{name} in {place}: {one_line(error)}; '?download=1' downloads it") from None
    return TorchvisionSource(dataset, f"torchvision:{name} {which}"), start, stop


class HuggingFaceSource(Source):
    """A split of a `datasets` data set, its images left undecoded."""

    def __init__(self, dataset: Any, image: str, labels: np.ndarray, names: tuple[str, ...], title: str):
        super().__init__(labels, names)
        self.dataset, self.image, self.title = dataset, image, title

    def read(self, index: int) -> bytes:
        cell = self.dataset[index][self.image]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def name(self, index: int) -> str:
        return f"{self.title} row {index}"


def open_huggingface(
    name: str, split: str, config: str | None = None, image: str | None = None, label: str | None = None
) -> tuple[Source, str | None, str | None]:
    """`datasets.load_dataset(name, config)`; loading scripts (code from outside) are never run."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError("hf: data needs the package datasets (pip install datasets)") from None
    from visionmoe.data.columns import (
        class_labels,
        needs_all_splits,
        pick_columns,
    )  # needs pyarrow, which datasets brings

    try:
        splits = datasets.load_dataset(name, config)
    except (ValueError, OSError):
        raise
    except Exception as error:  # datasets and huggingface_hub have many errors of their own
        raise ValueError(f"hf:{name}: {one_line(error)}") from None
    by_name = {canonical_name(key): key for key in splits}
    which, start, stop = parse_split(split, by_name)
    table = splits[by_name[which]]
    image, label = pick_columns(f"hf:{name}", table.features.arrow_schema, image, label)
    table = table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    feature = table.features[label]
    given = getattr(feature, "names", None)
    keys = splits if needs_all_splits(table.features.arrow_schema, label, given) else [by_name[which]]
    columns = {key: splits[key].data.column(label) for key in keys}
    labels, names = class_labels(f"hf:{name}", columns, given)
    return HuggingFaceSource(table, image, labels[by_name[which]], names, f"hf:{name} {which}"), start, stop


def _flag(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"
