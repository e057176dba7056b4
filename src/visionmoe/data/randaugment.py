"""RandAugment (arXiv 1909.13719) in the reference's scale: RandAugment(2, 10) here is RandAugment(2, 10) there.

The reference calls the TPU repository's code, where magnitude 10 is the full strength of an operation and larger ones
go on in proportion. torchvision's class has other operations and reaches the same full strength (30 degrees, shear 0.3,
factor 1.9) at the last of its 31 bins: its magnitude is 3 times the reference's, and the reference's 20 is out of its
range. So the operations are torchvision's, the choice among them and their strengths the reference's, with these
differences:
- Translation and cutout, there 100 and 40 pixels for images of 224, are in proportion to the image.
- Contrast pulls towards the mean grey; the reference divides the number of pixels by 256 in its place, by mistake.
- Solarize with a threshold above 255 (from magnitude 10 on) leaves the image alone.
Posterize keeps int(0.4 * magnitude) bits as there: larger magnitudes change LESS, and from 20 on nothing.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

GREY = [128.0]  # what fills the places that an operation uncovers
FULL = 10.0  # the magnitude of full strength


def randaugment(image: Tensor, ops: int, magnitude: float, rng: np.random.Generator) -> Tensor:
    """Applies `ops` operations, drawn with replacement, to a uint8 image (C, H, W)."""
    names = list(OPERATIONS)
    for _ in range(ops):
        image = OPERATIONS[names[rng.integers(len(names))]](image, magnitude / FULL, rng)
    return image


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.integers(2) else -1.0


def _enhance(strength: float) -> float:
    return 1.8 * strength + 0.1


def _rotate(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    return F.rotate(image, 30 * strength * _sign(rng), fill=GREY)


def _shear(image: Tensor, x: float, y: float) -> Tensor:
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, angle=0, translate=[0, 0], scale=1, shear=angles, fill=GREY, center=[0, 0])


def _translate(image: Tensor, x: float, y: float) -> Tensor:
    """x, y: shares of the width and of the height."""
    shift = [round(x * image.shape[2]), round(y * image.shape[1])]
    return F.affine(image, angle=0, translate=shift, scale=1, shear=[0, 0], fill=GREY)


def _posterize(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    return F.posterize(image, min(8, int(strength * 4)))


def _solarize(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    threshold = int(strength * 256)
    return image if threshold > 255 else F.solarize(image, threshold)


def _solarize_add(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    brighter = (image.to(torch.int16) + int(strength * 110)).clamp(0, 255).to(torch.uint8)
    return torch.where(image < 128, brighter, image)


def _cutout(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Fills a square, its centre anywhere, of 2 * 40 pixels in an image of 224 at full strength."""
    _, height, width = image.shape
    half = int(strength * 40 / 224 * min(height, width))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    image = image.clone()
    image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = int(GREY[0])
    return image


OPERATIONS: dict[str, Callable[[Tensor, float, np.random.Generator], Tensor]] = {
    "AutoContrast": lambda image, strength, rng: F.autocontrast(image),
    "Equalize": lambda image, strength, rng: F.equalize(image),
    "Invert": lambda image, strength, rng: F.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": lambda image, strength, rng: F.adjust_saturation(image, _enhance(strength)),
    "Contrast": lambda image, strength, rng: F.adjust_contrast(image, _enhance(strength)),
    "Brightness": lambda image, strength, rng: F.adjust_brightness(image, _enhance(strength)),
    "Sharpness": lambda image, strength, rng: F.adjust_sharpness(image, _enhance(strength)),
    "ShearX": lambda image, strength, rng: _shear(image, 0.3 * strength * _sign(rng), 0),
    "ShearY": lambda image, strength, rng: _shear(image, 0, 0.3 * strength * _sign(rng)),
    "TranslateX": lambda image, strength, rng: _translate(image, 100 / 224 * strength * _sign(rng), 0),
    "TranslateY": lambda image, strength, rng: _translate(image, 0, 100 / 224 * strength * _sign(rng)),
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
