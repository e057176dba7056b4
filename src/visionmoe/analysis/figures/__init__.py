"""Figures as PNG files. The only package that needs matplotlib (the extra `figures`).

Every function takes plain numbers, writes one file (beside, then renamed) and leaves no state behind: no pyplot.
"""

from visionmoe.analysis.figures.compute import accuracy_against_compute
from visionmoe.analysis.figures.experts import experts_by_class
from visionmoe.analysis.figures.fewshot import accuracy_over_shots
from visionmoe.analysis.figures.patches import kept_patches, mosaic, shaded
from visionmoe.analysis.figures.style import smooth
from visionmoe.analysis.figures.training import learning_curves

__all__ = [
    "accuracy_against_compute",
    "accuracy_over_shots",
    "experts_by_class",
    "kept_patches",
    "learning_curves",
    "mosaic",
    "shaded",
    "smooth",
]
