"""timm's dense ViT-B/16."""

from collections.abc import Callable
from typing import Any

from common import ImageWork, MissingError

INSTALL = "pip install timm"


def image_calls(work: ImageWork) -> dict[str, Callable[[], Any]]:
    try:
        import timm
    except ImportError as error:
        raise MissingError(f"not installed: {INSTALL} ({error})") from None
    model = timm.create_model("vit_base_patch16_224", pretrained=False).eval().to(work.images.device, work.dtype)
    images = work.images.to(work.dtype)
    return {"timm ViT-B/16": lambda: model(images)}
