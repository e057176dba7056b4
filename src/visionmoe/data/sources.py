"""Where images come from. `open_source("folder:PATH", "train[:99%]")` gives labelled images by number."""

import importlib.resources
import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image

from visionmoe.config import check_names
from visionmoe.data.config import MAX_PIXELS
from visionmoe.data.decode import SUFFIXES, BrokenImageError, decode_image
from visionmoe.data.order import Pieces
from visionmoe.data.splits import canonical_name, parse_split, slice_indices
from visionmoe.files import one_line

KINDS = "fashion-mnist, folder:PATH, parquet:PATH, wds:SHARDS, torchvision:NAME, hf:NAME, hf-stream:NAME"
DEFAULT_CACHE = Path("~/.cache/visionmoe")


class Source(ABC):
    """Labelled images. labels: int64 (N,). class_names: one name per label.

    pieces: which images are cheap to read together; None: each costs the same in any order.
    """

    def __init__(self, labels: np.ndarray, class_names: tuple[str, ...], pieces: Pieces | None = None):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray | Image.Image:
        """The image as it is stored: the bytes of its file, a uint8 array, or a Pillow image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person needs to find the image: its path, or its file and row."""

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def batch_done(self) -> None:  # noqa: B027
        """Says that a batch has been read: what the last batches did not need may be forgotten."""

    def decode(self, index: int, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """The image as uint8 (H, W, channels). Raises BrokenImageError, also when its file cannot be read."""
        try:
            return decode_image(self.read(index), channels, max_pixels)
        except OSError as error:
            raise BrokenImageError(one_line(error.strerror or error)) from None


class Slice(Source):
    """Some images of another source, which keep their names and classes."""

    def __init__(self, source: Source, indices: np.ndarray):
        pieces = source.pieces and source.pieces.taking(indices)
        super().__init__(source.labels[indices], source.class_names, pieces)
        self.source, self.indices = source, indices

    def read(self, index: int) -> bytes | np.ndarray | Image.Image:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def batch_done(self) -> None:
        self.source.batch_done()


class ArraySource(Source):
    """Images held in memory. images: uint8 (N, H, W) or (N, H, W, C)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], title: str = "image"):
        super().__init__(labels, class_names)
        self.images, self.title = images, title

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.title} {index}"


class FolderSource(Source):
    """Image files below one folder per class."""

    def __init__(self, root: Path, files: list[str], labels: np.ndarray, class_names: tuple[str, ...]):
        super().__init__(labels, class_names)
        self.root = root
        # One array instead of millions of str: workers would copy every page whose reference counts they touch.
        self.files = np.array([os.fsencode(file) for file in files])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[index].item()))


def open_source(spec: str, split: str = "train") -> Source:
    """Opens the images of one split.

    spec is one of
      fashion-mnist                        embedded: 12,000 training and 2,000 test images, 28 x 28, grey
      folder:PATH                          PATH/CLASS/**/*.png, or PATH/{train,val,test}/CLASS/**/*.png
      parquet:PATH?image=COLUMN&label=COLUMN      a file, or a folder with train*.parquet, test*.parquet, ...
      wds:PATH/train-{0000..0127}.tar      WebDataset shards: braces, wildcards, folders, several joined by "::"
      torchvision:CIFAR10?root=DIR&download=1     a data set class of torchvision
      hf:NAME?config=CONFIG&image=COLUMN&label=COLUMN   a data set of the Hugging Face hub, or a folder of one
      hf-stream:NAME?revision=COMMIT&...   the same, read from the hub as needed: nothing is downloaded beforehand
    split is as in tfds: "train", "test", "train[:99%]", "train[100:200]", "train[-10%:]".
    Raises ValueError or FileNotFoundError with one line that says what is allowed.
    """
    kind, _, place = spec.partition(":")
    place, options = _options(place)
    if not place and kind != "fashion-mnist":
        raise ValueError(f"data must be one of {KINDS}, got {spec!r}")
    if kind == "fashion-mnist" and not place:
        check_names(f"data {spec!r}", options, ())
        name, start, stop = parse_split(split, ("train", "test"))
        source: Source = open_fashion_mnist(name)
    elif kind == "folder":
        check_names(f"data {spec!r}", options, ())
        source, start, stop = open_folder(Path(place), split)
    elif kind == "parquet":
        from visionmoe.data.parquet import open_parquet

        check_names(f"data {spec!r}", options, ("image", "label"))
        source, start, stop = open_parquet(Path(place), split, **options)
    elif kind == "wds":
        from visionmoe.data.webdataset import open_wds

        check_names(f"data {spec!r}", options, ())
        source, start, stop = open_wds(place, split)
    elif kind == "torchvision":
        from visionmoe.data.libraries import open_torchvision

        check_names(f"data {spec!r}", options, ("root", "download"))
        source, start, stop = open_torchvision(place, split, **options)
    elif kind == "hf":
        from visionmoe.data.libraries import open_huggingface

        check_names(f"data {spec!r}", options, ("config", "image", "label"))
        source, start, stop = open_huggingface(place, split, **options)
    elif kind == "hf-stream":
        try:
            from visionmoe.data.hub import open_hub
        except ImportError:
            raise ValueError("hf-stream: data needs the packages pyarrow and datasets (pip install datasets)") from None
        check_names(f"data {spec!r}", options, ("config", "image", "label", "revision"))
        source, start, stop = open_hub(place, split, **options)
    else:
        raise ValueError(f"data must be one of {KINDS}, got {spec!r}")
    if not len(source):
        raise ValueError(f"{spec} has no images in split {split!r}")
    if start is None and stop is None:
        return source
    return Slice(source, slice_indices(start, stop, source.labels))


def may_download(spec: str) -> bool:
    """Whether a library may fetch the images of `spec` before they can be opened."""
    return spec.startswith(("hf:", "torchvision:"))


def open_fashion_mnist(split: str) -> ArraySource:
    """The embedded images (see fashion_mnist.LICENSE.txt); split is "train" or "test"."""
    path = importlib.resources.files("visionmoe.data") / "fashion_mnist.npz"
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        names = tuple(str(name) for name in data["class_names"])
        return ArraySource(data[f"{split}_images"], data[f"{split}_labels"], names, f"fashion-mnist {split} image")


def open_folder(root: Path, split: str) -> tuple[FolderSource, str | None, str | None]:
    """The images below `root`, and the boundaries of the slice that `split` asks for."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = {canonical_name(d.name): d for d in _folders(root) if canonical_name(d.name) in ("train", "val", "test")}
    splits = found or {"train": root}
    name, start, stop = parse_split(split, splits)
    class_names = tuple(sorted({d.name for place in splits.values() for d in _folders(place)}))
    files: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        folder = splits[name] / class_name
        if not folder.is_dir():
            continue  # another split has the class
        images = _image_files(folder)
        if not images:
            raise ValueError(f"class folder {folder} has no images ({', '.join(SUFFIXES)})")
        files += [os.path.relpath(image, root) for image in images]
        labels += [label] * len(images)
    if not files:
        raise ValueError(f"{splits[name]} must hold one folder of images per class, found no folder")
    return FolderSource(root, files, np.array(labels), class_names), start, stop


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    return sorted(
        os.path.join(where, file)
        for where, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(SUFFIXES) and not file.startswith(".")
    )


def _options(place: str) -> tuple[str, dict[str, str]]:
    """Cuts "PATH?a=1&b=2" into the path and its options."""
    place, _, query = place.partition("?")
    options = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise ValueError(f"options after ? must look like name=value, got {pair!r}")
        options[key] = value
    return place, options
