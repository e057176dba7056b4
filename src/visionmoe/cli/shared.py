"""What several commands do: the output folder, the model, the images, the progress bar."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from visionmoe.checkpoint.load import load
from visionmoe.cli.options import ModelOnImages
from visionmoe.data.config import DataConfig
from visionmoe.data.loader import EvalLoader
from visionmoe.data.sources import KINDS
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.config import read_config


def output_folder(path: Path) -> Path:
    """Makes the folder and proves that it can be written, before any work is done. OSError names it."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:  # tempfile's own message names a file that the user has never heard of
        raise OSError(error.errno, f"the output folder cannot be written ({error.strerror})", str(path)) from None


def model_folder(path: str) -> str:
    """The model of a run, where `path` is a run's folder; else `path`. ValueError for a run without a model yet."""
    of_run = Path(path) / "model"
    if (of_run / "config.json").is_file():
        return str(of_run)
    if (Path(path) / "checkpoints").is_dir():
        raise ValueError(f"the run in {path} has not finished: it has no folder model yet; resume it first")
    return path


def load_model(path: str, config: Path | None, device: str | None, image_size: int | None = None) -> VisionTransformer:
    """The trained model in evaluation mode on the device (None: a GPU where there is one)."""
    chosen = choose_device(device)
    overrides: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    return load(model_folder(path), config, **overrides).to(chosen)


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def evaluation_images(options: ModelOnImages, model: VisionTransformer) -> EvalLoader:
    """The images that the options name, at the model's size; by default those on which a run evaluates itself.

    ValueError when no images are named or they have more classes than the model.
    """
    config = model.config
    if config.num_classes is None:
        raise ValueError("the model has no head (num_classes is None), so it cannot classify")
    given = {
        "source": options.data,
        "eval_split": options.split or ("test" if options.data else None),
        "eval_batch_size": options.batch_size,
        "workers": options.workers,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {"image_size": config.image_size, "in_channels": config.in_channels}
    data = dataclasses.replace(data_of_run(options.path, required=options.data is None), **changes)
    loader = EvalLoader(data)
    if loader.num_classes > config.num_classes:
        raise ValueError(f"the model has {config.num_classes} classes, {data.source} has {loader.num_classes}")
    return loader


def data_of_run(path: str, *, required: bool) -> DataConfig:
    """The images of the run in `path`; where there is no run, the defaults, or ValueError when `required`."""
    folder = Path(path)  # tune and others leave a model, too, but no config of images beside it
    if (folder / "model" / "config.json").is_file() and (folder / "config.json").is_file():
        return read_config(str(Path(path) / "config.json")).data
    if required:
        raise ValueError(f"{path} is no run that says its images: give --data, one of {KINDS}")
    return DataConfig()


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress line on stderr where that is a terminal; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
