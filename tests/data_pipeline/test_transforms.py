"""Pixels against the reference's numbers, and the random crops against slow, plain versions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmoe.data.transforms import (
    centre_crop,
    inception_crop,
    pad_crop_flip,
    preprocess,
    resize_area,
    resize_bilinear,
    resize_small,
    to_model,
    to_uint8,
)


@pytest.fixture(scope="module")
def reference(conformance: Path) -> dict[str, np.ndarray]:
    path = conformance / "units" / "preprocess.npz"
    if not path.is_file():
        pytest.skip(f"no reference numbers at {path}")
    with np.load(path) as data:
        return dict(data)


@pytest.mark.parametrize("size", [32, 96])
def test_against_reference_resize(reference: dict[str, np.ndarray], size: int) -> None:
    pixels = resize_bilinear(reference["image"], size, size)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, reference[f"resize{size}/uint8"])
    scaled = preprocess(reference["image"], size)
    assert scaled.shape == (3, size, size) and scaled.dtype == torch.float32
    np.testing.assert_array_equal(scaled.permute(1, 2, 0).numpy(), reference[f"resize{size}/range"])


def test_against_reference_resize_small_and_crop(reference: dict[str, np.ndarray]) -> None:
    # The key says uint8, but the reference resizes by area here and does not truncate: the numbers have fractions.
    small = resize_small(reference["image"], 40)
    assert small.shape == (40, 54, 3)  # 61 x 83: 83 * 40 / 61 = 54.4
    np.testing.assert_array_equal(centre_crop(small, 32, 32), reference["small40_crop32/uint8"])
    scaled = preprocess(reference["image"], 32, eval_resize=40)
    np.testing.assert_array_equal(scaled.permute(1, 2, 0).numpy(), reference["small40_crop32/range"])


def test_resize_bilinear_by_hand() -> None:
    # 2 -> 4 pixels: centres at -0.25, 0.25, 0.75, 1.25 of the old ones, clamped at both ends; 10.5 and 31.5 truncated.
    row = np.array([[0, 42]], np.uint8)[:, :, None]
    np.testing.assert_array_equal(resize_bilinear(row, 1, 4)[0, :, 0], [0, 10, 31, 42])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_resizing_any_shape(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].double(), (new_height, new_width), mode="bilinear"
    )
    pixels = resize_bilinear(image, new_height, new_width)
    # torch sums in another order: values next to a whole number may be truncated to the other side.
    assert np.abs(pixels - expected[0].permute(1, 2, 0).numpy()).max() <= 1.001
    areas = resize_area(image, new_height, new_width)
    # The mean over areas that tile the image keeps the mean of the image.
    np.testing.assert_allclose(areas.mean((0, 1)), image.mean((0, 1)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(61, 83, 3), (20, 90, 1), (200, 31, 3), (32, 40, 3)])
def test_mirrored_resizing_is_the_mirror_image(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(
        resize_bilinear(image, 32, 40, mirrored=True), resize_bilinear(image, 32, 40)[:, ::-1]
    )


def test_resizing_a_part_of_an_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    part = image[7:44, 11:53]  # not contiguous
    np.testing.assert_array_equal(resize_bilinear(part, 32, 24), resize_bilinear(part.copy(), 32, 24))


@pytest.mark.parametrize("shape", [(5, 7, 3), (9, 5, 7, 3), (0, 5, 7, 3), (2, 3, 5, 7, 1)])
@pytest.mark.parametrize("cache", [1, 900, 1 << 20])
def test_scaling_for_the_model(shape: tuple[int, ...], cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time, two (of 5 * 7 * 3 * 4 = 420 bytes), all at once; the arithmetic rounds after every step."""
    monkeypatch.setattr("visionmoe.data.transforms._CACHE_BYTES", cache)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.moveaxis(images.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1), -1, -3)
    scaled = to_model(images)
    assert scaled.dtype == torch.float32 and scaled.is_contiguous()
    np.testing.assert_array_equal(scaled.numpy(), expected)
    np.testing.assert_array_equal(to_model(images[..., ::-1, :]).numpy(), expected[..., ::-1])
    images.flags.writeable = False  # as what Pillow decodes
    np.testing.assert_array_equal(to_model(images).numpy(), expected)


def test_centre_crop_refuses_smaller_images() -> None:
    with pytest.raises(ValueError, match="cannot crop 32 x 32 from an image of 30 x 40"):
        centre_crop(np.zeros((30, 40, 3)), 32, 32)


def test_to_uint8_inverts_the_scaling() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    scaled = to_model(pixels)
    assert scaled.min() == -1 and scaled.max() == 1
    np.testing.assert_array_equal(to_uint8(scaled).permute(1, 2, 0).numpy(), pixels)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.05, 0.3, 1.0]), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_inception_crop_stays_inside(height: int, width: int, area_min: float, seed: int) -> None:
    top, left, h, w = inception_crop(np.random.default_rng(seed), height, width, area_min)
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
    assert area_min * height * width <= h * w <= height * width
    whole = (h, w) == (height, width)
    assert whole or abs(w - h * 3 / 4) <= 0.5 or abs(w - h * 4 / 3) <= 0.5 or 3 / 4 <= w / h <= 4 / 3


def test_inception_crop_covers_the_image_and_the_areas() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([inception_crop(rng, 200, 200) for _ in range(2000)])
    areas = boxes[:, 2] * boxes[:, 3] / 200**2
    assert areas.min() < 0.06 and areas.max() > 0.95
    assert (boxes[:, 2] > boxes[:, 3]).mean() == pytest.approx(3 / 7, abs=0.04)  # aspect uniform in 3/4 .. 4/3
    assert (boxes[:, 0] + boxes[:, 2]).max() == 200 and boxes[:, 0].min() == 0


def test_pad_crop_flip_against_one_image_at_a_time() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (64, 5, 7, 3), np.uint8)
    tops, lefts, flips = rng.integers(0, 5, 64), rng.integers(0, 5, 64), rng.integers(0, 2, 64).astype(bool)
    result = pad_crop_flip(images, 2, tops, lefts, flips)
    for image, out, top, left, flip in zip(images, result, tops, lefts, flips, strict=True):
        framed = np.zeros((9, 11, 3), np.uint8)
        framed[2:7, 2:9] = image
        expected = framed[top : top + 5, left : left + 7]
        np.testing.assert_array_equal(out, expected[:, ::-1] if flip else expected)
    unmoved = pad_crop_flip(images, 0, tops * 0, lefts * 0, flips)
    for image, out, flip in zip(images, unmoved, flips, strict=True):
        np.testing.assert_array_equal(out, image[:, ::-1] if flip else image)
