"""Decoding: every kind of image becomes uint8 RGB or grey; broken ones and bombs are refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionmoe.data.decode import BrokenImageError, decode_image, read_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(rgb: np.ndarray, kind: str) -> None:
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(rgb), kind)), rgb)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("GIF", {})])
def test_lossy_formats(kind: str, options: dict) -> None:
    image = np.full((16, 16, 3), 90, np.uint8)
    assert np.abs(decode_image(encoded(Image.fromarray(image), kind, **options)).astype(int) - 90).max() <= 3


def test_transparency_is_dropped(rgb: np.ndarray) -> None:
    clear = np.concatenate([rgb, np.zeros((6, 5, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(clear), "PNG")), rgb)


def test_palette_with_transparency(rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb).quantize(30)
    pixels = decode_image(encoded(image, "PNG", transparency=0))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    deep = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    data = encoded(Image.fromarray(deep), "PNG")
    np.testing.assert_array_equal(decode_image(data, channels=1)[:, :, 0], [[0, 0, 1, 156, 255]])  # 40000 // 256 = 156
    assert decode_image(data, channels=3).shape == (1, 5, 3)


def test_cmyk() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow make red
    pixels = decode_image(encoded(ink, "JPEG", quality=95)).reshape(-1, 3).mean(0)
    assert pixels[0] > 230 and pixels[1] < 60 and pixels[2] < 60


def test_one_bit_and_grey() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG")), [[[0, 0, 0], [255, 255, 255]]])


def test_colour_to_grey_by_luma() -> None:
    green = np.zeros((1, 1, 3), np.uint8)
    green[..., 1] = 200
    luma = 200 * 587 // 1000  # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    assert decode_image(green, channels=1).tolist() == [[[luma]]]
    assert decode_image(encoded(Image.fromarray(green), "PNG"), channels=1).tolist() == [[[luma]]]


def test_exif_orientation_is_ignored(rgb: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    data = encoded(Image.fromarray(rgb), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), rgb)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


def test_arrays() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert decode_image(grey, channels=1).shape == (2, 3, 1)
    np.testing.assert_array_equal(decode_image(grey, channels=3), np.stack([grey] * 3, axis=2))
    with pytest.raises(BrokenImageError, match=r"must be uint8 .*float64"):
        decode_image(grey.astype(float))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    for share in (0.0, 0.02, 0.5, 0.9):
        with pytest.raises(BrokenImageError) as error:
            decode_image(data[: int(share * len(data))])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("size", [(64, 48), (37, 23), (1, 5)])
def test_jpeg_is_what_pillow_decodes(mode: str, channels: int, options: dict, size: tuple[int, int]) -> None:
    width, height = size
    rows = np.linspace(0, 6, height)[:, None, None] + np.arange(3)
    waves = np.sin(rows) * np.cos(np.linspace(0, 9, width))[None, :, None] * 120 + 128
    data = encoded(Image.fromarray(waves.astype(np.uint8)).convert(mode), "JPEG", quality=90, **options)
    pixels = decode_image(data, channels)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    assert pixels.shape == (height, width, channels) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected.reshape(pixels.shape))


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG whose header declares any size, over a few bytes of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50000, 50000), (2**31 - 1, 2**31 - 1), (14000, 14000)])
def test_bombs_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(BrokenImageError, match="declares"):
        decode_image(png_that_declares(*size))


def test_lower_limit_of_pixels(rgb: np.ndarray) -> None:
    data = encoded(Image.fromarray(rgb), "PNG")
    assert decode_image(data, max_pixels=30).shape == (6, 5, 3)
    with pytest.raises(BrokenImageError, match="declares 5 x 6 pixels, more than 29"):
        decode_image(data, max_pixels=29)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"\xff\xd8\xff"]
)
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(BrokenImageError):
        decode_image(data)


def test_read_image_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"not a cat")
    with pytest.raises(BrokenImageError, match=r"cat\.png: not an image"):
        read_image(tmp_path / "cat.png")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "dog.png")
