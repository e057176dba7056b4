"""From the bytes of an image file to a uint8 array, refusing what is broken or too large before it costs memory."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from visionmoe.data.config import MAX_PIXELS
from visionmoe.files import one_line

# Listed, because Pillow also opens formats that start other programs (EPS) or that nobody trains on.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")


class BrokenImageError(ValueError):
    """An image that cannot be decoded, or that declares more pixels than allowed."""


def decode_image(data: bytes | np.ndarray | Image.Image, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an encoded image, or converts an array or a Pillow image, to uint8 (H, W, channels).

    Arrays are uint8 (H, W), (H, W, 1) or (H, W, 3). As in the reference (REFERENCE.md section 4), EXIF orientation is
    ignored, transparency is dropped, of an animation the first frame is taken, and of 16 bits the upper 8 are kept.
    Raises BrokenImageError.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, channels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file's odd metadata, and of sizes that max_pixels allows
            image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise BrokenImageError(f"declares {image.width} x {image.height} pixels, more than {max_pixels}")
            pixels = _from_jpeg(data, image, channels) if isinstance(data, bytes) else None
            return _from_pillow(image, channels) if pixels is None else pixels
    except (BrokenImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise BrokenImageError(f"declares more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BrokenImageError("not an image in a known format") from None
    except Exception as error:  # Pillow raises whatever its decoder stumbles over: SyntaxError, struct.error, ...
        raise BrokenImageError(one_line(error)) from None


def read_image(path: str | Path, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads and decodes an image file to uint8 (H, W, channels). Raises OSError or BrokenImageError."""
    try:
        return decode_image(Path(path).read_bytes(), channels, max_pixels)
    except BrokenImageError as error:
        raise BrokenImageError(f"{path}: {error}") from None


def _from_jpeg(data: bytes, image: Image.Image, channels: int) -> np.ndarray | None:
    """What Pillow would make of a JPEG whose colours need no conversion, without Pillow's copies of all pixels.

    Both decode with libjpeg. None for everything else, and for what is broken: Pillow knows better what is wrong.
    """
    if image.format != "JPEG" or image.mode != ("L" if channels == 1 else "RGB"):
        return None
    try:
        decoded = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return None
    return decoded.permute(1, 2, 0).numpy()  # it lies as (H, W, C) already


def _from_pillow(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits per pixel, in Pillow's modes I;16 and, from some formats, I
        upper = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return _from_array(upper.astype(np.uint8), channels)
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _from_array(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise BrokenImageError(f"must be uint8 (H, W), (H, W, 1) or (H, W, 3), got {pixels.dtype} {pixels.shape}")
    if not pixels.size:
        raise BrokenImageError(f"has no pixels: shape {pixels.shape}")
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
