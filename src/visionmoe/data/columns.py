"""Which columns of a table hold the images and the labels, and what the labels mean (Hugging Face's layout)."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_IMAGE_NAMES = ("image", "img", "images", "jpg", "png", "webp", "picture", "bytes", "content")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "y", "category")


def pick_columns(where: str, schema: pa.Schema, image: str | None, label: str | None) -> tuple[str, str]:
    """The names of the image and the label column: those asked for, else what the schema leaves no doubt about."""
    images = [field.name for field in schema if _holds_images(field.type)]
    labels = [field.name for field in schema if _holds_labels(field.type)]
    return _pick(where, "image", image, images, _IMAGE_NAMES, schema), _pick(
        where, "label", label, labels, _LABEL_NAMES, schema
    )


def needs_all_splits(schema: pa.Schema, label: str, names: list[str] | None) -> bool:
    """Whether the classes must be found in the labels of all splits: they are texts, or numbers without names.

    Where not, a split without labels (-1, as of some test images) does not keep others from being read.
    """
    return names is None or not pa.types.is_integer(schema.field(label).type)


def class_labels(
    where: str, columns: Mapping[str, pa.ChunkedArray], names: list[str] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The label columns of all splits -> int64 labels per split, and the class names.

    Text labels become their place among the sorted texts of all splits. Missing and negative labels are ValueErrors.
    """
    missing = [split for split, column in columns.items() if column.null_count]
    if missing:
        raise ValueError(f"{where}: split {missing[0]!r} has rows without a label")
    if any(not pa.types.is_integer(column.type) for column in columns.values()):
        texts = {split: column.cast(pa.string()) for split, column in columns.items()}
        unique = sorted({text for column in texts.values() for text in pc.unique(column).to_pylist()})
        values = pa.array(unique, pa.string())
        labels = {k: pc.index_in(column, value_set=values).to_numpy().astype(np.int64) for k, column in texts.items()}
        return labels, tuple(unique)
    labels = {split: column.to_numpy().astype(np.int64) for split, column in columns.items()}
    for split, values in labels.items():
        if values.min(initial=0) < 0:
            raise ValueError(f"{where}: split {split!r} has negative labels (no label?), they must be 0, 1, ...")
    highest = max(int(values.max(initial=0)) for values in labels.values())
    names = names or [str(i) for i in range(highest + 1)]
    if highest >= len(names):
        raise ValueError(f"{where}: label {highest} has no class name, there are {len(names)}")
    return labels, tuple(names)


def metadata_class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The class names that Hugging Face writes into a parquet file, None where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return None


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _pick(
    where: str, what: str, asked: str | None, possible: list[str], usual: tuple[str, ...], schema: pa.Schema
) -> str:
    if asked is not None:
        if asked in possible:
            return asked
        raise ValueError(f"{where}: {what}={asked} must be one of {', '.join(possible) or 'none'}")
    named = [name for name in usual if name in possible]
    if named or len(possible) == 1:
        return (named or possible)[0]
    if possible:
        raise ValueError(f"{where}: which column is the {what}? Say ?{what}= one of {', '.join(possible)}")
    raise ValueError(f"{where}: no column can be the {what}; there are {', '.join(schema.names)}")
