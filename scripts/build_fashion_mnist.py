"""Builds the embedded images, src/visionmoe/data/fashion_mnist.npz, from Debian's package dataset-fashion-mnist.

    apt-get download dataset-fashion-mnist            # 0.0~git20200523.55506a9-1, MIT licence
    dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python scripts/build_fashion_mnist.py unpacked/usr/share/datasets/fashion-mnist

Takes the first 1,200 training and the first 200 test images of each class, in the order of the original files.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from visionmoe.files import atomic_write

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TARGET = Path(__file__).parents[1] / "src/visionmoe/data/fashion_mnist.npz"


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes: magic 0, 0, 8, axes; one big-endian int32 per axis; the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the first `count` images of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(CLASS_NAMES))]))


def build(idx_folder: Path, target: Path) -> None:
    arrays: dict[str, np.ndarray] = {"class_names": np.array(CLASS_NAMES)}
    for split, prefix, count in (("train", "train", 1200), ("test", "t10k", 200)):
        images = read_idx(idx_folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(idx_folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = first_of_each_class(labels, count)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    with atomic_write(target) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("idx_folder", type=Path, help="the folder with the four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    build(arguments.idx_folder, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")
