"""Photographs losing their patches as capacity falls, as a GIF that loops."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionmoe.analysis.figures.patches import mosaic, shaded
from visionmoe.files import atomic_write

INK, PALE, BAR, ORANGE = (34, 34, 34), (110, 110, 110), (225, 225, 225), (230, 97, 1)
MARGIN, GAP, HEAD, CAPTION = 14, 8, 56, 26


def kept_patches_animation(
    path: str | os.PathLike,
    images: np.ndarray,
    kept: Mapping[str, Sequence[np.ndarray]],
    shares: Mapping[str, Sequence[float]],
    factors: Sequence[float],
    *,
    milliseconds: int = 450,
) -> None:
    """One frame per capacity factor, in their order; first and last stay longer, then it begins again.

    images: uint8 (N, H, W, 1 or 3). kept: caption of a row of photographs ("vanilla routing") -> for every factor
    (N, rows, columns) bool. shares: the same captions -> share of the batch's patches that are kept, per factor.
    """
    grid = next(iter(kept.values()))[0].shape[1:]
    pictures = [_fitted(image, grid) for image in images]
    frames = []
    for number, factor in enumerate(factors):
        rows = []
        for caption, masks in kept.items():
            cells = [shaded(picture, mask, zoom=112) for picture, mask in zip(pictures, masks[number], strict=True)]
            rows.append((f"{caption}: {shares[caption][number]:.0%} of the patches processed", mosaic([cells], GAP)))
        frames.append(_frame(f"capacity {factor:.2f}", factor / max(factors), rows))
    times = [milliseconds] * len(frames)
    times[0] = times[-1] = 4 * milliseconds
    # One palette for all frames: colours do not flicker, and what stays equal costs nothing.
    palette = _palette(np.concatenate([np.asarray(frames[0]), np.asarray(frames[-1])]))
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with atomic_write(path) as temporary:
        small[0].save(temporary, "GIF", save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True)


def _palette(picture: np.ndarray, colours: int = 128) -> Image.Image:
    """A palette for pictures like this one, with a white that is white."""
    palette = Image.fromarray(picture).quantize(colours)
    table = np.array(palette.getpalette()).reshape(-1, 3)
    table[(table >= 248).all(1)] = 255
    palette.putpalette(table.ravel().tolist())
    return palette


def _frame(title: str, full: float, rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """The rows of photographs under a title and a bar that is `full` (0 .. 1)."""
    width = rows[0][1].shape[1] + 2 * MARGIN
    height = HEAD + sum(CAPTION + picture.shape[0] + MARGIN for _, picture in rows)
    frame = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(frame)
    draw.text((MARGIN, 8), title, INK, font=ImageFont.load_default(22))
    draw.rectangle((MARGIN, 40, width - MARGIN, 45), BAR)
    draw.rectangle((MARGIN, 40, MARGIN + round(full * (width - 2 * MARGIN)), 45), ORANGE)
    top = HEAD
    for caption, picture in rows:
        draw.text((MARGIN, top), caption, PALE, font=ImageFont.load_default(15))
        frame.paste(Image.fromarray(picture), (MARGIN, top + CAPTION))
        top += CAPTION + picture.shape[0] + MARGIN
    return frame


def _fitted(image: np.ndarray, grid: tuple[int, ...], longest: int = 144) -> np.ndarray:
    """An image no larger than about `longest` pixels, in whole pixels per patch, so that the file stays small."""
    if max(image.shape[:2]) <= longest:
        return image
    scale = longest / max(image.shape[:2])
    height, width = (max(1, round(scale * size / n)) * n for size, n in zip(image.shape[:2], grid, strict=True))
    rgb = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BOX))
