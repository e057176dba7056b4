"""Position embeddings for another resolution."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from visionmoe.checkpoint import resize_pos_embed


@pytest.mark.parametrize("number", range(4))
def test_against_reference(number, conformance):
    path = conformance / "units" / "posembed_resize.npz"
    if not path.is_file():
        pytest.skip(f"no reference numbers at {path}")
    data = np.load(path)
    source, expected = data[f"{number}/source"], data[f"{number}/resized"]
    for pos_embed in (source, torch.from_numpy(source)):
        actual = resize_pos_embed(pos_embed, expected.shape[1])
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("old, new, token", [((2, 5), (7, 3), True), ((4, 4), (2, 9), False), ((3, 3), (1, 1), True),
                                             ((1, 1), (3, 2), True), ((1, 6), (4, 4), False)])  # fmt: skip
def test_rectangles_agree_with_scipy_zoom_of_order_1(old, new, token):
    rng = np.random.default_rng(0)
    source = rng.normal(size=(1, old[0] * old[1] + token, 6)).astype(np.float32)
    grid = source[0, int(token) :].reshape(*old, 6)
    zoomed = scipy.ndimage.zoom(grid.astype(np.float64), (new[0] / old[0], new[1] / old[1], 1), order=1)
    if 1 in old and 1 not in new:  # zoom extends a single row by zeros; ours repeats it
        zoomed = np.broadcast_to(zoomed[:1, :1], zoomed.shape) if old == (1, 1) else np.repeat(zoomed[:1], new[0], 0)
    actual = resize_pos_embed(source, new[0] * new[1] + token, old_grid=old, new_grid=new)
    np.testing.assert_allclose(actual[0, int(token) :].reshape(*new, 6), zoomed, atol=1e-6)
    if token:
        np.testing.assert_array_equal(actual[0, 0], source[0, 0])


def test_same_size_is_a_copy():
    source = torch.randn(1, 17, 3)
    actual = resize_pos_embed(source, 17)
    assert torch.equal(actual, source) and actual.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("shape, tokens, options, message", [
    ((1, 17, 3), 16, {}, "has a class token and the new one has not"),
    ((1, 16, 3), 26, {}, "has no class token and the new one has"),
    ((1, 15, 3), 16, {}, "15 tokens are neither a square"),
    ((1, 16, 3), 15, {}, "15 tokens are neither a square"),
    ((1, 16, 3), 0, {}, "num_tokens must be >= 1, got 0"),
    ((2, 16, 3), 25, {}, r"pos_embed must be \(1, T, D\), got \(2, 16, 3\)"),
    ((1, 16, 3), 25, {"old_grid": (3, 3)}, "old_grid must have 16 or 15 patches, got 3 x 3"),
    ((1, 16, 3), 25, {"new_grid": (-5, -5)}, "new_grid must have 25 or 24 patches"),
])  # fmt: skip
def test_what_does_not_fit_is_an_error(shape, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        resize_pos_embed(torch.zeros(shape), tokens, **options)
