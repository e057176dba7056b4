"""ONNX Runtime on timm's dense ViT-B/16, exported: float32, and with 8-bit weights and activations (dynamic)."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ImageWork, MissingError

INSTALL = "pip install onnx onnxscript onnxruntime timm"


def image_calls(work: ImageWork) -> dict[str, Callable[[], Any]]:
    if work.images.device.type != "cpu" or work.dtype != torch.float32:
        raise MissingError("runs here on a CPU from float32 alone")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter needs it)
        import timm
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingError(f"not installed: {INSTALL} ({error})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work.threads
    pixels = work.images.numpy()
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "vit.onnx", Path(folder) / "vit_int8.onnx"
        model = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
        _export(model, work.images, path)
        with _silent():
            quantize_dynamic(path, small, weight_type=QuantType.QInt8)
        for name, file in (("float32", path), ("int8 (dynamic)", small)):
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            calls[f"ONNX Runtime ViT-B/16, {name}"] = _runner(session, pixels)
    return calls


def _runner(session: Any, pixels: Any) -> Callable[[], Any]:
    inputs = {session.get_inputs()[0].name: pixels}
    return lambda: session.run(None, inputs)


def _export(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    with _silent(), torch.no_grad():
        torch.onnx.export(model, (images,), str(path), dynamo=True, external_data=False)


@contextlib.contextmanager
def _silent() -> Any:
    """Exporter and quantiser talk a lot."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
