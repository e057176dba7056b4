"""Pixels, exactly as the reference computes them (REFERENCE.md section 4), on uint8 (H, W, C) arrays.

Both resizings repeat TensorFlow's order of float32 operations, so that truncation to uint8 agrees to the last unit.
"""

import numpy as np
import torch
from torch import Tensor

F32 = np.float32
_CACHE_BYTES = 1 << 20  # of images: what is worked on stays in the processor's cache
_ROWS = 32  # of a resized image, for the same reason


def resize_bilinear(image: np.ndarray, height: int, width: int, *, mirrored: bool = False) -> np.ndarray:
    """uint8 (H, W, C) -> uint8 (height, width, C): half-pixel centres, no antialiasing, truncated.

    mirrored: of the result, left and right are exchanged.
    """
    if image.shape[:2] == (height, width):
        return image[:, ::-1] if mirrored else image
    channels = image.shape[2]
    top, bottom, y = _bilinear_taps(image.shape[0], height)
    left, right, x = _bilinear_taps(image.shape[1], width)
    if mirrored:
        left, right, x = left[::-1], right[::-1], x[::-1]
    # Pixels are taken byte by byte, which numpy does faster than three bytes at a time: (H, W, C) -> (H, W*C).
    left, right = ((taps[:, None] * channels + np.arange(channels)).ravel() for taps in (left, right))
    x, y = np.repeat(x, channels), y[:, None]

    def across(rows: np.ndarray) -> np.ndarray:  # (rows, W*C) -> (rows, width*C)
        a, b = (rows.take(taps, axis=1, mode="clip").astype(F32) for taps in (left, right))
        b -= a
        b *= x
        b += a
        return b

    image = image.reshape(len(image), -1)
    result = np.empty((height, width * channels), np.uint8)
    for start in range(0, height, _ROWS):
        part = slice(start, start + _ROWS)
        above, below = top[part], bottom[part]
        first, end = above[0], below[-1] + 1
        if end - first < 2 * len(above):  # cheaper, because rows are shared
            rows = across(image[first:end])
            upper, lower = rows.take(above - first, axis=0), rows.take(below - first, axis=0)
        else:
            upper, lower = across(image.take(above, axis=0)), across(image.take(below, axis=0))
        lower -= upper
        lower *= y[part]
        lower += upper
        result[part] = lower
    return result.reshape(height, width, channels)


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (height, width, C) in 0 .. 255: every new pixel is the mean over its area."""
    down, y_scale = _area_weights(image.shape[0], height)
    across, x_scale = _area_weights(image.shape[1], width)
    pixels = image.astype(F32)
    rows = np.zeros((image.shape[0], width, image.shape[2]), F32)
    for index, weight in across:
        rows += pixels[:, index] * weight[None, :, None]
    result = np.zeros((height, width, image.shape[2]), F32)
    for index, weight in down:
        result += rows[index] * weight[:, None, None]
    return result * (F32(1) / (y_scale * x_scale))


def resize_small(image: np.ndarray, smaller_size: int) -> np.ndarray:
    """uint8 (H, W, C) -> float32: resized by area so that the smaller side is smaller_size, aspect ratio kept."""
    height, width = image.shape[:2]
    ratio = F32(smaller_size) / F32(min(height, width))
    return resize_area(image, int(np.round(F32(height) * ratio)), int(np.round(F32(width) * ratio)))


def centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) -> (height, width, C); where the margins differ, the upper and left ones are smaller by one."""
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    if y < 0 or x < 0:
        raise ValueError(f"cannot crop {height} x {width} from an image of {image.shape[0]} x {image.shape[1]}")
    return image[y : y + height, x : x + width]


def evaluation_pixels(image: np.ndarray, image_hw: tuple[int, int], smaller_size: int | None = None) -> np.ndarray:
    """uint8 (H, W, C) -> (h, w, C) in 0 .. 255: uint8; float32 with smaller_size, as `resize_area` keeps fractions."""
    if smaller_size is None:
        return resize_bilinear(image, *image_hw)
    return centre_crop(resize_small(image, smaller_size), *image_hw)


def to_model(images: np.ndarray) -> Tensor:
    """Pixels (..., H, W, C) in 0 .. 255 -> float32 (..., C, H, W) in [-1, 1]."""
    *batch, height, width, channels = images.shape
    # numpy asks for large pages of memory, which are filled faster
    result = torch.from_numpy(np.empty((*batch, channels, height, width), F32))
    if not result.numel():
        return result
    each = result.view(-1, channels, height, width)
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).view(-1, height, width, channels)
    pixels = pixels.movedim(-1, 1)  # (N, H, W, C) -> (N, C, H, W)
    count = max(1, _CACHE_BYTES // each[0].nbytes)
    for to, given in zip(each.split(count), pixels.split(count), strict=True):
        to.copy_(given).div_(255).mul_(2).sub_(1)
    return result


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_model`'s scaling, for pictures: float in [-1, 1] -> uint8, rounded, of equal shape."""
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def preprocess(image: np.ndarray, image_size: int | tuple[int, int], eval_resize: int | None = None) -> Tensor:
    """What a model is given in evaluation: uint8 (H, W, C) -> float32 (C, h, w) in [-1, 1].

    eval_resize None: resized to image_size; a number: the smaller side is resized to it, then the centre is cropped.
    """
    image_hw = (image_size, image_size) if isinstance(image_size, int) else image_size
    return to_model(evaluation_pixels(image, image_hw, eval_resize))


def inception_crop(
    rng: np.random.Generator, height: int, width: int, area_min: float = 0.05, area_max: float = 1.0
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width): aspect uniform in 3/4 .. 4/3, then height uniform where the area allows.

    This is the sampler of the reference (TensorFlow's sample_distorted_bounding_box), which is not torchvision's
    (area uniform, aspect log-uniform). After 100 attempts that do not fit the whole image is taken.
    """
    low, high = area_min * height * width, area_max * height * width
    for _ in range(100):
        aspect = rng.uniform(3 / 4, 4 / 3)
        tallest = min(round((high / aspect) ** 0.5), int((width + 0.5 - 1e-7) / aspect), height)
        h = int(rng.integers(min(round((low / aspect) ** 0.5), tallest), tallest, endpoint=True))
        h += h * round(h * aspect) < low
        h -= h * round(h * aspect) > high
        w = round(h * aspect)
        if 0 < h <= height and 0 < w <= width and low <= h * w <= high:
            top, left = rng.integers(height - h, endpoint=True), rng.integers(width - w, endpoint=True)
            return int(top), int(left), h, w
    return 0, 0, height, width


def pad_crop_flip(
    images: np.ndarray, padding: int, tops: np.ndarray, lefts: np.ndarray, flips: np.ndarray
) -> np.ndarray:
    """Shifts every image of (B, H, W, C) inside a black frame of `padding` pixels and mirrors some of them.

    tops, lefts: int (B,) in 0 .. 2 * padding, where the crop begins. flips: bool (B,).
    """
    _, height, width, channels = images.shape
    result = np.empty(images.shape, images.dtype)
    if padding:
        images = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    elif not flips.any():
        return images
    # A pixel is moved as one item, whatever its channels: (B, H, W, C) -> (B, H, W).
    pixels, moved = (np.ascontiguousarray(a).view(f"V{channels * a.itemsize}")[..., 0] for a in (images, result))
    for new, old, top, left, flip in zip(moved, pixels, tops.tolist(), lefts.tolist(), flips.tolist(), strict=True):
        part = old[top : top + height, left : left + width]
        new[...] = part[:, ::-1] if flip else part
    return result


def _bilinear_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every new place: the old places on both sides (new,), and the weight of the second (new,)."""
    place = (np.arange(new, dtype=F32) + F32(0.5)) * (F32(old) / F32(new)) - F32(0.5)
    below = np.floor(place)
    first = np.maximum(below, 0).astype(np.intp)
    return first, np.minimum(np.ceil(place), old - 1).astype(np.intp), (place - below).astype(F32)


def _area_weights(old: int, new: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.float32]:
    """Taps of area resizing: [(old place of every new one (new,), its weight (new,)), ...], and the scale old / new."""
    scale = F32(old) / F32(new)
    begin, end = np.arange(new, dtype=F32) * scale, np.arange(1, new + 1, dtype=F32) * scale
    first, last = np.floor(begin), np.ceil(end)
    taps = []
    for tap in range(int((last - first).max())):
        place = first + F32(tap)
        inside = np.where(place + 1 > end, end - place, F32(1))
        starting = np.where(place + 1 > end, scale, place + 1 - begin)
        weight = np.where(place < begin, starting, inside)
        weight = np.where(place < last, weight, F32(0)).astype(F32)
        taps.append((np.clip(place, 0, old - 1).astype(np.intp), weight))
    return taps, scale
