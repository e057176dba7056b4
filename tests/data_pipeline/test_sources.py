"""Every kind of source, on real files."""

import gzip
import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from visionmoe.data.parquet import ParquetSource
from visionmoe.data.sources import open_source

ROOT = Path(__file__).parents[2]


def png(value: int, size: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path, values: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        (folder / f"{value:03d}.png").write_bytes(png(value))


def write_parquet(path: Path, values: list[int], labels: list, group: int = 2, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(value), "path": f"{value}.png"} for value in values]
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=group, **options)


# The embedded images


def test_fashion_mnist() -> None:
    start = time.perf_counter()
    train, test = open_source("fashion-mnist", "train"), open_source("fashion-mnist", "test")
    assert time.perf_counter() - start < 5
    assert (len(train), len(test)) == (12000, 2000)
    assert np.bincount(train.labels).tolist() == [1200] * 10 and np.bincount(test.labels).tolist() == [200] * 10
    assert train.class_names[9] == "Ankle boot" and train.label(0) == 9  # the original's first training image
    assert train.decode(0, channels=1).shape == (28, 28, 1) and train.decode(0).shape == (28, 28, 3)
    assert train.name(3) == "fashion-mnist train image 3"


def test_fashion_mnist_file_is_small_and_has_its_notice() -> None:
    folder = ROOT / "src/visionmoe/data"
    assert (folder / "fashion_mnist.npz").stat().st_size < 8e6
    assert "MIT License" in (folder / "fashion_mnist.LICENSE.txt").read_text(encoding="utf-8")


def test_fashion_mnist_is_what_the_script_builds(tmp_path: Path) -> None:
    default = "/usr/share/datasets/fashion-mnist"
    idx = Path(os.environ.get("VISIONMOE_FASHION_MNIST_IDX", default))
    if not idx.is_dir():
        pytest.skip(
            f"no IDX files at {idx} (install Debian's dataset-fashion-mnist or set VISIONMOE_FASHION_MNIST_IDX)"
        )
    script = ROOT / "scripts/build_fashion_mnist.py"
    subprocess.run([sys.executable, script, idx, "--out", tmp_path / "built.npz"], check=True)
    # Arrays, not bytes: another zlib packs the same arrays differently.
    with np.load(tmp_path / "built.npz") as built, np.load(ROOT / "src/visionmoe/data/fashion_mnist.npz") as kept:
        assert sorted(built) == sorted(kept)
        for name in kept:
            np.testing.assert_array_equal(built[name], kept[name])


def test_script_is_deterministic_and_balanced(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 15000), ("t10k", 3000)):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 2, (count, 2, 2), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    spec = importlib.util.spec_from_file_location("build_fashion_mnist", ROOT / "scripts/build_fashion_mnist.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("a.npz", "b.npz"):
        script.build(tmp_path, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as data:
        assert np.bincount(data["train_labels"]).tolist() == [1200] * 10


# Folders


def test_folder_of_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "dog", [10, 11])
    write_images(tmp_path / "cat" / "indoors", [20])
    write_images(tmp_path / "cat", [21])
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert sorted(int(source.decode(i)[0, 0, 0]) for i in range(2)) == [20, 21]
    assert source.name(3) == str(tmp_path / "dog" / "011.png")


def test_folder_with_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "b", [1, 2])
    write_images(tmp_path / "train" / "a", [3])
    write_images(tmp_path / "validation" / "b", [4])  # has no "a", but the classes are those of all splits
    source = open_source(f"folder:{tmp_path}", "val")
    assert source.class_names == ("a", "b") and source.labels.tolist() == [1]
    with pytest.raises(ValueError, match="unknown split 'test'; there are: train, val"):
        open_source(f"folder:{tmp_path}", "test")


def test_folder_slices_hold_every_class(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        write_images(tmp_path / name, list(range(number * 20, number * 20 + 20)))
    most, rest = (open_source(f"folder:{tmp_path}", split) for split in ("train[:75%]", "train[75%:]"))
    assert len(most) == 60 and len(rest) == 20
    names = [source.name(i) for source in (most, rest) for i in range(len(source))]
    assert len(set(names)) == 80
    assert set(rest.labels) == {0, 1, 2, 3}
    assert Path(rest.name(0)).parent.name == rest.class_names[rest.label(0)]


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_source(f"folder:{tmp_path / 'no'}")
    with pytest.raises(ValueError, match="must hold one folder of images per class, found no folder"):
        open_source(f"folder:{tmp_path}")
    write_images(tmp_path / "a", [1])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*b has no images"):
        open_source(f"folder:{tmp_path}")


# Parquet


def test_cifar10_parquet(cifar10_parquet: Path) -> None:
    train, test = (open_source(f"parquet:{cifar10_parquet}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (50000, 10000)
    assert train.class_names[:2] == ("airplane", "automobile") and len(train.class_names) == 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.decode(49999).shape == (32, 32, 3)
    assert train.name(12345).endswith("train.parquet row 12345")
    assert len(open_source(f"parquet:{cifar10_parquet}/test.parquet", "test[:1%]")) == 100


def test_parquet_shards_of_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [10, 11, 12], [0, 1, 2])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [13, 14], [1, 0])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [20], [2])
    source = open_source(f"parquet:{tmp_path}", "train")
    assert [int(source.decode(i)[0, 0, 0]) for i in range(5)] == [10, 11, 12, 13, 14]
    assert source.labels.tolist() == [0, 1, 2, 1, 0] and source.class_names == ("0", "1", "2")
    assert source.name(4).endswith("train-00001-of-00002.parquet row 1")
    assert len(open_source(f"parquet:{tmp_path}", "validation")) == 1


def test_parquet_split_by_folder_and_without_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "test" / "0000.parquet", [1], [0])
    assert len(open_source(f"parquet:{tmp_path / 'a'}", "test")) == 1
    write_parquet(tmp_path / "b" / "0000.parquet", [1, 2], [0, 1])
    assert len(open_source(f"parquet:{tmp_path / 'b'}", "train")) == 2
    write_parquet(tmp_path / "b" / "test.parquet", [1], [0])
    with pytest.raises(ValueError, match=r"0000\.parquet must say its split"):
        open_source(f"parquet:{tmp_path / 'b'}", "train")


def test_parquet_plain_bytes_and_text_labels(tmp_path: Path) -> None:
    for name, kinds in (("train", ["dog", "cat", "dog"]), ("test", ["emu", "cat", "dog"])):
        table = pa.table({"picture": [png(1), png(2), png(3)], "kind": kinds, "source": ["x", "y", "z"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"which column is the label\? Say \?label= one of kind, source"):
        open_source(f"parquet:{tmp_path}")
    source = open_source(f"parquet:{tmp_path}?image=picture&label=kind", "train")
    assert source.class_names == ("cat", "dog", "emu")  # the classes of all splits
    assert source.labels.tolist() == [1, 0, 1] and int(source.decode(2)[0, 0, 0]) == 3


def test_parquet_dictionary_labels_and_paths(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(77))
    images = [{"bytes": None, "path": "p.png"}, {"bytes": None, "path": None}, None]
    kinds = pa.array(["b", "a", "b"]).dictionary_encode()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(images, kind), "label": kinds}), tmp_path / "train.parquet")
    source = open_source(f"parquet:{tmp_path}")
    assert source.labels.tolist() == [1, 0, 1]
    assert int(source.decode(0)[0, 0, 0]) == 77
    for row in (1, 2):
        with pytest.raises(ValueError, match="the row holds no image"):
            source.decode(row)


def test_large_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train.parquet", list(range(60)), [0, 1] * 30)
    monkeypatch.setattr("visionmoe.data.parquet.WHOLE_BYTES", 0)
    monkeypatch.setattr("visionmoe.data.parquet.AT_ONCE_BYTES", 0)
    source = open_source(f"parquet:{tmp_path}")
    assert isinstance(source, ParquetSource)
    order = np.random.default_rng(0).permutation(60)
    assert [int(source.decode(int(i))[0, 0, 0]) for i in order] == order.tolist()
    assert len(source._kept) == 8


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], "rows without a label"),
        ([0, -1, 1], "negative labels"),
        ([0.5, 1.5, 2.5], "no column can be the label; there are image, label"),
    ],
)
def test_parquet_labels_that_cannot_be(tmp_path: Path, labels: list, message: str) -> None:
    write_parquet(tmp_path / "train.parquet", [1, 2, 3], labels)
    with pytest.raises(ValueError, match=message):
        open_source(f"parquet:{tmp_path}")


def test_parquet_mistakes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_source(f"parquet:{tmp_path / 'no'}")
    with pytest.raises(FileNotFoundError, match=r"there are no \.parquet files"):
        open_source(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "train.parquet", [1], [0])
    with pytest.raises(ValueError, match="image=photo must be one of image"):
        open_source(f"parquet:{tmp_path}?image=photo")
    with pytest.raises(ValueError, match=r"unknown option 'imge' .* did you mean 'image'"):
        open_source(f"parquet:{tmp_path}?imge=photo")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable parquet file") as error:
        open_source(f"parquet:{tmp_path}")
    assert "\n" not in str(error.value)


def test_damaged_row_group_is_a_broken_image(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [1, 2, 3, 4], [0, 1, 0, 1], compression="zstd", use_dictionary=False)
    path = tmp_path / "train.parquet"
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start, size = column.data_page_offset, column.total_compressed_size
    data[start + size // 2 : start + size] = b"\xff" * (size - size // 2)
    path.write_bytes(data)
    source = open_source(f"parquet:{tmp_path}")
    assert int(source.decode(1)[0, 0, 0]) == 2
    with pytest.raises(ValueError, match="row group 1 cannot be read"):
        source.decode(2)


def without(module: str, spec: str) -> str:
    """What open_source says in a process that cannot import `module`."""
    code = f"import sys; sys.modules[{module!r}] = None\nfrom visionmoe.data import open_source\nopen_source({spec!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1]


def test_missing_extras() -> None:
    assert (
        without("pyarrow", "parquet:x") == "ValueError: parquet: data needs the package pyarrow (pip install pyarrow)"
    )
    assert without("datasets", "hf:x") == "ValueError: hf: data needs the package datasets (pip install datasets)"


# torchvision and the Hugging Face hub, without a network


def test_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    source = open_source(f"torchvision:FashionMNIST?root={tmp_path}", "test[:50%]")
    assert len(source) == 10 and source.class_names[9] == "Ankle boot"
    np.testing.assert_array_equal(source.decode(3, channels=1)[:, :, 0], images[3])
    assert source.name(3) == "torchvision:FashionMNIST test image 3"


def test_torchvision_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchvision has no data set 'CIFAR11'"):
        open_source("torchvision:CIFAR11")
    with pytest.raises(ValueError, match=r"'\?download=1' downloads it"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}")
    with pytest.raises(ValueError, match="download must be 0 or 1, got 'yes'"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}&download=yes")
    with pytest.raises(ValueError, match="unknown split 'val'; there are: test, train"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}", "val")


def test_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    code = f"""
import os
os.environ["HF_HOME"] = {str(tmp_path / "home")!r}
from visionmoe.data import open_source
source = open_source("hf:{tmp_path / "set"}", "train[1:]")
print(len(source), source.class_names, source.labels.tolist(), source.decode(0)[0, 0, 0], source.name(0))
"""
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", [5, 6, 7], ["b", "a", "b"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 ('a', 'b') [0, 1] 6 hf:")


# Specs


@pytest.mark.parametrize("spec", ["", "imagenet", "folder", "folder:", "zip:x.zip", "fashion-mnist:x"])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(ValueError, match=re.escape("data must be one of fashion-mnist, folder:PATH, parquet:PATH")):
        open_source(spec)


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="options after \\? must look like name=value, got 'root'"):
        open_source("torchvision:CIFAR10?root")
