"""Digests that say whether a kept result is still of the same model and the same images."""

import hashlib
import json

import numpy as np
import torch

from visionmoe.config import to_dict
from visionmoe.data.decode import BrokenImageError
from visionmoe.data.loader import EvalLoader
from visionmoe.data.transforms import evaluation_pixels
from visionmoe.model.vit import VisionTransformer

SAMPLES = 16  # images whose pixels are looked at: those of all would cost a pass


def model_fingerprint(model: VisionTransformer) -> str:
    """A digest of all weights and of the config but for the routing that can be set: see `adaptive.layer_settings`."""
    config = to_dict(model.config)
    for name in ("num_selected_experts", "capacity_factor", "batch_priority", "layer_routing"):
        del config["moe"][name]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def data_fingerprint(loader: EvalLoader) -> str:
    """A digest of where the images come from, how they are prepared and grouped, all labels, and the pixels of SAMPLES
    images spread over the data; a broken one counts as its message."""
    config, source = loader.config, loader.source
    about = [config.source, config.eval_split, config.image_hw, config.in_channels, config.eval_resize,
             config.eval_batch_size, list(source.class_names)]  # fmt: skip
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(np.ascontiguousarray(source.labels).tobytes())
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLES).round().astype(int)):
        try:
            image = source.decode(int(index), config.in_channels, config.max_pixels)
            digest.update(np.ascontiguousarray(evaluation_pixels(image, config.image_hw, config.eval_resize)).tobytes())
        except BrokenImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]
