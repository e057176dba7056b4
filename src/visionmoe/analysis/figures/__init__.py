"""Figures as PNG files. The only package that needs matplotlib (the extra `figures`).

Every function takes plain numbers, writes one file (beside, then renamed) and leaves no state behind: no pyplot.
"""

from visionmoe.analysis.figures.compute import accuracy_against_compute, accuracy_against_time
from visionmoe.analysis.figures.experts import experts_by_class
from visionmoe.analysis.figures.patches import kept_patches, mosaic, shaded
from visionmoe.analysis.figures.per_image import compute_per_image
from visionmoe.analysis.figures.style import smooth
from visionmoe.analysis.figures.training import learning_curves
from visionmoe.analysis.figures.tuning import tuned_routing

__all__ = [
    "accuracy_against_compute",
    "accuracy_against_time",
    "compute_per_image",
    "experts_by_class",
    "kept_patches",
    "learning_curves",
    "mosaic",
    "shaded",
    "smooth",
    "tuned_routing",
]
