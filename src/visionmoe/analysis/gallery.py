"""The patches that an expert likes most: which they are, and what they look like."""

from dataclasses import dataclass

import numpy as np

from visionmoe.data.config import DataConfig
from visionmoe.data.sources import Source
from visionmoe.data.transforms import evaluation_pixels


@dataclass(frozen=True)
class Crop:
    """A patch with its surroundings. pixels: uint8 (h, w, C); box: top, left, height, width of the patch in them."""

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    weight: float
    class_name: str


def best_requests(
    expert: np.ndarray, weight: np.ndarray, image: np.ndarray, token: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `most` requests of largest weight of every expert, at most one per image, ties by image and token.

    All (R,). Returns which requests they are, and the place of each among its expert's, 0 the strongest.
    """
    order = np.lexsort((token, image, -weight, expert))
    pair = np.stack([expert[order], image[order]])
    first = np.sort(np.unique(pair, axis=1, return_index=True)[1])  # an image's strongest request comes first
    order = order[first]
    place = np.arange(len(order)) - np.searchsorted(expert[order], expert[order])
    return order[place < most], place[place < most]


def window(row: int, column: int, patch_hw: tuple[int, int], image_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """top, left, height, width of a patch with about a sixth of the image, at least a patch, on every side.

    At the image's edge the window is moved inwards, so that all windows have one size.
    """
    start, size = [], []
    for place, patch, image in zip((row, column), patch_hw, image_hw, strict=True):
        margin = max(patch, image // 6)
        size.append(min(image, patch + 2 * margin))
        start.append(min(max(0, place * patch - margin), image - size[-1]))
    return start[0], start[1], size[0], size[1]


def crops_of(
    source: Source,
    config: DataConfig,
    patch_hw: tuple[int, int],
    weights: np.ndarray,
    images: np.ndarray,
    patches: np.ndarray,
    labels: np.ndarray,
) -> list[list[Crop]]:
    """The crops of one layer's experts. All (E, N): image -1 is an empty place; patches are row-major on the grid."""
    columns = config.image_hw[1] // patch_hw[1]
    result: list[list[Crop]] = []
    for expert in range(len(images)):
        line = []
        for weight, image, patch, label in zip(
            weights[expert], images[expert], patches[expert], labels[expert], strict=True
        ):
            if image < 0:
                break
            pixels = pixels_of(source, config, int(image))
            row, column = divmod(int(patch), columns)
            top, left, height, width = window(row, column, patch_hw, config.image_hw)
            box = (row * patch_hw[0] - top, column * patch_hw[1] - left, *patch_hw)
            name = source.class_names[int(label)]
            line.append(Crop(pixels[top : top + height, left : left + width], box, float(weight), name))
        result.append(line)
    return result


def pixels_of(source: Source, config: DataConfig, index: int) -> np.ndarray:
    """Image number `index` as the model sees it, uint8 (H, W, C)."""
    image = source.decode(index, config.in_channels, config.max_pixels)
    pixels = evaluation_pixels(image, config.image_hw, config.eval_resize)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
