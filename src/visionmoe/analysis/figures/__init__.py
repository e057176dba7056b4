"""Figures as PNG files. The only package that needs matplotlib (the extra `figures`).

Every function takes plain numbers, writes one file (beside, then renamed) and leaves no state behind: no pyplot.
"""

from visionmoe.analysis.figures.animation import kept_patches_animation
from visionmoe.analysis.figures.compute import accuracy_against_compute, accuracy_against_time
from visionmoe.analysis.figures.experts import experts_by_class, experts_by_position
from visionmoe.analysis.figures.fewshot import accuracy_over_shots
from visionmoe.analysis.figures.gallery import gallery, outlined
from visionmoe.analysis.figures.patches import kept_patches, mosaic, shaded
from visionmoe.analysis.figures.per_image import compute_per_image
from visionmoe.analysis.figures.routers import (
    combine_weights,
    entropies,
    expert_load,
    mutual_information,
    position_maps,
    random_routers,
)
from visionmoe.analysis.figures.style import smooth
from visionmoe.analysis.figures.training import learning_curves
from visionmoe.analysis.figures.tuning import tuned_routing

__all__ = [
    "accuracy_against_compute",
    "accuracy_against_time",
    "accuracy_over_shots",
    "combine_weights",
    "compute_per_image",
    "entropies",
    "expert_load",
    "experts_by_class",
    "experts_by_position",
    "gallery",
    "kept_patches",
    "kept_patches_animation",
    "learning_curves",
    "mosaic",
    "mutual_information",
    "outlined",
    "position_maps",
    "random_routers",
    "shaded",
    "smooth",
    "tuned_routing",
]
