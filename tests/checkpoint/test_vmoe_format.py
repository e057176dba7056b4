"""The released format: what the reference wrote, what we write, and everything that can be wrong with a file."""

import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmoe.checkpoint import VmoeReader, read_vmoe, write_vmoe
from visionmoe.checkpoint.vmoe_index import STORAGE, covers_once

MAGIC = "__msgpack_array_chunk_a87ca2__"


def pack_array(array, dtype=None, code=1):
    array = np.asarray(array)
    return msgpack.ExtType(code, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes())))


def pack_box(box):
    return msgpack.packb([msgpack.packb(bounds if len(bounds) == 3 else (*bounds, None)) for bounds in box])


def pack_slice(box):
    return msgpack.ExtType(6, pack_box(box))


def pack_info(shape, dtype, boxes, shards):
    aval = msgpack.packb((shape, dtype, False, {}))
    return msgpack.ExtType(8, msgpack.packb((aval, [pack_box(box) for box in boxes], shards)))


def write_raw(folder, index, shards, version="20220622", **extra):
    """Writes a checkpoint as it comes: index is the nested dict, shards the dicts of the data files."""
    top = {"shard_count": len(shards), "index": index, **({"version": version} if version else {}), **extra}
    (folder / "ckpt.index").write_bytes(msgpack.packb(top))
    for i, shard in enumerate(shards):
        data = msgpack.packb({MAGIC: True, **shard})
        (folder / f"ckpt.data-{i:05d}-of-{len(shards):05d}").write_bytes(data)
    return folder / "ckpt"


X = np.arange(6, dtype=np.float32).reshape(2, 3)
WHOLE = ((0, 2), (0, 3))


def one_array(folder, pieces, dtype="float32", shape=(2, 3), boxes=(WHOLE,), data_boxes=None, **options):
    """A checkpoint with the array "x" in one shard; pieces: one packed list per box."""
    boxes = list(boxes)
    value = [[piece, pack_slice(box)] for piece, box in zip(pieces, data_boxes or boxes, strict=True)]
    return write_raw(folder, {"x": pack_info(shape, dtype, boxes, [0] * len(boxes))}, [{"0": value}], **options)


@pytest.fixture
def small(tmp_path):
    """A checkpoint of ours with three shards, and its arrays."""
    rng = np.random.default_rng(0)
    flat = {
        "Encoder/a/kernel": rng.normal(size=(4, 3)).astype(np.float32),
        "Encoder/b": rng.normal(size=(5,)).astype(np.float64),
        "cls": rng.integers(0, 9, size=(2, 2, 2)),
        "flag": np.array(True),
    }
    write_vmoe(tmp_path / "ckpt", flat, num_shards=3)
    return tmp_path / "ckpt", flat


def assert_same(actual, expected):
    assert list(actual) == sorted(expected, key=lambda name: name.split("/"))
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def test_against_reference_dense_vit(conformance_case):
    path, _ = conformance_case("dense-vit")
    flat = read_vmoe(path / "ckpt")
    # 4 blocks of 16 arrays (two norms of 2, four projections of 2, two dense layers of 2); embedding, cls, positions,
    # final norm and head: 2 + 1 + 1 + 2 + 2.
    assert len(flat) == 4 * 16 + 8
    expected = np.load(path / "expected.npz")
    assert {n: a.shape for n, a in flat.items()} == {
        name.removeprefix("grads/"): expected[name].shape for name in expected.files if name.startswith("grads/")
    }
    # The mean of 64 LayerNorm scales that start at 1 and were perturbed a little.
    assert abs(flat["Encoder/encoder_norm/scale"].mean() - 1) < 0.2


def test_reader_knows_names_shapes_and_dtypes_and_yields_each_element_once(conformance_case):
    path, _ = conformance_case("ensemble-m2")
    reader = VmoeReader(path / "ckpt")
    assert reader.shard_count == 3
    assert reader.shapes["Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"] == (4, 32, 64)
    assert set(reader.dtypes.values()) == {"float32"}
    count = {name: np.zeros(shape, int) for name, shape in reader.shapes.items()}
    for block in reader.blocks():
        count[block.name][block.index] += 1
    assert all((c == 1).all() for c in count.values())
    only = {block.name for block in reader.blocks({"cls", "head/bias"})}
    assert only == {"cls", "head/bias"}


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_write_then_read_is_identical(tmp_path, small, num_shards):
    _, flat = small
    write_vmoe(tmp_path / "again", flat, num_shards=num_shards)
    assert_same(read_vmoe(tmp_path / "again"), flat)
    assert len(list(tmp_path.glob("again.data-*"))) == num_shards


@pytest.mark.parametrize("dtype", [d for d in STORAGE if d != "bfloat16"])
def test_every_dtype_round_trips(tmp_path, dtype):
    flat = {"x": np.random.default_rng(0).integers(0, 2, size=(3, 5)).astype(dtype), "empty": np.zeros((0, 4), dtype)}
    write_vmoe(tmp_path / "ckpt", flat)
    assert_same(read_vmoe(tmp_path / "ckpt"), flat)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=4), num_shards=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_shapes_round_trip_in_small_slices_and_chunks(tmp_path_factory, shape, num_shards, seed):
    """With limits of a few bytes every array is cut into slices, chunks and blocks."""
    folder = tmp_path_factory.mktemp("ckpt")
    rng = np.random.default_rng(seed)
    flat = {"a/x": rng.normal(size=shape), "a/y": rng.normal(size=(7, *shape)).astype(np.float32), "b": np.float32(3)}
    flat = {name: np.asarray(array) for name, array in flat.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionmoe.checkpoint.vmoe_write._SLICE_BYTES", 40)
        patch.setattr("visionmoe.checkpoint.vmoe_write._CHUNK_BYTES", 24)
        patch.setattr("visionmoe.checkpoint.vmoe_format._BLOCK_BYTES", 16)
        write_vmoe(folder / "ckpt", flat, num_shards=num_shards)
        assert_same(read_vmoe(folder / "ckpt"), flat)


def test_written_bytes_are_what_the_msgpack_package_would_write(tmp_path):
    prefix = one_array(tmp_path, [[pack_array(X.reshape(-1))]])
    (tmp_path / "ours").mkdir()
    write_vmoe(tmp_path / "ours" / "ckpt", {"x": X})
    for name in ("ckpt.index", "ckpt.data-00000-of-00001"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert_same(read_vmoe(prefix), {"x": X})


@pytest.mark.parametrize("size", [1, 6, 60, 62_000, 70_000])  # 6 bool elements make an extension of 16 bytes
def test_written_extensions_of_every_size_are_msgpack(tmp_path, size):
    flat = {"x": np.arange(size) % 3 == 0}
    write_vmoe(tmp_path / "ckpt", flat)
    data = msgpack.unpackb((tmp_path / "ckpt.data-00000-of-00001").read_bytes())
    (pieces, box) = data["0"][0]
    assert pieces[0].code == 1 and box.code == 6
    assert msgpack.unpackb(pieces[0].data) == [[size], "bool", flat["x"].tobytes()]
    assert_same(read_vmoe(tmp_path / "ckpt"), flat)


def test_leaves_are_numbered_with_sorted_keys_at_every_level(tmp_path):
    flat = {"b": np.array([1.0]), "a/z": np.array([2.0]), "a.b": np.array([3.0]), "a/b_10": np.array([4.0]),
            "a/b_2": np.array([5.0])}  # fmt: skip
    write_vmoe(tmp_path / "ckpt", flat)
    # As a tree: "a" (b_10, b_2, z), then "a.b", then "b"; as flat strings "a.b" would come before "a/z".
    assert list(read_vmoe(tmp_path / "ckpt")) == ["a/b_10", "a/b_2", "a/z", "a.b", "b"]
    data = msgpack.unpackb((tmp_path / "ckpt.data-00000-of-00001").read_bytes())
    assert [msgpack.unpackb(data[str(i)][0][0][0].data)[2] for i in range(5)] == [
        np.array([v]).tobytes() for v in (4.0, 5.0, 2.0, 3.0, 1.0)
    ]


def test_bfloat16_is_upcast_exactly_and_written_back_bit_for_bit(tmp_path):
    x = torch.tensor([[1.0, -2.5, 3e38], [1e-40, float("inf"), float("nan")]]).bfloat16()
    write_vmoe(tmp_path / "ckpt", {"x": x.T})  # a view that is not contiguous
    assert VmoeReader(tmp_path / "ckpt").dtypes == {"x": "bfloat16"}
    actual = read_vmoe(tmp_path / "ckpt")["x"]
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, x.T.float().numpy())
    (block,) = VmoeReader(tmp_path / "ckpt").blocks()
    assert torch.equal(torch.from_numpy(block.array), x.T.contiguous().view(torch.uint16))


def test_index_without_version(tmp_path):
    assert_same(read_vmoe(one_array(tmp_path, [[pack_array(X.reshape(-1))]], version=None)), {"x": X})


def test_flax_chunked_arrays(tmp_path):
    flat = X.reshape(-1)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 6},
        "chunks": {"1": pack_array(flat[4:]), "0": pack_array(flat[:4])},
    }
    for i, piece in enumerate((chunked, [chunked], pack_array(flat))):  # in place of the list, and in it
        (tmp_path / str(i)).mkdir()
        assert_same(read_vmoe(one_array(tmp_path / str(i), [piece])), {"x": X})


def test_numpy_scalars_and_complex_numbers(tmp_path):
    prefix = write_raw(
        tmp_path,
        {"c": pack_info((), "complex128", [()], [0]), "s": pack_info((), "int64", [()], [0])},
        [
            {
                "0": [[[msgpack.ExtType(2, msgpack.packb((1.5, -2.0)))], pack_slice(())]],
                "1": [[[pack_array(np.int64(7), code=3)], pack_slice(())]],
            }
        ],
    )
    flat = read_vmoe(prefix)
    assert flat["c"] == 1.5 - 2j and flat["s"] == 7 and flat["s"].shape == ()


def test_slices_may_leave_out_start_and_stop(tmp_path):
    box = ((None, None, None), (None, 3, 1))
    assert_same(read_vmoe(one_array(tmp_path, [[pack_array(X.reshape(-1))]], boxes=[box])), {"x": X})


@pytest.mark.parametrize("shape, boxes, expected", [
    ((4,), [((0, 2),), ((2, 4),)], True),
    ((4,), [((0, 2),), ((1, 4),)], False),  # overlap
    ((4,), [((0, 1),), ((2, 4),)], False),  # hole
    ((4,), [((0, 2),), ((0, 2),)], False),  # twice the same half: the volume is right
    ((2, 2), [((0, 1), (0, 2)), ((1, 2), (0, 1)), ((1, 2), (1, 2))], True),
    ((2, 2), [((0, 1), (0, 1)), ((1, 2), (1, 2)), ((0, 1), (0, 1)), ((1, 2), (1, 2))], False),
    ((3, 3), [((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1)), ((1, 2), (1, 2))], True),
    ((), [()], True),
    ((), [], False),
    ((0, 3), [], True),
])  # fmt: skip
def test_covers_once(shape, boxes, expected):
    assert covers_once(shape, boxes) is expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_covers_once_agrees_with_counting(data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    bounds = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).filter(lambda b: b[0] < b[1]) for n in shape))
    boxes = data.draw(st.lists(bounds, max_size=5))
    count = np.zeros(shape, int)
    for box in boxes:
        count[tuple(slice(*b) for b in box)] += 1
    assert covers_once(shape, boxes) == bool((count == 1).all())


GOOD = pack_array(X.reshape(-1))
WRONG = {
    "overlapping slices": dict(pieces=[[pack_array(X[:1].reshape(-1))], [GOOD]], boxes=(((0, 1), (0, 3)), WHOLE)),
    "slices that leave a row out": dict(pieces=[[pack_array(X[:1].reshape(-1))]], boxes=(((0, 1), (0, 3)),)),
    "a slice out of range": dict(pieces=[[GOOD]], boxes=(((1, 3), (0, 3)),)),
    "a negative slice": dict(pieces=[[GOOD]], boxes=(((-2, 0), (0, 3)),)),
    "a step": dict(pieces=[[GOOD]], boxes=(((0, 2, 2), (0, 3)),)),
    "a slice of another rank": dict(pieces=[[GOOD]], boxes=(((0, 6),),)),
    "another slice in the data": dict(pieces=[[GOOD]], data_boxes=[((0, 3), (0, 2))], shape=(2, 3)),
    "a shape that the data does not have": dict(pieces=[[GOOD]], shape=(2, 4), boxes=(((0, 2), (0, 4)),)),
    "2^60 elements": dict(pieces=[[GOOD]], shape=(1 << 30, 1 << 30), boxes=(((0, 1 << 30), (0, 1 << 30)),)),
    "2^64 elements": dict(pieces=[[GOOD]], shape=(1 << 40, 1 << 40), boxes=(((0, 1 << 40), (0, 1 << 40)),)),
    "a dimension of 2^63": dict(pieces=[[GOOD]], shape=(1 << 63, 0), boxes=(((0, 1 << 63), (0, 0)),)),
    "a negative dimension": dict(pieces=[[GOOD]], shape=(-2, -3)),
    "rank 40": dict(pieces=[[GOOD]], shape=(1,) * 40, boxes=(((0, 1),) * 40,)),
    "unknown dtype": dict(pieces=[[pack_array(X.reshape(-1), "float99")]], dtype="float99"),
    "an object dtype": dict(pieces=[[pack_array(X.reshape(-1), "object")]], dtype="object"),
    "another dtype in the data": dict(pieces=[[pack_array(X.reshape(-1), "int32")]]),
    "bytes that do not fit the shape": dict(pieces=[[msgpack.ExtType(1, msgpack.packb(([6], "float32", b"123")))]]),
    "a huge inner shape": dict(pieces=[[msgpack.ExtType(1, msgpack.packb(([1 << 60], "float32", b"")))]]),
    "an unknown extension type": dict(pieces=[[msgpack.ExtType(77, b"1234")]]),
    "no array": dict(pieces=[[b"1234"]]),
    "a text for a shape": dict(pieces=[[msgpack.ExtType(1, msgpack.packb(("abc", "float32", b"")))]]),
    "an unknown version": dict(pieces=[[GOOD]], version="20990101"),
    "a version that is a table": dict(pieces=[[GOOD]], version={"a": 1}),
    "flax chunks that do not make up the shape": dict(
        pieces=[[{"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": {"0": pack_array(X[0])}}]]
    ),
    "flax chunks without shape": dict(pieces=[[{"__msgpack_chunked_array__": True, "chunks": {"0": GOOD}}]]),
    "a flax chunk in a flax chunk": dict(
        pieces=[[{"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": {"0": {"chunks": {}}}}]]
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_descriptions_are_one_error_that_names_the_file(tmp_path, what):
    options = dict(WRONG[what])
    assert_one_error(one_array(tmp_path, options.pop("pieces"), **options))


def assert_one_error(prefix):
    """One line that names a file; no memory is taken for what the file only promises."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            read_vmoe(prefix)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert f"{prefix}." in message and "\n" not in message, message
    return message


BROKEN_INDEX = {
    "empty": b"",
    "not msgpack": b"hello, world",
    "a number": b"\x07",
    "no index": msgpack.packb({"shard_count": 1}),
    "no shard count": msgpack.packb({"index": {}}),
    "shard_count 0": msgpack.packb({"shard_count": 0, "index": {}}),
    "shard_count 2^60": msgpack.packb({"shard_count": 1 << 60, "index": {}}),
    "shard_count text": msgpack.packb({"shard_count": "3", "index": {}}),
    "a leaf that is a number": msgpack.packb({"shard_count": 1, "index": {"a": 3}}),
    "a leaf of another type": msgpack.packb({"shard_count": 1, "index": {"a": pack_array(X)}}),
    "too deep": b"\x81\xa1a" * 100_000 + b"\x01",
    "deep arrays": b"\x91" * 100_000,
    "huge array": b"\xdd\xff\xff\xff\xff",
    "huge map": b"\x81\xa5index\xdf\xff\xff\xff\xff",
    "huge text": b"\xdb\xff\xff\xff\xff",
    "huge arrays in arrays": b"\xdd\x00\x00\xff\xff" * 50_000,
    "the same name twice": b"\x82\xa1a\x01\xa1a\x02",
    "a key that is a number": b"\x81\x01\x01",
    "the reserved type": b"\xc1",
    "bytes too many": msgpack.packb({"shard_count": 1, "index": {}}) + b"\x00",
    "a shard beyond": msgpack.packb({"shard_count": 1, "index": {"x": pack_info((1,), "float32", [((0, 1),)], [1])}}),
    "fewer shards than slices": msgpack.packb(
        {"shard_count": 1, "index": {"x": pack_info((1,), "float32", [((0, 1),)], [])}}
    ),
    "a name in two ways": msgpack.packb(
        {"shard_count": 1, "index": {n: v for n, v in (("a/b", 1), ("a", {"b": 1}))} | {"shard_count": 1}}
    ),
    "payload garbage": msgpack.packb({"shard_count": 1, "index": {"x": msgpack.ExtType(8, b"\x93\x01")}}),
    "a control character": msgpack.packb({"shard_count": 1, "index": {"a\nb": 3}}),
}


@pytest.mark.parametrize("what", BROKEN_INDEX)
def test_broken_index_is_one_error_that_names_it(tmp_path, what):
    (tmp_path / "ckpt.index").write_bytes(BROKEN_INDEX[what])
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(msgpack.packb({MAGIC: True}))
    assert_one_error(tmp_path / "ckpt")


def test_a_missing_file_is_named(tmp_path, small):
    prefix, _ = small
    shard = tmp_path / "ckpt.data-00001-of-00003"
    shard.unlink()
    with pytest.raises(ValueError, match=r"ckpt\.data-00001-of-00003 is missing"):
        read_vmoe(prefix)
    with pytest.raises(FileNotFoundError, match=r"nothing\.index is missing"):
        read_vmoe(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["ckpt.index", "ckpt.data-00000-of-00003", "ckpt.data-00001-of-00003"])
def test_every_truncation_is_one_error_that_names_the_file(tmp_path, small, name):
    prefix, _ = small
    whole = (tmp_path / name).read_bytes()
    for size in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"ckpt\."):
            read_vmoe(prefix)


def test_shards_of_another_checkpoint_are_refused(tmp_path, small):
    prefix, _ = small
    first, second = (tmp_path / f"ckpt.data-0000{i}-of-00003" for i in (0, 1))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"ckpt\.data-00001-of-00003"):
        read_vmoe(prefix)


def test_random_changes_give_arrays_or_one_error(tmp_path, small):
    """Byte flips and truncations: never another exception, a hang or memory."""
    tracemalloc.start()
    assert change_and_read(small[0], rounds=500) == {"arrays", "error"}
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_random_changes_of_a_reference_checkpoint_give_arrays_or_one_error(tmp_path, conformance_case):
    path, _ = conformance_case("dense-vit")
    for file in path.glob("ckpt.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert change_and_read(tmp_path / "ckpt", rounds=40) == {"arrays", "error"}


def change_and_read(prefix, rounds):
    good = {path: path.read_bytes() for path in sorted(prefix.parent.glob("ckpt.*"))}
    index = prefix.with_suffix(".index")
    rng = random.Random(0)
    outcomes = set()
    for _ in range(rounds):
        path = rng.choice([index, *good])
        data = bytearray(good[path])
        if rng.random() < 0.2:
            del data[rng.randrange(1, len(data)) :]
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), 0xDD, 0xDF, 0xC6, 0xC9, 0xFF])
        path.write_bytes(data)
        try:
            read_vmoe(prefix)
            outcomes.add("arrays")
        except ValueError as error:
            assert str(prefix) in str(error) and "\n" not in str(error)
            outcomes.add("error")
        path.write_bytes(good[path])
    return outcomes


def test_writing_refuses_what_is_not_a_tree_and_unknown_dtypes(tmp_path):
    with pytest.raises(ValueError, match="names must make a tree, got 'a' beside 'a/b'"):
        write_vmoe(tmp_path / "ckpt", {"a": X, "a/b": X})
    with pytest.raises(ValueError, match="x has dtype <U1, allowed"):
        write_vmoe(tmp_path / "ckpt", {"x": np.array(["a"])})
    with pytest.raises(ValueError, match="num_shards must be between 1 and 99999, got 0"):
        write_vmoe(tmp_path / "ckpt", {"x": X}, num_shards=0)
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_the_old_checkpoint(tmp_path, small, monkeypatch):
    prefix, flat = small
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("visionmoe.checkpoint.vmoe_write._write_piece", fail)
    with pytest.raises(OSError, match="disk full"):
        write_vmoe(prefix, {name: array + 1 for name, array in flat.items() if name != "flag"}, num_shards=3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


PEAK = """
import re, sys
from visionmoe.checkpoint import read_vmoe
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
read_vmoe(sys.argv[2])  # everything is imported and warm
before = memory("VmRSS")
flat = read_vmoe(sys.argv[1])
print((memory("VmHWM") - before) / sum(a.nbytes for a in flat.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("num_shards", [1, 4])
def test_peak_memory_of_reading_is_little_more_than_the_arrays(tmp_path, num_shards):
    """200 MB, one array of 128 MB among them, are read at no more than 1.3 times their size."""
    flat = {"big": np.ones((8, 2048, 2048), np.float32), "a/rest": np.ones((18 << 20,), np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionmoe.checkpoint.vmoe_write._SLICE_BYTES", 1 << 30)  # the worst case: whole arrays
        write_vmoe(tmp_path / "ckpt", flat, num_shards=num_shards)
    write_vmoe(tmp_path / "tiny", {"x": X})
    ratio = float(run_python(PEAK, str(tmp_path / "ckpt"), str(tmp_path / "tiny")))
    assert 0.9 < ratio < 1.3


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
